package task

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/checkpoint/rootfs"
)

// embedded is a checkpoint in the image that a container is made from: a runnable
// image (docs/checkpoint-format.md) has it in a layer of its own, which holds the
// folder layout.Embedded and nothing else.
type embedded struct {
	dir  string       // with CRIU's images
	info string       // info.json
	own  recordFolder // one of this container's only, which it does not see
	// folder is what the container must not see, or empty if it cannot.
	folder string
}

// readEmbeddedInfo tells what the checkpoint is of.
func readEmbeddedInfo(path string) (capture.Info, error) {
	f, err := capture.OpenPlain(path)
	if err != nil {
		return capture.Info{}, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, capture.MaxInfo+1))
	if err != nil {
		return capture.Info{}, err
	}
	if len(data) > capture.MaxInfo {
		return capture.Info{}, fault.Invalid("/%s of the image: larger than %d bytes", layout.EmbeddedInfo, capture.MaxInfo)
	}
	info, err := capture.DecodeInfo(data)
	if err != nil {
		err = fmt.Errorf("/%s of the image: %w", layout.EmbeddedInfo, err)
	}
	return info, err
}

// findEmbedded looks for a checkpoint in a root filesystem that is not mounted yet, and
// returns nil if there is none. rest is what to mount: the container does not get to
// see the checkpoint, so its layer is left out. Only where the root filesystem is a
// single folder (the native snapshotter) it has to be there until the processes are,
// and is removed then.
func findEmbedded(mounts []mount.Mount) (found *embedded, rest []mount.Mount, err error) {
	if len(mounts) != 1 {
		return nil, mounts, nil
	}
	switch m := mounts[0]; m.Type {
	case "overlay":
		if found, m, err = findLayer(m); err != nil {
			return nil, nil, err
		}
		return found, []mount.Mount{m}, nil
	case "bind":
		if isEmbedded(m.Source) {
			found = inFolder(m.Source)
		}
	}
	return found, mounts, nil
}

// seenWhenMounted tells whether findEmbedded cannot look into a root filesystem: in a
// snapshotter's that keeps images in file systems of their own.
func seenWhenMounted(mounts []mount.Mount) bool {
	return len(mounts) > 1 || len(mounts) == 1 && mounts[0].Type != "overlay" && mounts[0].Type != "bind"
}

// inFolder is the checkpoint in a root filesystem that is a folder of the
// container's own.
func inFolder(root string) *embedded {
	folder := filepath.Join(root, layout.Embedded)
	return &embedded{dir: filepath.Join(root, layout.EmbeddedImages), info: filepath.Join(root, layout.EmbeddedInfo), own: recordFolder(folder), folder: folder}
}

// findLayer looks for a checkpoint in the layers of an overlay. rest is the mount
// without its layer.
func findLayer(m mount.Mount) (found *embedded, rest mount.Mount, err error) {
	option := -1
	var layers []string
	for i, o := range m.Options {
		if value, ok := strings.CutPrefix(o, "lowerdir="); ok {
			option, layers = i, strings.Split(value, ":")
		}
	}
	for i, layer := range layers {
		if !isEmbedded(layer) {
			continue
		}
		entries, err := os.ReadDir(layer)
		if err != nil {
			return nil, m, fmt.Errorf("read the layer of the checkpoint: %w", err)
		}
		if len(entries) != 1 || len(layers) == 1 {
			return nil, m, fmt.Errorf("the image has a checkpoint in a layer with other files (%s), and the container must not see it; make the image again with stasis: %w",
				layer, errdefs.ErrFailedPrecondition)
		}
		// The options are shared with the request.
		m.Options = slices.Clone(m.Options)
		m.Options[option] = "lowerdir=" + strings.Join(slices.Delete(layers, i, i+1), ":")
		return &embedded{
			dir:  filepath.Join(layer, layout.EmbeddedImages),
			info: filepath.Join(layer, layout.EmbeddedInfo),
			own:  recordFolder(rootfs.MountOption(m, "workdir")),
		}, m, nil
	}
	return nil, m, nil
}

// isEmbedded tells whether there is a checkpoint in a layer. No link counts.
func isEmbedded(layer string) bool {
	folder, err := os.Lstat(filepath.Join(layer, layout.Embedded))
	if err != nil || !folder.IsDir() {
		return false
	}
	dir, err := os.Lstat(filepath.Join(layer, layout.EmbeddedImages))
	if err != nil || !dir.IsDir() {
		return false
	}
	info, err := os.Lstat(filepath.Join(layer, layout.EmbeddedInfo))
	return err == nil && info.Mode().IsRegular()
}

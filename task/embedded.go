package task

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/rootfs"
)

// A runnable checkpoint image (docs/checkpoint-format.md) has its checkpoint in a
// layer of its own, which holds the folder /.stasis and nothing else.
const (
	embeddedFolder     = ".stasis"
	embeddedCheckpoint = embeddedFolder + "/checkpoint"
	embeddedInfo       = embeddedFolder + "/info.json"
)

// embedded is a checkpoint in the image that a container is made from.
type embedded struct {
	dir  string // with CRIU's images
	info string // info.json
	own  mark   // one of this container's only, which it does not see
	// folder is what the container shall not see, or empty if it cannot.
	folder string
}

// readInfo tells what the checkpoint is of.
func (e *embedded) readInfo() (capture.Info, error) {
	f, err := capture.OpenPlain(e.info)
	if err != nil {
		return capture.Info{}, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, capture.MaxInfo+1))
	if err != nil {
		return capture.Info{}, err
	}
	if len(data) > capture.MaxInfo {
		return capture.Info{}, fault.Invalid("/%s of the image: larger than %d bytes", embeddedInfo, capture.MaxInfo)
	}
	info, err := capture.DecodeInfo(data)
	if err != nil {
		err = fmt.Errorf("/%s of the image: %w", embeddedInfo, err)
	}
	return info, err
}

// findEmbedded looks for a checkpoint in the container's root filesystem, which is
// not mounted yet, and returns nil if there is none. The container does not get
// to see it: its layer is taken out of the mount. Only where the root filesystem
// is a single folder (the native snapshotter) it has to be there until the
// processes are, and is removed then.
func (c *container) findEmbedded() (*embedded, error) {
	if len(c.rootfs) != 1 {
		return nil, nil
	}
	switch m := &c.rootfs[0]; m.Type {
	case "overlay":
		return findLayer(m)
	case "bind":
		if !isEmbedded(m.Source) {
			return nil, nil
		}
		return inFolder(m.Source), nil
	}
	return nil, nil
}

// findMounted looks for a checkpoint in a root filesystem that is mounted, where
// findEmbedded could not look: in a snapshotter's that keeps images in file
// systems of their own.
func (c *container) findMounted() *embedded {
	if _, cold := c.launcher.(coldStart); !cold || len(c.rootfs) == 0 {
		return nil
	}
	if m := c.rootfs[0]; len(c.rootfs) == 1 && (m.Type == "overlay" || m.Type == "bind") {
		return nil // findEmbedded has looked
	}
	if !isEmbedded(c.bundle.rootfs()) {
		return nil
	}
	return inFolder(c.bundle.rootfs())
}

// inFolder is the checkpoint in a root filesystem that is a folder of the
// container's own.
func inFolder(root string) *embedded {
	folder := filepath.Join(root, embeddedFolder)
	return &embedded{dir: filepath.Join(root, embeddedCheckpoint), info: filepath.Join(root, embeddedInfo), own: mark(folder), folder: folder}
}

// findLayer looks for a checkpoint in the layers of an overlay and takes its layer
// out of the mount.
func findLayer(m *mount.Mount) (*embedded, error) {
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
			return nil, fmt.Errorf("read the layer of the checkpoint: %w", err)
		}
		if len(entries) != 1 || len(layers) == 1 {
			return nil, fmt.Errorf("the image has a checkpoint in a layer with other files (%s), and the container must not see it; make the image again with stasis: %w",
				layer, errdefs.ErrFailedPrecondition)
		}
		rest := append(append([]string{}, layers[:i]...), layers[i+1:]...)
		// The options may be shared with the request.
		m.Options = append([]string{}, m.Options...)
		m.Options[option] = "lowerdir=" + strings.Join(rest, ":")
		return &embedded{
			dir:  filepath.Join(layer, embeddedCheckpoint),
			info: filepath.Join(layer, embeddedInfo),
			own:  mark(rootfs.MountOption(*m, "workdir")),
		}, nil
	}
	return nil, nil
}

// isEmbedded tells whether there is a checkpoint in a layer. No link counts.
func isEmbedded(layer string) bool {
	folder, err := os.Lstat(filepath.Join(layer, embeddedFolder))
	if err != nil || !folder.IsDir() {
		return false
	}
	dir, err := os.Lstat(filepath.Join(layer, embeddedCheckpoint))
	if err != nil || !dir.IsDir() {
		return false
	}
	info, err := os.Lstat(filepath.Join(layer, embeddedInfo))
	return err == nil && info.Mode().IsRegular()
}

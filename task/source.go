package task

import (
	"os"
	"path/filepath"
	"regexp"
	"sync"

	"github.com/stasis-run/stasis/checkpoint/rootfs"
)

// source is where the checkpoint of a restore comes from.
type source struct {
	kind sourceKind
	// path is the folder with CRIU's images; fromAnnotation, it is a name in
	// containerd or the path of an archive.
	path   string
	info   string // the path of what came with the images; only fromImage
	record restoreRecord
	// folder is a checkpoint in the container's root filesystem, as in
	// RestorePlan.embedded.
	folder string
	// copy is the folder of a copy that is ours to remove, as in RestorePlan.
	copy string
}

type sourceKind int

const (
	// fromFolder: a folder that the request or the runtime's options name. Who can
	// name it is root.
	fromFolder sourceKind = iota
	// fromAnnotation: an annotation names it.
	fromAnnotation
	// fromImage: it is in the image that the container is made from.
	fromImage
)

// String follows "restore container X" in errors.
func (src *source) String() string {
	switch src.kind {
	case fromAnnotation:
		return " from " + src.path
	case fromImage:
		return " from its image"
	}
	return ""
}

// resolve decides whether a container is restored, and from where; nil is a cold
// start. checkpoint is the folder that the request names, found the checkpoint in the
// image. It changes nothing. A restore that was asked for never becomes a cold start.
func (c *container) resolve(checkpoint string, found *embedded) (*source, error) {
	path := checkpoint
	if path == "" {
		path = c.options.CriuImagePath
	}
	switch {
	case path != "":
		if !filepath.IsAbs(path) {
			return nil, invalid("checkpoint path %q is not absolute", path)
		}
		src := &source{kind: fromFolder, path: path}
		if path != c.options.CriuImagePath && isTemporary(path) {
			src.copy = path
		}
		return src, nil
	case c.request.from != "":
		src := &source{
			kind:   fromAnnotation,
			path:   c.request.from,
			record: restoreRecord{own: c.ownRecord(), pod: c.config.podRecord()},
			copy:   c.bundle.fetchedDir(),
		}
		if found != nil {
			src.folder = found.folder
		}
		return src, nil
	case found != nil:
		return &source{
			kind:   fromImage,
			path:   found.dir,
			info:   found.info,
			record: restoreRecord{own: found.own, pod: c.config.podRecord()},
			folder: found.folder,
		}, nil
	}
	return nil, nil
}

// ownRecord is where restores of a container are recorded whose image has no
// checkpoint.
func (c *container) ownRecord() recordFolder {
	if len(c.rootfs) == 1 {
		switch m := &c.rootfs[0]; m.Type {
		case "overlay":
			return recordFolder(rootfs.MountOption(*m, "workdir"))
		case "bind":
			return recordFolder(m.Source)
		}
	}
	return recordFolder(c.bundle.rootfs())
}

// restoreFrom is the bundle's note of a temporary checkpoint folder.
const restoreFrom = "restore-from"

var tempCheckpoint = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^ctrd-checkpoint[0-9]+$`) })

// isTemporary tells whether containerd has made the folder for this one restore:
// a copy of a checkpoint out of its content store, which it never removes
// (containerd issue 10166). Its name is os.MkdirTemp's, in the folder that
// containerd uses; the shim has containerd's environment.
func isTemporary(path string) bool {
	dir := os.Getenv("XDG_RUNTIME_DIR")
	if dir == "" {
		dir = os.TempDir()
	}
	return filepath.Dir(path) == filepath.Clean(dir) && tempCheckpoint().MatchString(filepath.Base(path))
}

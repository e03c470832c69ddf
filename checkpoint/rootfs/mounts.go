package rootfs

import (
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
)

// Writable returns the folder that holds what a container writes into its root
// filesystem, given how that is mounted: the upper folder of an overlay, which has
// the changes only, or the one folder that all of it is. dir is empty if there is
// no such folder to be seen while the container runs.
func Writable(mounts []mount.Mount) (dir string, upper bool) {
	if len(mounts) != 1 {
		return "", false
	}
	switch m := mounts[0]; m.Type {
	case "overlay":
		dir = MountOption(m, "upperdir")
		return dir, dir != ""
	case "bind":
		return m.Source, false
	}
	return "", false
}

// Lower returns the lower folders of an overlay, the topmost first; none if the
// root filesystem is mounted in another way.
func Lower(mounts []mount.Mount) []string {
	if len(mounts) != 1 || mounts[0].Type != "overlay" {
		return nil
	}
	return filepath.SplitList(MountOption(mounts[0], "lowerdir"))
}

// MountOption is the value of a mount option, or "".
func MountOption(m mount.Mount, name string) string {
	for _, o := range m.Options {
		if value, ok := strings.CutPrefix(o, name+"="); ok {
			return value
		}
	}
	return ""
}

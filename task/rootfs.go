package task

import (
	"fmt"
	"os"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
)

// writableLayer is the folder that holds what the container writes into its root
// filesystem: the upper folder of an overlay, which has the changes only, or else
// all of the root filesystem.
func (c *container) writableLayer() (dir string, upper bool, err error) {
	if len(c.rootfs) == 1 {
		switch m := c.rootfs[0]; m.Type {
		case "overlay":
			if dir := overlayOption(m, "upperdir"); dir != "" {
				return dir, true, nil
			}
			return "", false, fmt.Errorf("container %s has no writable layer: %w", c.id, errdefs.ErrFailedPrecondition)
		case "bind":
			return m.Source, false, nil
		}
	}
	dir = c.bundle.rootfs()
	if _, err := os.Stat(dir); err != nil {
		return "", false, fmt.Errorf("find the root filesystem of container %s, which containerd did not mount: %w", c.id, err)
	}
	return dir, false, nil
}

// overlayOption is the value of a mount option, or "".
func overlayOption(m mount.Mount, name string) string {
	for _, o := range m.Options {
		if value, ok := strings.CutPrefix(o, name+"="); ok {
			return value
		}
	}
	return ""
}

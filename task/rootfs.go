package task

import (
	"fmt"
	"os"

	"github.com/stasis-run/stasis/checkpoint/rootfs"

	"github.com/containerd/errdefs"
)

// writableLayer is the folder that holds what the container writes into its root
// filesystem: the upper folder of an overlay, which has the changes only, or else
// all of the root filesystem.
func (c *container) writableLayer() (dir string, upper bool, err error) {
	if dir, upper = rootfs.Writable(c.rootfs); dir != "" {
		return dir, upper, nil
	}
	if len(c.rootfs) == 1 && c.rootfs[0].Type == "overlay" {
		return "", false, fmt.Errorf("container %s has no writable layer: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	dir = c.bundle.rootfs()
	if _, err := os.Stat(dir); err != nil {
		return "", false, fmt.Errorf("find the root filesystem of container %s, which containerd did not mount: %w", c.id, err)
	}
	return dir, false, nil
}

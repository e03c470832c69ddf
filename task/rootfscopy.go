package task

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/stasis-run/stasis/checkpoint/api"
	"github.com/stasis-run/stasis/checkpoint/rootfs"
)

// copyFreezeTimeout is how long the processes may take to stand still.
const copyFreezeTimeout = 10 * time.Second

// copyRootfs copies the writable layer of a container, which stands still meanwhile, and
// then runs on unless it was paused. The caller excludes other calls. copied is told of
// each part, in bytes. After an error there is no copy.
func (c *container) copyRootfs(ctx context.Context, to string, copied func(int64)) (_ *api.CheckpointResult, err error) {
	c.mu.Lock()
	err = c.init.check(opCheckpoint)
	paused, cg := c.init.state == Paused, c.cgroup
	c.mu.Unlock()
	if err != nil {
		return nil, err
	}
	result := &api.CheckpointResult{}
	from, isUpper, err := c.writableLayer()
	if err != nil {
		return nil, err
	}
	if cg == nil {
		return nil, fmt.Errorf("copy the files of container %s: its cgroup could not be loaded, so it cannot be frozen: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	started := time.Now()
	if !paused {
		defer func() {
			if frozen, ferr := cg.Frozen(); ferr != nil || !frozen {
				return // the group is gone, and the container with it
			}
			if terr := cg.Thaw(); terr != nil {
				log.G(ctx).WithError(terr).WithField("container", c.id).Error("thaw the container after its files were copied")
			}
			result.FrozenNs = uint64(time.Since(started))
		}()
		err := cg.Freeze()
		if err == nil {
			freezing, stop := context.WithTimeoutCause(ctx, copyFreezeTimeout, fmt.Errorf("some of its processes did not stop within %v", copyFreezeTimeout))
			defer stop()
			err = cg.WaitFrozen(freezing)
		}
		if err != nil {
			return nil, fmt.Errorf("freeze container %s: %w", c.id, err)
		}
	}
	n, err := rootfs.Copy(ctx, to, from, copied)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("copy the writable layer %s of container %s: %w", from, c.id, err), os.RemoveAll(to))
	}
	result.RootfsBytes, result.RootfsIsUpper = uint64(n), isUpper
	return result, nil
}

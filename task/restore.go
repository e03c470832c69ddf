package task

import (
	"context"
	"fmt"
	"os"
	"sync/atomic"

	"github.com/containerd/containerd/api/events"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/criu"
	"github.com/stasis-run/stasis/process"
)

// restore executes a plan: it brings init back. If it fails, it leaves no process, and can
// be tried again. But if only the streams failed, the processes have run for a moment, and
// may have changed files; that the restore has begun stays recorded then.
func (c *container) restore(ctx context.Context, p *RestorePlan) error {
	// Only now is the root filesystem what it is going to be.
	if err := c.service.policy.CheckMounts(ctx, p.checkpoint, p.spec, p.bundle.rootOf(p.spec)); err != nil {
		return fmt.Errorf("restore container %s: %w", c.id, err)
	}
	pio, err := c.init.openIO(ctx, p.pipes)
	if err != nil {
		return err
	}
	attempt, err := p.record.begin()
	if err != nil {
		pio.Close()
		return err
	}
	outOfMemory := c.watchRestore()
	child, err := c.service.reaper.Launch(func() (int, error) {
		return criu.Restore(ctx, criu.RestoreRequest{
			Runtime:       c.runtime,
			ID:            c.id,
			Checkpoint:    p.checkpoint,
			Bundle:        string(p.bundle),
			Spec:          p.spec,
			WorkDir:       p.workDir,
			NoPivot:       p.noPivot,
			Self:          self(),
			Check:         func(ctx context.Context, pids []int) error { return c.service.policy.CheckProcesses(ctx, p.spec, pids) },
			IO:            pio.Pipes(),
			ConsoleSocket: pio.ConsoleSocket(),
		})
	})
	if killed := outOfMemory(); killed && err != nil {
		err = fmt.Errorf("out of memory: what is restored does not fit into %s; raise it: %w", memoryLimit(p.spec), err)
	}
	if err != nil {
		attempt.failed(c.id)
		pio.Close()
		return err
	}
	if err := pio.Attach(ctx); err != nil {
		_ = child.Signal(unix.SIGKILL)
		pio.Close()
		c.removeFromRuntime(ctx)
		return err
	}
	c.init.adopt(child, pio)
	c.setOOMScore(child.Pid, p.spec)
	attempt.restored(c.id)
	if p.embedded != "" {
		if err := os.RemoveAll(p.embedded); err != nil {
			log.L.WithError(err).WithField("container", c.id).Warn("remove the checkpoint from the container's files")
		}
	}
	p.Close()
	return nil
}

// self is this program: the link is right even if the file was replaced.
func self() string { return fmt.Sprintf("/proc/%d/exe", os.Getpid()) }

// setOOMScore gives restored processes the spec's score. Not to be able to lower it is
// no reason to end them: then they are the first to go when memory is short.
func (c *container) setOOMScore(init int, spec *specs.Spec) {
	if spec.Process == nil || spec.Process.OOMScoreAdj == nil {
		return
	}
	cg := c.loadedCgroup()
	if cg == nil {
		return // as was said when it could not be loaded
	}
	if err := cg.SetOOMScore(init, *spec.Process.OOMScoreAdj); err != nil {
		log.L.WithError(err).WithField("container", c.id).Warn("give the restored processes the OOM score of the spec")
	}
}

// watchRestore publishes when the kernel kills a process of a restore for lack of
// memory. The function that it returns ends that, and tells whether there was one.
func (c *container) watchRestore() (stop func() bool) {
	if c.config.Linux == nil {
		return func() bool { return false }
	}
	var killed atomic.Bool
	end := process.WatchOOMOf(c.config.Linux.CgroupsPath, func() {
		killed.Store(true)
		c.service.publish(&events.TaskOOM{ContainerID: c.id})
	})
	return func() bool {
		end()
		return killed.Load()
	}
}

// memoryLimit says what a container's limit is.
func memoryLimit(spec *specs.Spec) string {
	if spec.Linux != nil && spec.Linux.Resources != nil && spec.Linux.Resources.Memory != nil {
		if limit := spec.Linux.Resources.Memory.Limit; limit != nil && *limit > 0 {
			return fmt.Sprintf("the container's memory limit of %d bytes", *limit)
		}
	}
	return "the memory limit above the container's own"
}

package task

import (
	"context"

	"github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/api/types/runc/options"

	"github.com/stasis-run/stasis/checkpoint"
)

// checkpoint dumps the container into the folder dir. It runs on, or stays
// paused, unless the options say that it is to end; then it has ended when this
// returns.
func (c *container) checkpoint(ctx context.Context, dir string, opts *options.CheckpointOptions) error {
	ctx, release, err := c.exclusive(ctx)
	if err != nil {
		return err
	}
	defer release()
	p := c.init
	c.mu.Lock()
	err = p.check(opCheckpoint)
	paused, pid, cg := p.state == Paused, p.pid(), c.cgroup
	c.mu.Unlock()
	if err != nil {
		return err
	}
	workDir := opts.WorkPath
	if workDir == "" {
		// Not below dir: containerd removes that after a failure, and the
		// log is what explains it.
		workDir = c.bundle.dumpDir()
	}
	err = checkpoint.Dump(ctx, checkpoint.DumpRequest{
		Runtime: c.runtime,
		Cgroup:  cg,
		InitPid: pid,
		Dir:     dir,
		WorkDir: workDir,
		Options: checkpoint.Options{
			OpenTCP:             opts.OpenTcp,
			ExternalUnixSockets: opts.ExternalUnixSockets,
			Terminal:            opts.Terminal,
			FileLocks:           opts.FileLocks,
			EmptyNamespaces:     opts.EmptyNamespaces,
			CgroupsMode:         opts.CgroupsMode,
		},
		Exit:   opts.Exit,
		Paused: paused,
		// The only copy of a container that is gone, in a folder that is
		// not containerd's temporary one.
		Durable: opts.Exit && opts.ImagePath != "",
		Container: checkpoint.Container{
			ID:         c.id,
			Namespace:  c.namespace,
			SpecDigest: c.specDigest.String(),
		},
		TerminalIO: c.config.hasTerminal(),
	})
	if err != nil {
		return err
	}
	c.service.publish(&events.TaskCheckpointed{ContainerID: c.id, Checkpoint: dir})
	if opts.Exit {
		select {
		case <-p.exited:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

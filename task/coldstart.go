package task

import (
	"context"

	runc "github.com/containerd/go-runc"
	"github.com/containerd/log"

	"github.com/stasis-run/stasis/process"
)

// createCold has the runtime create init, which then waits for Start.
func (c *container) createCold(ctx context.Context) error {
	init := c.init
	pio, err := init.openIO(ctx, [3]bool{})
	if err != nil {
		return err
	}
	child, err := c.service.reaper.Launch(func() (int, error) {
		return c.runtime.Create(ctx, &runc.CreateOpts{
			IO:            pio.Pipes(),
			ConsoleSocket: pio.ConsoleSocket(),
			NoPivot:       c.options.NoPivotRoot,
			NoNewKeyring:  c.options.NoNewKeyring,
		})
	})
	if err != nil {
		pio.Close()
		return err
	}
	if err := pio.Attach(ctx); err != nil {
		pio.Close()
		c.removeFromRuntime(ctx)
		return err
	}
	init.before = process.ProgramOf(child.Pid)
	init.adopt(child, pio)
	return nil
}

// removeFromRuntime undoes a create or restore whose process is of no use.
func (c *container) removeFromRuntime(ctx context.Context) {
	if err := c.runtime.Delete(context.WithoutCancel(ctx)); err != nil {
		log.G(ctx).WithError(err).WithField("container", c.id).Warn("delete a container that was not started")
	}
}

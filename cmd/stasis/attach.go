package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"

	"github.com/containerd/console"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/node"
)

// attachment connects this terminal to a container that is being restored.
type attachment struct {
	a   *app
	out *output
	// con is nil if this is no terminal, or the container has none.
	con     console.Console
	signals chan os.Signal
}

// attachTo has a restore connect its container to this terminal. wait then waits for the
// container's end; reset has to be called in the end.
func (a *app) attachTo(r *node.RestoreRequest) *attachment {
	// A container whose output nobody reads runs on: a broken pipe does not cancel the
	// restore.
	at := &attachment{a: a, out: newOutput(a.out.w, func(error) {})}
	terminal := false
	r.IO = func(has bool) cio.Creator {
		// The terminal is the container's now.
		if r.Progress != nil {
			r.Progress(node.Update{})
		}
		a.endProgress()
		if terminal = has; terminal {
			return cio.NewCreator(cio.WithStreams(a.in, at.out, nil), cio.WithTerminal)
		}
		return cio.NewCreator(cio.WithStreams(a.in, at.out, a.err))
	}
	r.Starting = func(client.Task) func() {
		if terminal {
			at.con = rawTerminal()
		}
		// From here on: one that comes when all is restored, and so undoes nothing any
		// more, is for the container.
		at.signals = catchSignals()
		return func() {
			at.reset()
			signal.Stop(at.signals)
		}
	}
	return at
}

// wait waits for the container's end, and removes its task. Its exit code is the error.
func (at *attachment) wait(ctx context.Context, r *node.RestoreResult) error {
	ctx = context.WithoutCancel(ctx)
	if at.con != nil {
		defer followSize(ctx, r.Task, at.con)()
	}
	defer forwardSignals(ctx, r.Task, at.signals)()
	var status client.ExitStatus
	select {
	case status = <-r.Exited:
	case <-at.out.broken:
		return at.out.failed() // the container runs on
	}
	if err := status.Error(); err != nil {
		return fmt.Errorf("wait for %s: %w", r.Container, err)
	}
	_, err := r.Task.Delete(ctx)
	if err == nil && status.ExitCode() != 0 {
		err = exitCode(status.ExitCode())
	}
	return err
}

// reset makes the terminal what it was.
func (at *attachment) reset() {
	if at.con != nil {
		at.con.Reset()
	}
}

// catchSignals keeps the signals that would end us.
func catchSignals() chan os.Signal {
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT)
	return signals
}

// forwardSignals sends on to a container what catchSignals has kept and keeps.
func forwardSignals(ctx context.Context, task client.Task, signals chan os.Signal) (stop func()) {
	go func() {
		for s := range signals {
			_ = task.Kill(ctx, s.(unix.Signal)) // it may have ended
		}
	}()
	return func() {
		signal.Stop(signals)
		close(signals)
	}
}

// followSize keeps a container's terminal as large as ours.
func followSize(ctx context.Context, task client.Task, con console.Console) (stop func()) {
	resize := func() {
		if size, err := con.Size(); err == nil {
			_ = task.Resize(ctx, uint32(size.Width), uint32(size.Height))
		}
	}
	changed := make(chan os.Signal, 1)
	signal.Notify(changed, unix.SIGWINCH)
	go func() {
		resize()
		for range changed {
			resize()
		}
	}()
	return func() {
		signal.Stop(changed)
		close(changed)
	}
}

// rawTerminal hands what is typed at this terminal to the container as it is. It
// returns nil if this is no terminal; Reset undoes it.
func rawTerminal() console.Console {
	con, err := console.ConsoleFromFile(os.Stdin)
	if err != nil {
		return nil // not a terminal: as with `… </dev/null`
	}
	if err := con.SetRaw(); err != nil {
		return nil
	}
	return con
}

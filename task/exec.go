package task

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/errdefs"
	runc "github.com/containerd/go-runc"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/process"
)

// addExec notes a process to be started by startExec.
func (c *container) addExec(r *taskapi.ExecProcessRequest) error {
	var spec specs.Process
	if err := json.Unmarshal(r.Spec.GetValue(), &spec); err != nil {
		return invalid("exec %s: spec: %v", r.ExecID, err)
	}
	spec.Terminal = r.Terminal
	p := newProc(c, r.ExecID, process.Stdio{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal})
	p.spec = &spec
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.execs[r.ExecID] != nil {
		return fmt.Errorf("exec id %s: %w", r.ExecID, errdefs.ErrAlreadyExists)
	}
	if err := c.init.check(opExec); err != nil {
		return err
	}
	c.execs[r.ExecID] = p
	return nil
}

// startExec starts a process that addExec noted.
func (c *container) startExec(ctx context.Context, p *proc) (int, error) {
	ctx, release, err := c.shared(ctx)
	if err != nil {
		return 0, err
	}
	defer release()
	p.starting.Lock()
	defer p.starting.Unlock()

	c.mu.Lock()
	err = p.check(opStart)
	if err == nil && c.stopping {
		err = fmt.Errorf("container %s init process is not running: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	if err == nil {
		c.running.Add(1) // ends in live, or below
	}
	c.mu.Unlock()
	if err != nil {
		return 0, err
	}

	ctx, cancel := c.whileAlive(ctx)
	defer cancel()
	err = c.launchExec(ctx, p)
	c.mu.Lock()
	pid := p.pid()
	if pid != 0 {
		p.state = Running
	} else {
		p.abandon(process.Exit{Status: 255, At: time.Now()})
	}
	c.mu.Unlock()
	if pid != 0 {
		c.service.publish(&events.TaskExecStarted{ContainerID: c.id, ExecID: p.execID, Pid: uint32(pid)})
	} else {
		c.running.Done()
	}
	if err != nil {
		return 0, fmt.Errorf("exec %s in container %s: %w", p.execID, c.id, err)
	}
	return pid, nil
}

// launchExec has the runtime start the process. If it fails, there may be a
// process all the same, which is about to end.
func (c *container) launchExec(ctx context.Context, p *proc) error {
	pio, err := p.openIO(ctx, [3]bool{})
	if err != nil {
		return err
	}
	child, err := c.service.reaper.Launch(func() (int, error) {
		return c.runtime.Exec(ctx, p.execID, p.spec, &runc.ExecOpts{
			IO:            pio.Pipes(),
			ConsoleSocket: pio.ConsoleSocket(),
		})
	})
	if err != nil {
		pio.Close()
		return err
	}
	err = pio.Attach(ctx)
	p.adopt(child, pio)
	if err != nil {
		// A process nobody can talk to is of no use.
		_ = child.Signal(unix.SIGKILL)
	}
	return err
}

// deleteExec forgets a process that is not running.
func (c *container) deleteExec(ctx context.Context, p *proc) (process.Exit, error) {
	// After a start that is under way, and after the exit is published.
	p.starting.Lock()
	c.mu.Lock()
	err := p.check(opDelete)
	if err == nil && p.state == Created {
		p.abandon(process.Exit{})
	}
	c.mu.Unlock()
	p.starting.Unlock()
	if err != nil {
		return process.Exit{}, err
	}
	p.release(ctx)
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.execs, p.execID)
	return p.exit, nil
}

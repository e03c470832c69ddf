package task

import (
	"context"
	"fmt"
	"sync"

	"github.com/containerd/containerd/api/events"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/stasis-run/stasis/process"
)

// proc is one process of a container that containerd knows of: init, or an
// exec.
type proc struct {
	c      *container
	execID string // "" for init
	stdio  process.Stdio
	spec   *specs.Process // of an exec
	// before is what an init of a cold start executed when it was created: the OCI
	// runtime, which waits for Start.
	before process.Program

	// starting is held by a start until its event is published, and by who
	// publishes anything else of the process: the exit comes last.
	starting sync.Mutex
	exited   chan struct{} // closed after the exit is published, or will never be

	// c.mu guards the rest.
	state State
	child *process.Child // nil until there is a process
	io    *process.IO    // nil until then, mostly
	exit  process.Exit   // zero until state is Stopped
}

func newProc(c *container, execID string, stdio process.Stdio) *proc {
	return &proc{c: c, execID: execID, stdio: stdio, exited: make(chan struct{})}
}

// id is the process's name in events and answers.
func (p *proc) id() string {
	if p.execID == "" {
		return p.c.id
	}
	return p.execID
}

// kind is what the process is called in errors.
func (p *proc) kind() string {
	if p.execID == "" {
		return "container"
	}
	return "process"
}

// pid is the process's, 0 before there is one. c.mu is held.
func (p *proc) pid() int {
	if p.child == nil {
		return 0
	}
	return p.child.Pid
}

// check returns an error unless the process's state allows o. c.mu is held.
func (p *proc) check(o op) error {
	return p.state.check(o, p.kind(), p.id())
}

// abandon ends a process that never came to be. c.mu is held.
func (p *proc) abandon(exit process.Exit) {
	p.state, p.exit = Stopped, exit
	close(p.exited)
}

// openIO makes the process's streams; see process.IOConfig for pipes.
func (p *proc) openIO(ctx context.Context, pipes [3]bool) (*process.IO, error) {
	pio, err := process.OpenIO(ctx, p.stdio, process.IOConfig{
		ID:        p.id(),
		Namespace: p.c.namespace,
		UID:       int(p.c.options.IoUid),
		GID:       int(p.c.options.IoGid),
		Reaper:    p.c.service.reaper,
		Pipes:     pipes,
	})
	if err != nil {
		return nil, fmt.Errorf("connect the streams of %s %s: %w", p.kind(), p.id(), err)
	}
	return pio, nil
}

// adopt makes child the process's and has its life seen through. The streams
// are the process's from now on, whatever comes.
func (p *proc) adopt(child *process.Child, pio *process.IO) {
	c := p.c
	c.mu.Lock()
	p.child, p.io = child, pio
	c.mu.Unlock()
	if p.execID == "" {
		c.watch(child)
	}
	go p.live()
}

// live sees the process through to its end. It is the only place where an exit
// is recorded and published.
func (p *proc) live() {
	c := p.c
	<-p.child.Done()
	if p.execID == "" {
		c.initDied()
	}
	// A start that is under way publishes first.
	p.starting.Lock()
	defer p.starting.Unlock()
	if p.execID == "" {
		c.endExecs()
	}
	p.io.Hangup()

	exit := p.child.Exit()
	c.mu.Lock()
	p.state, p.exit = Stopped, exit
	c.mu.Unlock()
	if p.execID == "" {
		c.unwatch()
		if err := c.bundle.writeExit(exit.Pid, exit.Status, exit.At); err != nil {
			log.L.WithError(err).WithField("container", c.id).Warn("record the exit in the bundle")
		}
	}
	c.service.publish(&events.TaskExit{
		ContainerID: c.id,
		ID:          p.id(),
		Pid:         uint32(exit.Pid),
		ExitStatus:  uint32(exit.Status),
		ExitedAt:    timestamppb.New(exit.At),
	})
	close(p.exited)
	if p.execID != "" {
		c.running.Done()
	}
}

// kill sends a signal. It waits for no other call.
func (p *proc) kill(ctx context.Context, sig unix.Signal, all bool) error {
	c := p.c
	ctx, cancel := detach(ctx)
	defer cancel()
	c.mu.Lock()
	child, state, abort := p.child, p.state, c.abortStart
	c.mu.Unlock()
	finished := fmt.Errorf("%s %s: process already finished: %w", p.kind(), p.id(), errdefs.ErrNotFound)
	if state == Stopped && (!all || p.execID != "") {
		return finished
	}
	if p.execID != "" {
		if child == nil {
			return fmt.Errorf("process %s is not started: %w", p.id(), errdefs.ErrFailedPrecondition)
		}
		if err := child.Signal(sig); err == unix.ESRCH {
			return finished
		} else if err != nil {
			return fmt.Errorf("signal process %s: %w", p.id(), err)
		}
		return nil
	}
	if child == nil {
		if abort != nil && (sig == unix.SIGKILL || sig == unix.SIGTERM) {
			// A restore in progress has no process to signal yet.
			abort()
			return nil
		}
		return fmt.Errorf("container %s has no process yet: %w", p.id(), errdefs.ErrNotFound)
	}
	err := c.runtime.Kill(ctx, sig, all)
	if err == nil {
		return nil
	}
	if child.Exited() {
		return finished
	}
	return fmt.Errorf("kill container %s: %w", c.id, err)
}

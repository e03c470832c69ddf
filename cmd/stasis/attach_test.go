package main

import (
	"context"
	"io"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/client"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/node"
)

// signalled is a task that notes what signals it gets.
type signalled struct {
	client.Task
	signals chan syscall.Signal
}

func (t *signalled) Kill(_ context.Context, s syscall.Signal, _ ...client.KillOpts) error {
	t.signals <- s
	return nil
}

// TestSignalsOfAttached sends signals between the start of a container that is attached
// and what follows, and then: the container gets them.
func TestSignalsOfAttached(t *testing.T) {
	r := &node.RestoreRequest{}
	at := (&app{out: newOutput(io.Discard, nil)}).attachTo(r)
	task := &signalled{signals: make(chan syscall.Signal, 9)}
	r.IO(false)
	r.Starting(task)
	if err := unix.Kill(unix.Getpid(), unix.SIGHUP); err != nil {
		t.Fatal(err)
	}
	stop := forwardSignals(t.Context(), task, at.signals)
	if s := <-task.signals; s != unix.SIGHUP {
		t.Errorf("it got %v first", s)
	}
	if err := unix.Kill(unix.Getpid(), unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if s := <-task.signals; s != unix.SIGTERM {
		t.Errorf("it got %v then", s)
	}
	stop()
}

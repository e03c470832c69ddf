package main

import (
	"context"
	"errors"
	"slices"
	"sync"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/client"
	"golang.org/x/sys/unix"
)

// startedTask is a task that does something while it starts.
type startedTask struct {
	client.Task
	start func()

	mu     sync.Mutex
	killed []syscall.Signal
	some   chan struct{} // takes one message for each
}

func (t *startedTask) Start(context.Context) error {
	t.start()
	return nil
}

func (t *startedTask) Kill(_ context.Context, s syscall.Signal, _ ...client.KillOpts) error {
	t.mu.Lock()
	t.killed = append(t.killed, s)
	t.mu.Unlock()
	t.some <- struct{}{}
	return nil
}

func (t *startedTask) check(tt *testing.T, want ...syscall.Signal) {
	tt.Helper()
	t.mu.Lock()
	defer t.mu.Unlock()
	if !slices.Equal(t.killed, want) {
		tt.Errorf("the container got %v, want %v", t.killed, want)
	}
}

// TestSignalsOfRestore sends signals at each moment of a restore with --attach: they
// undo it, or the container gets them.
func TestSignalsOfRestore(t *testing.T) {
	t.Run("while it starts", func(t *testing.T) {
		ctx, interrupt := context.WithCancel(t.Context())
		task := &startedTask{some: make(chan struct{}, 9)}
		task.start = func() {
			interrupt()
			<-task.some
		}
		if err := startTask(ctx, task); !errors.Is(err, context.Canceled) {
			t.Errorf("error %v", err)
		}
		task.check(t, unix.SIGKILL)
	})
	t.Run("between its start and what follows", func(t *testing.T) {
		ctx, interrupt := context.WithCancel(t.Context())
		defer interrupt()
		task := &startedTask{some: make(chan struct{}, 9), start: func() {}}
		signals := catchSignals()
		if err := startTask(ctx, task); err != nil {
			t.Fatal(err)
		}
		// As main's context ends with it, too.
		if err := unix.Kill(unix.Getpid(), unix.SIGHUP); err != nil {
			t.Fatal(err)
		}
		interrupt()
		task.check(t)
		stop := forwardSignals(t.Context(), task, signals)
		<-task.some
		if err := unix.Kill(unix.Getpid(), unix.SIGTERM); err != nil {
			t.Fatal(err)
		}
		<-task.some
		stop()
		task.check(t, unix.SIGHUP, unix.SIGTERM)
	})
}

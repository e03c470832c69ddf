package node

import (
	"context"
	"errors"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/client"
	"golang.org/x/sys/unix"
)

// startedTask is a task that does something while it starts.
type startedTask struct {
	client.Task
	start  func()
	killed chan syscall.Signal
}

func (t *startedTask) Start(context.Context) error {
	t.start()
	return nil
}

func (t *startedTask) Kill(_ context.Context, s syscall.Signal, _ ...client.KillOpts) error {
	t.killed <- s
	return nil
}

// A restore that is interrupted while its task starts ends that.
func TestStartTask(t *testing.T) {
	ctx, interrupt := context.WithCancel(t.Context())
	task := &startedTask{killed: make(chan syscall.Signal, 9)}
	task.start = func() {
		interrupt()
		if s := <-task.killed; s != unix.SIGKILL {
			t.Errorf("it got %v", s)
		}
	}
	if err := startTask(ctx, task); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	task.start = func() {}
	if err := startTask(t.Context(), task); err != nil || len(task.killed) > 0 {
		t.Errorf("%v, and %d signals", err, len(task.killed))
	}
}

// TestLastBytes: of what a container's program prints, no more than the end is kept.
func TestLastBytes(t *testing.T) {
	l := &lastBytes{}
	for _, part := range []string{strings.Repeat("a", 3*maxLastBytes), "b", strings.Repeat("c", maxLastBytes-2), "d"} {
		if n, err := l.Write([]byte(part)); n != len(part) || err != nil {
			t.Errorf("%d, %v", n, err)
		}
		if got := len(l.String()); got > maxLastBytes {
			t.Errorf("%d bytes are kept", got)
		}
	}
	if want := "b" + strings.Repeat("c", maxLastBytes-2) + "d"; l.String() != want {
		t.Errorf("%.20q…", l.String())
	}
}

package integration

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"

	"github.com/stasis-run/stasis/integration/stack"
)

// answerTime is how long State, Wait, Pids and Connect may take, whatever else
// the shim does: as long as containerd waits for State if its configuration says
// nothing else. The runtime is held for longer, so who waits for it is late on any
// machine. The best of several answers counts, as a machine may be busy.
const answerTime = 2 * time.Second

// TestQueriesAnswerAtOnce asks the shim while the runtime is held in each of its
// commands, about the container that it is held for and about another one.
func TestQueriesAnswerAtOnce(t *testing.T) {
	s := newScene(t, stack.Options{})
	group := oci.WithAnnotations(map[string]string{"io.containerd.runc.v2.group": "g"})
	other := s.running("other", group)
	ended := s.exec(other, "ended", "true")
	s.must("start exec", ended.Start(s.ctx))
	s.waitFor(s.ctx, "exit", "other", "ended")
	shim, _ := s.shim(other)

	held := func(command string, when stack.When, id string, exists bool, call func() error) {
		t.Helper()
		h := s.hold(command, when, call)
		s.answers(shim, command, "other", "ended", true)
		s.answers(shim, command, id, "", exists)
		h.waiting()
		s.must(command, h.release())
	}
	c := s.container("c", group)
	dir := filepath.Join(s.Dir, "checkpoint")
	held("create", stack.Before, "c", false, func() error { return c.Create(s.ctx) })
	held("start", stack.Before, "c", true, func() error { return c.Task.Start(s.ctx) })
	p := s.exec(c, "e", "sleep", "1000")
	held("exec", stack.Before, "c", true, func() error { return p.Start(s.ctx) })
	held("pause", stack.Before, "c", true, func() error { return c.Task.Pause(s.ctx) })
	s.must("resume", c.Task.Resume(s.ctx))
	held("checkpoint", stack.During("Dumping task"), "c", true, func() error { return c.CheckpointErr(s.ctx, dir, nil) })
	held("kill", stack.Before, "c", true, func() error { return c.Task.Kill(s.ctx, 9) })
	c.Wait(s.ctx)
	held("delete", stack.Before, "c", true, func() error {
		_, err := c.Task.Delete(s.ctx)
		return err
	})
	held("restore", stack.During("Restoring"), "c", true, func() error { return c.RestoreErr(s.ctx, dir) })
	s.end(c)
	s.end(other)
}

// answers asks the shim about a container, and about an exec that has ended if
// one is named.
func (s *scene) answers(shim taskapi.TTRPCTaskService, held, id, ended string, exists bool) {
	s.t.Helper()
	calls := map[string]func(context.Context) error{
		"State": func(ctx context.Context) error {
			_, err := shim.State(ctx, &taskapi.StateRequest{ID: id})
			return err
		},
		"Pids": func(ctx context.Context) error {
			_, err := shim.Pids(ctx, &taskapi.PidsRequest{ID: id})
			return err
		},
		"Connect": func(ctx context.Context) error {
			r, err := shim.Connect(ctx, &taskapi.ConnectRequest{ID: id})
			if err == nil && r.ShimPid == 0 {
				err = fmt.Errorf("no pid of the shim: %v", r)
			}
			return err
		},
	}
	if ended != "" {
		calls["Wait"] = func(ctx context.Context) error {
			_, err := shim.Wait(ctx, &taskapi.WaitRequest{ID: id, ExecID: ended})
			return err
		}
	}
	for name, call := range calls {
		var times []time.Duration
		for range 5 {
			ctx, cancel := context.WithTimeout(s.ctx, stack.Patience(10*time.Second))
			begin := time.Now()
			err := call(ctx)
			cancel()
			times = append(times, time.Since(begin))
			// Pids have an error of their own for a container without any.
			if err != nil && !(name == "Pids" && errdefs.IsFailedPrecondition(native(err))) &&
				(exists || !errdefs.IsNotFound(native(err))) {
				s.t.Errorf("%s of %s while %s is held: %v", name, id, held, err)
			}
			if slices.Min(times) < answerTime {
				break
			}
		}
		if best := slices.Min(times); best >= answerTime {
			s.t.Errorf("%s of %s while %s is held took %v", name, id, held, best)
		}
	}
}

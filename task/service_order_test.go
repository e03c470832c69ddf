package task

import (
	"context"
	"slices"
	"testing"

	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/process/processtest"
)

// asyncStart starts a process beside the test.
func (f *fixture) asyncStart(execID string) <-chan error {
	return async(func() error {
		_, err := f.s.Start(f.Context(), &taskapi.StartRequest{ID: "c", ExecID: execID})
		return err
	})
}

// stopAfter and stopBefore hold the runtime's next call of op.
func (f *fixture) stopAfter(op processtest.Op) *processtest.Point {
	p := processtest.NewPoint(f)
	f.rt.After(op, p.Stop)
	return p
}

func (f *fixture) stopBefore(op processtest.Op) *processtest.Point {
	p := processtest.NewPoint(f)
	f.rt.Before(op, p.Stop)
	return p
}

// TestExitAfterStart: a process that ends while it is started, or created, is heard of
// after that.
func TestExitAfterStart(t *testing.T) {
	for _, tc := range []struct {
		event, execID, exit string
		arrange             func(*fixture)
		want                []string
	}{
		{"create", "", "exit c 1", (*fixture).create, []string{"create", "exit c 1"}}, // of sh, whose read has failed
		{"start", "", "exit c 0", (*fixture).run, []string{"create", "start", "exit c 0"}},
		{"exec-started e", "e", "exit e 0", func(f *fixture) { f.run(); f.exec("e") },
			[]string{"create", "start", "exec-added e", "exec-started e", "exit e 0"}},
	} {
		t.Run(tc.event, func(t *testing.T) {
			f := newFixture(t)
			f.log.before = func(line string) {
				if line == tc.event {
					f.rt.End(tc.execID)
					f.isHeldBack(tc.exit, forALock)
				}
			}
			tc.arrange(f)
			f.await(tc.exit)
			f.wantEvents(tc.want...)
		})
	}
}

// TestStartOfTheDead: init that has died before Start is not started.
func TestStartOfTheDead(t *testing.T) {
	f := newFixture(t)
	f.create()
	f.rt.End("")
	f.await("exit c 1")
	if _, err := f.s.Start(t.Context(), &taskapi.StartRequest{ID: "c"}); outcome(err, Stopped) != isRefused {
		t.Errorf("start: %v", err)
	}
	if slices.Contains(f.rt.Calls(), "start") {
		t.Errorf("calls %q", f.rt.Calls())
	}
}

// TestInitExitsLast: what init leaves is ended, and heard of before init. No exec starts
// meanwhile.
func TestInitExitsLast(t *testing.T) {
	f := newFixture(t)
	f.log.before = func(line string) {
		if line == "exit a 137" {
			f.isHeldBack("exit c 0", forAnother)
		}
	}
	f.run()
	f.exec("a")
	must(t, f.addExec("late"))
	point := f.stopBefore(processtest.Kill)
	f.rt.End("")
	point.Wait() // init has died, and a is about to be killed
	calls := f.rt.Calls()
	if want := "kill 9 all"; calls[len(calls)-1] != want {
		t.Errorf("%q; want %q", calls, want)
	}
	_, err := f.s.Start(t.Context(), &taskapi.StartRequest{ID: "c", ExecID: "late"})
	if !errdefs.IsFailedPrecondition(err) || slices.Contains(f.rt.Calls(), "exec late") {
		t.Errorf("an exec after init's death: %v; calls %q", err, f.rt.Calls())
	}
	f.wantStatus("", tasktypes.Status_RUNNING) // until its exit is published
	point.Release(nil)
	f.await("exit c 0")
	f.wantEvents("create", "start", "exec-added a", "exec-started a", "exec-added late", "exit a 137", "exit c 0")
	if _, err := f.delete(""); err != nil {
		t.Fatal(err)
	}
	f.nothingLeft()
}

// TestExecUnderWayWhenInitDies: it either starts and is heard of before init's exit, or
// is cut off and never heard of.
func TestExecUnderWayWhenInitDies(t *testing.T) {
	t.Run("started", func(t *testing.T) {
		f := newFixture(t)
		f.run()
		must(t, f.addExec("e"))
		point := f.stopAfter(processtest.Exec)
		started := f.asyncStart("e")
		point.Wait()
		f.rt.End("")
		f.reaped("")
		point.Release(nil)
		must(t, <-started)
		f.await("exit c 0")
		if got := f.log.all(); !slices.Equal(got[3:], []string{"exec-started e", "exit e 137", "exit c 0"}) {
			t.Errorf("events %q", got)
		}
	})
	t.Run("hangs", func(t *testing.T) {
		f := newFixture(t)
		f.run()
		must(t, f.addExec("e"))
		point := f.stopBefore(processtest.Exec)
		started := f.asyncStart("e")
		point.Wait()
		f.rt.End("")
		if err := <-started; err == nil {
			t.Error("it has started")
		}
		f.await("exit c 0")
		f.wantEvents("create", "start", "exec-added e", "exit c 0")
		f.wantStatus("e", tasktypes.Status_STOPPED)
		if st, err := f.s.Wait(t.Context(), &taskapi.WaitRequest{ID: "c", ExecID: "e"}); err != nil || st.ExitStatus != 255 {
			t.Errorf("wait: %v, %v", st, err)
		}
	})
}

// TestNothingAfterExit: init that dies while it is paused is not said to be paused
// after its exit.
func TestNothingAfterExit(t *testing.T) {
	f := newFixture(t)
	f.run()
	f.rt.Group = "" // the runtime's pause then does nothing, and succeeds
	f.rt.Before(processtest.Pause, func(context.Context) error {
		f.rt.End("")
		f.await("exit c 0")
		return nil
	})
	must(t, pauseOf(t.Context(), f))
	f.wantEvents("create", "start", "exit c 0")
	f.wantStatus("", tasktypes.Status_STOPPED)
}

// TestExitIsRecorded: by Wait and Delete, and in the bundle for Cleanup.
func TestExitIsRecorded(t *testing.T) {
	f := newFixture(t)
	f.run()
	pid := f.rt.Pid("")
	waited := async(func() error {
		r, err := f.s.Wait(f.Context(), &taskapi.WaitRequest{ID: "c"})
		if err == nil && (r.ExitStatus != 128+15 || r.ExitedAt.AsTime().IsZero()) {
			t.Errorf("wait: %v", r)
		}
		return err
	})
	must(t, f.kill(uint32(unix.SIGTERM)))
	must(t, <-waited)
	exit, err := bundle(f.bundle).readExit()
	if err != nil || exit.Pid != pid || exit.Status != 128+15 {
		t.Errorf("in the bundle: %+v, %v", exit, err)
	}
	r, err := f.delete("")
	if err != nil || int(r.Pid) != pid || r.ExitStatus != 128+15 {
		t.Errorf("delete: %v, %v", r, err)
	}
	if got := f.log.all(); got[len(got)-1] != "delete" {
		t.Errorf("events %q", got)
	}
	if _, err := f.delete(""); !errdefs.IsNotFound(err) {
		t.Errorf("a second delete: %v", err)
	}
	f.nothingLeft()
}

// TestCallsAnswerAtOnce: queries and Kill, while another call holds the container.
func TestCallsAnswerAtOnce(t *testing.T) {
	f := newFixture(t)
	f.run()
	point := f.stopBefore(processtest.Checkpoint)
	dumped := async(func() error {
		_, err := f.s.Checkpoint(f.Context(), &taskapi.CheckpointTaskRequest{ID: "c", Path: f.TempDir()})
		return err
	})
	point.Wait()
	f.wantStatus("", tasktypes.Status_RUNNING)
	must(t, f.kill(23))
	if _, err := f.s.Pids(t.Context(), &taskapi.PidsRequest{ID: "c"}); err != nil {
		t.Error(err)
	}
	if _, err := f.s.Connect(t.Context(), &taskapi.ConnectRequest{ID: "c"}); err != nil {
		t.Error(err)
	}
	// An exec may be noted, but does not start in the middle of a dump.
	must(t, f.addExec("e"))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := f.s.Start(ctx, &taskapi.StartRequest{ID: "c", ExecID: "e"}); outcome(err, Created) != isQueued {
		t.Errorf("an exec starts in the middle of a dump: %v", err)
	}
	point.Release(nil)
	must(t, <-dumped)
	f.start("e")
}

// TestRequestOutlivesConnection: what a call has begun goes on when containerd goes away.
func TestRequestOutlivesConnection(t *testing.T) {
	f := newFixture(t)
	f.create()
	point := f.stopBefore(processtest.Start)
	ctx, disconnect := context.WithCancel(t.Context())
	started := async(func() error {
		_, err := f.s.Start(ctx, &taskapi.StartRequest{ID: "c"})
		return err
	})
	point.Wait()
	disconnect()
	point.Release(nil)
	must(t, <-started)
	f.wantStatus("", tasktypes.Status_RUNNING)
}

// TestExecsStartSideBySide: one that hangs keeps no other from starting.
func TestExecsStartSideBySide(t *testing.T) {
	f := newFixture(t)
	f.run()
	must(t, f.addExec("hangs"))
	point := f.stopBefore(processtest.Exec)
	started := f.asyncStart("hangs")
	point.Wait()
	f.exec("other")
	f.wantStatus("other", tasktypes.Status_RUNNING)
	f.wantStatus("hangs", tasktypes.Status_CREATED)
	point.Release(nil)
	must(t, <-started)
}

// TestShutdown ends the shim with its last container only.
func TestShutdown(t *testing.T) {
	f := newFixture(t)
	f.run()
	shutdown := func() {
		t.Helper()
		_, err := f.s.Shutdown(t.Context(), &taskapi.ShutdownRequest{ID: "c"})
		must(t, err)
	}
	shutdown()
	f.wantEvents("create", "start")
	f.rt.End("")
	f.await("exit c 0")
	point := f.stopBefore(processtest.Delete)
	deleted := async(func() error { _, err := f.delete(""); return err })
	point.Wait()
	shutdown() // containerd has lost patience with the Delete
	f.wantEvents("create", "start", "exit c 0")
	point.Release(nil)
	must(t, <-deleted)
	f.wantEvents("create", "start", "exit c 0", "delete", "shutdown")
}

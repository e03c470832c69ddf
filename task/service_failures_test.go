package task

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/stasis-run/stasis/process/processtest"
)

var errTest = errors.New("runtime is broken")

func fails(context.Context) error { return errTest }

// TestRuntimeFails: a call of the runtime that fails leaves the state as it was, nothing
// is published, and the same request succeeds when the runtime is well again.
func TestRuntimeFails(t *testing.T) {
	for _, tc := range []struct {
		op      processtest.Op
		arrange func(*fixture)
		do      func(*fixture) error
		state   tasktypes.Status
	}{
		{processtest.Start, (*fixture).create, func(f *fixture) error {
			_, err := f.s.Start(f.Context(), &taskapi.StartRequest{ID: "c"})
			return err
		}, tasktypes.Status_CREATED},
		{processtest.Pause, (*fixture).run, func(f *fixture) error { return pauseOf(f.Context(), f) }, tasktypes.Status_RUNNING},
		{processtest.Update, (*fixture).run, func(f *fixture) error {
			_, err := f.s.Update(f.Context(), &taskapi.UpdateTaskRequest{ID: "c", Resources: &anypb.Any{Value: []byte("{}")}})
			return err
		}, tasktypes.Status_RUNNING},
		{processtest.Kill, (*fixture).run, func(f *fixture) error { return f.kill(23) }, tasktypes.Status_RUNNING},
		{processtest.Checkpoint, (*fixture).run, func(f *fixture) error {
			_, err := f.s.Checkpoint(f.Context(), &taskapi.CheckpointTaskRequest{ID: "c", Path: filepath.Join(f.bundle, "checkpoint")})
			return err
		}, tasktypes.Status_RUNNING},
		{processtest.Delete, initStates[Stopped], func(f *fixture) error { _, err := f.delete(""); return err }, tasktypes.Status_STOPPED},
	} {
		t.Run(string(tc.op), func(t *testing.T) {
			f := newFixture(t)
			tc.arrange(f)
			published := f.log.all()
			f.rt.Before(tc.op, fails)
			if err := tc.do(f); !errors.Is(err, errTest) {
				t.Fatalf("%v; want the runtime's error", err)
			}
			f.wantStatus("", tc.state)
			f.wantEvents(published...)
			if tc.state == tasktypes.Status_RUNNING && f.frozen() {
				t.Error("it is frozen")
			}
			f.rt.Before(tc.op, nil)
			if err := tc.do(f); err != nil {
				t.Errorf("again: %v", err)
			}
		})
	}
}

// TestCreateFails leaves nothing, and the ID is free.
func TestCreateFails(t *testing.T) {
	for name, tc := range map[string]struct {
		breakIt func(*fixture, *taskapi.CreateTaskRequest)
		mend    func(*fixture, *taskapi.CreateTaskRequest)
		says    string
		class   func(error) bool
	}{
		"runtime": {
			func(f *fixture, r *taskapi.CreateTaskRequest) { f.rt.Before(processtest.Create, fails) },
			func(f *fixture, r *taskapi.CreateTaskRequest) { f.rt.Before(processtest.Create, nil) }, errTest.Error(), nil},
		"streams, before there is a process": {
			func(f *fixture, r *taskapi.CreateTaskRequest) { r.Stdout = "ftp://x" },
			func(f *fixture, r *taskapi.CreateTaskRequest) { r.Stdout = "" }, "unknown scheme", nil},
		"streams, with a process": {
			func(f *fixture, r *taskapi.CreateTaskRequest) { r.Stdout = filepath.Join(f.bundle, "none") },
			func(f *fixture, r *taskapi.CreateTaskRequest) { r.Stdout = "" }, "open output", nil},
		"no config": {
			func(f *fixture, r *taskapi.CreateTaskRequest) {
				must(f.T, os.Remove(filepath.Join(f.bundle, "config.json")))
			},
			func(f *fixture, r *taskapi.CreateTaskRequest) { f.createRequest() }, "no config.json", errdefs.IsInvalidArgument},
		"bundle": {
			func(f *fixture, r *taskapi.CreateTaskRequest) { r.Bundle = "bundle" },
			func(f *fixture, r *taskapi.CreateTaskRequest) { r.Bundle = f.bundle }, "absolute", errdefs.IsInvalidArgument},
		"id": {
			func(f *fixture, r *taskapi.CreateTaskRequest) { r.ID = "../c" },
			func(f *fixture, r *taskapi.CreateTaskRequest) { r.ID = "c" }, "container id", errdefs.IsInvalidArgument},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			r := f.createRequest()
			tc.breakIt(f, r)
			_, err := f.s.Create(t.Context(), r)
			if err == nil || !strings.Contains(err.Error(), tc.says) || tc.class != nil && !tc.class(err) {
				t.Fatalf("%v; want an error that says %q", err, tc.says)
			}
			f.wantEvents()
			f.nothingLeft()
			tc.mend(f, r)
			if _, err := f.s.Create(t.Context(), r); err != nil {
				t.Errorf("again: %v", err)
			}
			f.wantStatus("", tasktypes.Status_CREATED)
		})
	}
}

// TestPauseFailsLate: a runtime that has frozen the container, and fails then, leaves it
// running.
func TestPauseFailsLate(t *testing.T) {
	f := newFixture(t)
	f.run()
	f.rt.After(processtest.Pause, func(context.Context) error {
		if !f.frozen() {
			t.Error("it was not frozen, so this tests nothing")
		}
		return errTest
	})
	if err := pauseOf(t.Context(), f); !errors.Is(err, errTest) {
		t.Errorf("%v", err)
	}
	if f.frozen() {
		t.Error("it is frozen")
	}
	f.wantStatus("", tasktypes.Status_RUNNING)
	f.wantEvents("create", "start")
}

// TestExecFails: an exec that cannot be started is stopped, was never heard of, and does
// not keep init's exit back.
func TestExecFails(t *testing.T) {
	for name, breakIt := range map[string]func(*fixture){
		"runtime": func(f *fixture) { f.rt.Before(processtest.Exec, fails) },
		"late":    func(f *fixture) { f.rt.After(processtest.Exec, fails) },
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			f.run()
			must(t, f.addExec("e"))
			breakIt(f)
			if _, err := f.s.Start(t.Context(), &taskapi.StartRequest{ID: "c", ExecID: "e"}); !errors.Is(err, errTest) {
				t.Fatalf("%v", err)
			}
			f.wantStatus("e", tasktypes.Status_STOPPED)
			if r, err := f.delete("e"); err != nil || r.ExitStatus != 255 {
				t.Errorf("delete: %v, %v", r, err)
			}
			f.rt.End("")
			f.await("exit c 0")
			f.wantEvents("create", "start", "exec-added e", "exit c 0")
		})
	}
}

// TestExecWithoutStreams: a process that nobody can talk to is ended, and heard of, as it
// was there.
func TestExecWithoutStreams(t *testing.T) {
	f := newFixture(t)
	f.run()
	_, err := f.s.Exec(t.Context(), &taskapi.ExecProcessRequest{ID: "c", ExecID: "e", Spec: &anypb.Any{Value: []byte(`{"args": ["cat"]}`)},
		Stdout: filepath.Join(f.bundle, "none")})
	must(t, err)
	if _, err := f.s.Start(t.Context(), &taskapi.StartRequest{ID: "c", ExecID: "e"}); err == nil {
		t.Error("it has started")
	}
	f.await("exit e 137")
	f.wantEvents("create", "start", "exec-added e", "exec-started e", "exit e 137")
}

// TestKillOfAContainerThatEnds has finished, whatever the runtime says of it.
func TestKillOfAContainerThatEnds(t *testing.T) {
	f := newFixture(t)
	f.run()
	var once sync.Once // the service kills what init leaves, too
	f.rt.Before(processtest.Kill, func(context.Context) (err error) {
		once.Do(func() {
			f.rt.End("")
			f.reaped("")
			err = errTest // as runc says: the container is not running
		})
		return err
	})
	if err := f.kill(15); !errdefs.IsNotFound(err) {
		t.Errorf("%v; want that it has finished", err)
	}
}

// TestOutputReachesTheClient by way of the runtime's pipes.
func TestOutputReachesTheClient(t *testing.T) {
	f := newFixture(t)
	r := f.createRequest()
	out := filepath.Join(f.bundle, "out")
	r.Stdout = "file://" + out
	_, err := f.s.Create(t.Context(), r)
	must(t, err)
	f.start("")
	f.rt.Write("", "hello\n")
	f.rt.End("")
	f.await("exit c 0")
	if _, err := f.delete(""); err != nil { // which drains the output
		t.Fatal(err)
	}
	data, err := os.ReadFile(out)
	if err != nil || string(data) != "hello\n" {
		t.Errorf("output %q, %v", data, err)
	}
	if !slices.Contains(f.rt.Calls(), "delete") {
		t.Errorf("calls %q", f.rt.Calls())
	}
}

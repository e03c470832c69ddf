package task

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/stasis-run/stasis/process/processtest"
)

// initStates bring a container into each state.
var initStates = map[State]func(*fixture){
	Created: (*fixture).create,
	Running: (*fixture).run,
	Pausing: func(f *fixture) {
		f.run()
		point := processtest.NewPoint(f)
		f.rt.Before(processtest.Pause, point.Stop)
		done := async(func() error { return pauseOf(f.Context(), f) })
		f.Cleanup(func() { <-done })
		point.Wait()
	},
	Paused: func(f *fixture) {
		f.run()
		must(f.T, pauseOf(f.Context(), f))
	},
	Stopped: func(f *fixture) {
		f.run()
		f.rt.End("")
		f.await("exit c 0")
	},
}

func pauseOf(ctx context.Context, f *fixture) error {
	_, err := f.s.Pause(ctx, &taskapi.PauseRequest{ID: "c"})
	return err
}

// What an operation comes to.
const (
	isOK       = "ok"
	isRefused  = "refused" // with words that name the state; and nothing has changed
	isNotFound = "not found"
	isQueued   = "queued" // behind another call, until its context ends
	isWaiting  = "waits"  // for the process to end, until its context ends
	isEmpty    = "has no process"
)

// TestStates tries each operation in each state of init.
func TestStates(t *testing.T) {
	states := []State{Created, Running, Pausing, Paused, Stopped}
	for _, o := range []struct {
		name string
		do   func(context.Context, *fixture) error
		want [5]string // by state
		then string    // the state after, if it is another
	}{
		{"start", func(ctx context.Context, f *fixture) error {
			_, err := f.s.Start(ctx, &taskapi.StartRequest{ID: "c"})
			return err
		}, [5]string{isOK, isRefused, isQueued, isRefused, isRefused}, "RUNNING"},
		{"pause", pauseOf, [5]string{isRefused, isOK, isQueued, isRefused, isRefused}, "PAUSED"},
		{"resume", func(ctx context.Context, f *fixture) error {
			_, err := f.s.Resume(ctx, &taskapi.ResumeRequest{ID: "c"})
			return err
		}, [5]string{isRefused, isRefused, isQueued, isOK, isRefused}, "RUNNING"},
		{"checkpoint", func(ctx context.Context, f *fixture) error {
			_, err := f.s.Checkpoint(ctx, &taskapi.CheckpointTaskRequest{ID: "c", Path: filepath.Join(f.TempDir(), "x")})
			return err
		}, [5]string{isRefused, isOK, isQueued, isOK, isRefused}, ""},
		{"update", func(ctx context.Context, f *fixture) error {
			_, err := f.s.Update(ctx, &taskapi.UpdateTaskRequest{ID: "c", Resources: &anypb.Any{Value: []byte("{}")}})
			return err
		}, [5]string{isOK, isOK, isQueued, isOK, isRefused}, ""},
		{"exec", func(_ context.Context, f *fixture) error { return f.addExec("e") },
			[5]string{isOK, isOK, isRefused, isRefused, isRefused}, ""},
		{"kill", func(_ context.Context, f *fixture) error { return f.kill(23) }, // SIGURG, which cat ignores
			[5]string{isOK, isOK, isOK, isOK, isNotFound}, ""},
		{"delete", func(ctx context.Context, f *fixture) error {
			_, err := f.s.Delete(ctx, &taskapi.DeleteRequest{ID: "c"})
			return err
		}, [5]string{isOK, isRefused, isQueued, isRefused, isOK}, "gone"},
		{"resize", func(ctx context.Context, f *fixture) error {
			_, err := f.s.ResizePty(ctx, &taskapi.ResizePtyRequest{ID: "c"})
			return err
		}, [5]string{isOK, isOK, isOK, isOK, isOK}, ""},
		{"close io", func(ctx context.Context, f *fixture) error {
			_, err := f.s.CloseIO(ctx, &taskapi.CloseIORequest{ID: "c"})
			return err
		}, [5]string{isOK, isOK, isOK, isOK, isOK}, ""},
		{"wait", func(ctx context.Context, f *fixture) error {
			_, err := f.s.Wait(ctx, &taskapi.WaitRequest{ID: "c"})
			return err
		}, [5]string{isWaiting, isWaiting, isWaiting, isWaiting, isOK}, ""},
		{"pids", func(ctx context.Context, f *fixture) error {
			r, err := f.s.Pids(ctx, &taskapi.PidsRequest{ID: "c"})
			if err == nil && (len(r.Processes) != 1 || int(r.Processes[0].Pid) != f.rt.Pid("")) {
				err = fmt.Errorf("pids %v, want %d", r.Processes, f.rt.Pid(""))
			}
			return err
		}, [5]string{isOK, isOK, isOK, isOK, isEmpty}, ""},
		{"stats", func(ctx context.Context, f *fixture) error {
			_, err := f.s.Stats(ctx, &taskapi.StatsRequest{ID: "c"})
			return err
		}, [5]string{isOK, isOK, isOK, isOK, isOK}, ""},
		{"connect", func(ctx context.Context, f *fixture) error {
			r, err := f.s.Connect(ctx, &taskapi.ConnectRequest{ID: "c"})
			if err == nil && int(r.TaskPid) != f.rt.Pid("") {
				err = fmt.Errorf("pid %d, want %d", r.TaskPid, f.rt.Pid(""))
			}
			return err
		}, [5]string{isOK, isOK, isOK, isOK, isOK}, ""},
	} {
		for _, state := range states {
			t.Run(o.name+" "+state.String(), func(t *testing.T) {
				f := newFixture(t)
				initStates[state](f)
				f.wantStatus("", state.status())
				want := o.want[state]
				calls, published := f.rt.Calls(), f.log.all()
				ctx, cancel := context.WithCancel(t.Context())
				if want == isQueued || want == isWaiting {
					cancel() // it would wait for ever
				}
				err := o.do(ctx, f)
				cancel()
				if got := outcome(err, state); got != want {
					t.Fatalf("%s: %v; want %s", got, err, want)
				}
				switch {
				case want != isOK && (!slices.Equal(f.rt.Calls(), calls) || !slices.Equal(f.log.all(), published)):
					t.Errorf("it came to nothing, and the runtime was called or an event published: %q, %q", f.rt.Calls(), f.log.all())
				case want == isOK && o.then == "gone":
					_, err := f.s.State(t.Context(), &taskapi.StateRequest{ID: "c"})
					if !errdefs.IsNotFound(err) {
						t.Errorf("state: %v", err)
					}
					f.nothingLeft()
				case want == isOK && o.then != "":
					f.wantStatus("", tasktypes.Status(tasktypes.Status_value[o.then]))
				default:
					f.wantStatus("", state.status())
				}
				if want == isOK && (o.name == "pause" || o.name == "resume") && f.frozen() != (o.name == "pause") {
					t.Errorf("frozen: %t", f.frozen())
				}
			})
		}
	}
}

// outcome names what an operation in a state came to.
func outcome(err error, state State) string {
	switch {
	case err == nil:
		return isOK
	case errors.Is(err, context.Canceled) && strings.Contains(err.Error(), "busy"):
		return isQueued
	case errors.Is(err, context.Canceled):
		return isWaiting
	case errdefs.IsNotFound(err):
		return isNotFound
	case errdefs.IsFailedPrecondition(err) && strings.Contains(err.Error(), isEmpty):
		return isEmpty
	case strings.HasPrefix(err.Error(), "cannot ") && strings.HasSuffix(err.Error(), " is "+state.String()):
		return isRefused
	}
	return "failed"
}

// TestExecStates tries each operation on an exec in each of its states.
func TestExecStates(t *testing.T) {
	states := map[State]func(*fixture){
		Created: func(f *fixture) { f.run(); must(f.T, f.addExec("e")) },
		Running: func(f *fixture) { f.run(); f.exec("e") },
		Stopped: func(f *fixture) { f.run(); f.exec("e"); f.rt.End("e"); f.await("exit e 0") },
	}
	for _, o := range []struct {
		name string
		do   func(context.Context, *fixture) error
		want map[State]string
	}{
		{"start", func(ctx context.Context, f *fixture) error {
			_, err := f.s.Start(ctx, &taskapi.StartRequest{ID: "c", ExecID: "e"})
			return err
		}, map[State]string{Created: isOK, Running: isRefused, Stopped: isRefused}},
		{"kill", func(ctx context.Context, f *fixture) error {
			_, err := f.s.Kill(ctx, &taskapi.KillRequest{ID: "c", ExecID: "e", Signal: 23})
			return err
		}, map[State]string{Created: "failed", Running: isOK, Stopped: isNotFound}},
		{"resize", func(ctx context.Context, f *fixture) error {
			_, err := f.s.ResizePty(ctx, &taskapi.ResizePtyRequest{ID: "c", ExecID: "e"})
			return err
		}, map[State]string{Created: isOK, Running: isOK, Stopped: isRefused}},
		{"delete", func(ctx context.Context, f *fixture) error {
			_, err := f.s.Delete(ctx, &taskapi.DeleteRequest{ID: "c", ExecID: "e"})
			return err
		}, map[State]string{Created: isOK, Running: isRefused, Stopped: isOK}},
		{"exec", func(_ context.Context, f *fixture) error {
			if err := f.addExec("e"); !errdefs.IsAlreadyExists(err) {
				return fmt.Errorf("a second one of its name: %w", err)
			}
			return nil
		}, map[State]string{Created: isOK, Running: isOK, Stopped: isOK}},
		{"wait", func(ctx context.Context, f *fixture) error {
			_, err := f.s.Wait(ctx, &taskapi.WaitRequest{ID: "c", ExecID: "e"})
			return err
		}, map[State]string{Created: isWaiting, Running: isWaiting, Stopped: isOK}},
	} {
		for state, arrange := range states {
			t.Run(o.name+" "+state.String(), func(t *testing.T) {
				f := newFixture(t)
				arrange(f)
				f.wantStatus("e", state.status())
				ctx, cancel := context.WithCancel(t.Context())
				if o.want[state] == isWaiting {
					cancel()
				}
				err := o.do(ctx, f)
				cancel()
				if got := outcome(err, state); got != o.want[state] {
					t.Errorf("%s: %v; want %s", got, err, o.want[state])
				}
				f.wantStatus("", tasktypes.Status_RUNNING)
				if _, err := f.s.State(t.Context(), &taskapi.StateRequest{ID: "c", ExecID: "e"}); o.name == "delete" && o.want[state] == isOK != errdefs.IsNotFound(err) {
					t.Errorf("state of the exec: %v", err)
				}
			})
		}
	}
}

// TestNoContainer tries operations on what does not exist.
func TestNoContainer(t *testing.T) {
	f := newFixture(t)
	ctx := t.Context()
	f.run()
	for _, id := range []struct{ container, exec string }{{"none", ""}, {"c", "none"}} {
		for name, call := range map[string]func() error{
			"start": func() error {
				_, err := f.s.Start(ctx, &taskapi.StartRequest{ID: id.container, ExecID: id.exec})
				return err
			},
			"kill": func() error {
				_, err := f.s.Kill(ctx, &taskapi.KillRequest{ID: id.container, ExecID: id.exec})
				return err
			},
			"delete": func() error {
				_, err := f.s.Delete(ctx, &taskapi.DeleteRequest{ID: id.container, ExecID: id.exec})
				return err
			},
			"state": func() error {
				_, err := f.s.State(ctx, &taskapi.StateRequest{ID: id.container, ExecID: id.exec})
				return err
			},
			"wait": func() error {
				_, err := f.s.Wait(ctx, &taskapi.WaitRequest{ID: id.container, ExecID: id.exec})
				return err
			},
		} {
			if err := call(); !errdefs.IsNotFound(err) {
				t.Errorf("%s of %v: %v", name, id, err)
			}
		}
	}
	if _, err := f.s.Create(ctx, f.createRequest()); !errdefs.IsAlreadyExists(err) {
		t.Errorf("create a second one: %v", err)
	}
	f.wantStatus("", tasktypes.Status_RUNNING)
}

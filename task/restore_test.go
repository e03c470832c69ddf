package task

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/process/processtest"
)

// createRestore creates a container that is to be restored from src, with the request
// that it returns.
func (f *fixture) createRestore(src restoreSource) *taskapi.CreateTaskRequest {
	f.Helper()
	r := f.createRequest()
	src.arrange(f, r, "")
	f.createRequest() // with what was arranged
	resp, err := f.s.Create(f.Context(), r)
	must(f.T, err)
	if resp.Pid != 0 {
		f.Errorf("pid %d of a container that is not restored yet", resp.Pid)
	}
	return r
}

// background waits for what the service does in the background.
func (f *fixture) background() { f.s.background.Wait() }

func wantNoFile(t *testing.T, path string) {
	t.Helper()
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s is there: %v", path, err)
	}
}

// TestRestore brings init back in Start, from wherever its checkpoint is. Then it is a
// container like any other, and the copy of the checkpoint is gone.
func TestRestore(t *testing.T) {
	for _, src := range restoreSources {
		t.Run(src.name, func(t *testing.T) {
			f := newFixture(t)
			r := f.createRestore(src)
			if calls := f.rt.Calls(); len(calls) > 0 {
				t.Errorf("the runtime was called in Create: %q", calls)
			}
			f.wantStatus("", tasktypes.Status_CREATED)
			if src.copied != nil {
				if _, err := os.Lstat(src.copied(f)); err != nil {
					t.Errorf("the copy: %v", err)
				}
			}
			if note, err := os.ReadFile(filepath.Join(f.bundle, restoreFrom)); (err == nil) != (src.name == "containerd's copy") || err == nil && string(note) != src.copied(f) {
				t.Errorf("the note of containerd's copy: %q, %v", note, err)
			}
			looked := 0
			f.policy.processes = func(ctx context.Context, pids []int) error {
				looked++
				return nil
			}
			f.start("")
			if want := filepath.Join(f.bundle, "rootfs"); f.policy.rootfs != want {
				t.Errorf("the mounts were looked at in %q", f.policy.rootfs)
			}
			if looked != 1 {
				t.Errorf("the processes were looked at %d times", looked)
			}
			f.wantStatus("", tasktypes.Status_RUNNING)
			f.exec("e")
			if src.copied != nil {
				f.background()
				wantNoFile(t, src.copied(f))
			}
			wantNoFile(t, filepath.Join(f.bundle, restoreFrom))
			f.rt.End("")
			f.await("exit c 0")
			f.wantEvents("create", "start", "exec-added e", "exec-started e", "exit e 137", "exit c 0")
			_, err := f.delete("")
			must(t, err)
			f.nothingLeft()
			// A second start of the same container.
			f.newService()
			if src.copied != nil && !src.recorded {
				return // its checkpoint is gone
			}
			resp, err := f.s.Create(t.Context(), r)
			if err != nil || (resp.Pid != 0) != src.recorded {
				t.Errorf("pid %d, %v; it starts cold: %t", resp.GetPid(), err, src.recorded)
			}
		})
	}
}

// TestRestoreFails: a start that fails, at whatever step, leaves no process, and the
// container as it was created. The next one succeeds, by the same plan.
func TestRestoreFails(t *testing.T) {
	annotation := restoreSources[3]
	for name, tc := range map[string]struct {
		breakIt, mend func(*fixture)
		called        bool // the runtime has tried
	}{
		"mounts": {func(f *fixture) { f.policy.mounts = func() error { return errTest } }, func(f *fixture) { f.policy.mounts = nil }, false},
		"runtime": {func(f *fixture) { f.rt.Before(processtest.Restore, fails) },
			func(f *fixture) { f.rt.Before(processtest.Restore, nil) }, true},
		"runtime, with the process": {func(f *fixture) { f.rt.After(processtest.Restore, fails) },
			func(f *fixture) { f.rt.After(processtest.Restore, nil) }, true},
		"processes": {func(f *fixture) { f.policy.processes = func(context.Context, []int) error { return errTest } },
			func(f *fixture) { f.policy.processes = nil }, true},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			f.createRestore(annotation)
			tc.breakIt(f)
			_, err := f.s.Start(t.Context(), &taskapi.StartRequest{ID: "c"})
			if !errors.Is(err, errTest) {
				t.Fatalf("%v", err)
			}
			f.wantStatus("", tasktypes.Status_CREATED)
			f.wantEvents("create")
			if pids := f.rt.Living(); len(pids) > 0 || f.rt.Known() {
				t.Errorf("left: processes %d, known: %t", pids, f.rt.Known())
			}
			if got := slices.Contains(f.rt.Calls(), "delete"); got != tc.called {
				t.Errorf("removed from the runtime: %t", got)
			}
			record := recordFolder(filepath.Join(f.bundle, "rootfs"))
			if state, err := record.get(); err != nil || state != restoreNone {
				t.Errorf("it is recorded as %q, %v", state, err)
			}
			f.background()
			if _, err := os.Lstat(annotation.copied(f)); err != nil {
				t.Errorf("the copy of the checkpoint, for another try: %v", err)
			}
			tc.mend(f)
			f.start("")
			if state, err := record.get(); err != nil || state != restoreDone {
				t.Errorf("it is recorded as %q, %v", state, err)
			}
			f.wantStatus("", tasktypes.Status_RUNNING)
			f.wantEvents("create", "start")
		})
	}
}

// TestRestoreWithoutStreams: when the streams fail after the processes are back, they are
// ended, and that they have run stays recorded.
func TestRestoreWithoutStreams(t *testing.T) {
	f := newFixture(t)
	r := f.createRequest()
	restoreSources[3].arrange(f, r, "")
	r.Stdout = filepath.Join(f.bundle, "none")
	f.createRequest()
	_, err := f.s.Create(t.Context(), r)
	must(t, err)
	if _, err := f.s.Start(t.Context(), &taskapi.StartRequest{ID: "c"}); err == nil || !strings.Contains(err.Error(), "open output") {
		t.Fatalf("%v", err)
	}
	f.wantStatus("", tasktypes.Status_CREATED)
	f.wantEvents("create")
	if pids := f.rt.Living(); len(pids) > 0 || f.rt.Known() {
		t.Errorf("left: processes %d, known: %t", pids, f.rt.Known())
	}
	if state, err := recordFolder(filepath.Join(f.bundle, "rootfs")).get(); err != nil || state != restoreBegun {
		t.Errorf("it is recorded as %q, %v", state, err)
	}
}

// TestRestoreIsNotStarted: deleting the container, or the failure of its creation after
// the plan was made, removes the copy of the checkpoint.
func TestRestoreIsNotStarted(t *testing.T) {
	annotation := restoreSources[3]
	t.Run("deleted", func(t *testing.T) {
		f := newFixture(t)
		f.createRestore(annotation)
		_, err := f.delete("")
		must(t, err)
		f.background()
		wantNoFile(t, annotation.copied(f))
		f.wantEvents("create", "delete")
		f.nothingLeft()
	})
	t.Run("not created", func(t *testing.T) {
		f := newFixture(t)
		r := f.createRequest()
		annotation.arrange(f, r, "")
		must(t, os.WriteFile(filepath.Join(os.Getenv(stageEnv), "layer.tar"), []byte("no tar, and shorter than a block"), 0o600))
		f.createRequest()
		if _, err := f.s.Create(t.Context(), r); err == nil || !strings.Contains(err.Error(), "bring back the files") {
			t.Errorf("%v", err)
		}
		f.background()
		wantNoFile(t, annotation.copied(f))
		f.wantEvents()
		f.nothingLeft()
	})
}

// TestRestoreBringsFilesBack in Create, once: they may have changed since.
func TestRestoreBringsFilesBack(t *testing.T) {
	rootOnly(t)
	annotation := restoreSources[3]
	f := newFixture(t)
	r := f.createRequest()
	annotation.arrange(f, r, "")
	f.layer("new")
	f.createRequest()
	_, err := f.s.Create(t.Context(), r)
	must(t, err)
	if _, err := os.Lstat(filepath.Join(f.bundle, "rootfs", "new")); err != nil {
		t.Error(err)
	}
	// The shim is gone before Start.
	f.newService()
	if _, err := f.s.Create(t.Context(), r); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "cut short") {
		t.Errorf("a second one: %v", err)
	}
}

// TestRestoreSeesRecordWhenMounted: of a root filesystem that is mounted after the plan is
// made, the record is looked at then, before any file comes back.
func TestRestoreSeesRecordWhenMounted(t *testing.T) {
	f := newFixture(t)
	root := t.TempDir()
	must(t, recordFolder(root).set(restoreBegun))
	r := f.createRequest()
	restoreSources[3].arrange(f, r, "")
	f.layer("new")
	r.Rootfs = f.twice(root)
	f.createRequest()
	if _, err := f.s.Create(t.Context(), r); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "cut short") {
		t.Errorf("%v", err)
	}
	wantNoFile(t, filepath.Join(root, "new"))
	f.background()
	wantNoFile(t, restoreSources[3].copied(f))
	f.nothingLeft()
}

// TestRestoredProcessDies: its exit comes after its start, whenever it dies.
func TestRestoredProcessDies(t *testing.T) {
	t.Run("at once", func(t *testing.T) {
		f := newFixture(t)
		f.createRestore(restoreSources[0])
		f.rt.After(processtest.Restore, func(context.Context) error {
			return unix.Kill(f.rt.Pid(""), unix.SIGKILL)
		})
		f.start("")
		f.await("exit c 137")
		f.wantEvents("create", "start", "exit c 137")
		f.wantStatus("", tasktypes.Status_STOPPED)
	})
	t.Run("later", func(t *testing.T) {
		f := newFixture(t)
		f.createRestore(restoreSources[0])
		f.start("")
		must(t, f.kill(uint32(unix.SIGTERM)))
		f.await("exit c 143")
		f.wantEvents("create", "start", "exit c 143")
	})
}

// TestKillDuringRestore ends it, whether there is a process yet or not.
func TestKillDuringRestore(t *testing.T) {
	for name, hold := range map[string]func(*fixture, *processtest.Point){
		"before": func(f *fixture, p *processtest.Point) { f.rt.Before(processtest.Restore, p.Stop) },
		"while the processes are looked at": func(f *fixture, p *processtest.Point) {
			f.policy.processes = func(ctx context.Context, _ []int) error { return p.Stop(ctx) }
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			f.createRestore(restoreSources[0])
			point := processtest.NewPoint(t)
			hold(f, point)
			started := f.asyncStart("")
			point.Wait()
			if err := f.kill(uint32(unix.SIGHUP)); !errdefs.IsNotFound(err) {
				t.Errorf("another signal: %v", err)
			}
			must(t, f.kill(uint32(unix.SIGKILL)))
			if err := <-started; !errors.Is(err, errKilled) {
				t.Errorf("start: %v", err)
			}
			f.wantStatus("", tasktypes.Status_CREATED)
			f.wantEvents("create")
			if pids := f.rt.Living(); len(pids) > 0 {
				t.Errorf("processes %d are left", pids)
			}
			_, err := f.delete("")
			must(t, err)
			f.nothingLeft()
		})
	}
	t.Run("when the runtime has restored it", func(t *testing.T) {
		f := newFixture(t)
		f.createRestore(restoreSources[0])
		f.rt.After(processtest.Restore, func(context.Context) error { return f.kill(uint32(unix.SIGKILL)) })
		if _, err := f.s.Start(t.Context(), &taskapi.StartRequest{ID: "c"}); err != nil && !errors.Is(err, errKilled) {
			t.Errorf("start: %v", err)
		} else if err == nil {
			f.await("exit c 137")
		}
		if pids := f.rt.Living(); len(pids) > 0 {
			t.Errorf("processes %d are left", pids)
		}
	})
}

// TestUnrestoredHasNoProcess: a container that is created but not restored yet has none
// to ask for.
func TestUnrestoredHasNoProcess(t *testing.T) {
	f := newFixture(t)
	f.createRestore(restoreSources[0])
	if err := f.kill(uint32(unix.SIGKILL)); !errdefs.IsNotFound(err) {
		t.Errorf("kill: %v", err)
	}
	if _, err := f.s.Pids(t.Context(), &taskapi.PidsRequest{ID: "c"}); outcome(err, Created) != isEmpty {
		t.Errorf("pids: %v", err)
	}
	if _, err := f.s.Stats(t.Context(), &taskapi.StatsRequest{ID: "c"}); !errdefs.IsNotFound(err) {
		t.Errorf("stats: %v", err)
	}
}

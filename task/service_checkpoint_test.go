package task

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/api/types/runc/options"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/api"
	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/process/processtest"
)

// dump asks containerd's way for a checkpoint.
func (f *fixture) dump(dir string, opts *options.CheckpointOptions) error {
	_, err := f.s.Checkpoint(f.Context(), &taskapi.CheckpointTaskRequest{ID: "c", Path: dir, Options: pack(f, opts)})
	return err
}

// TestCheckpoint freezes the container for the dump, whether it ran or was paused, and
// then leaves it as it was, whether the dump succeeds or fails.
func TestCheckpoint(t *testing.T) {
	for _, paused := range []bool{false, true} {
		for _, fail := range []string{"", "in CRIU", "in CRIU, which has thawed it"} {
			name := map[bool]string{false: "running", true: "paused"}[paused]
			if fail != "" {
				name += " fails " + fail
			}
			t.Run(name, func(t *testing.T) {
				f := newFixture(t)
				f.run()
				status := tasktypes.Status_RUNNING
				if paused {
					must(t, pauseOf(t.Context(), f))
					status = tasktypes.Status_PAUSED
				}
				published := f.log.all()
				dir := filepath.Join(t.TempDir(), "checkpoint")
				f.rt.Before(processtest.Checkpoint, func(ctx context.Context) error {
					if !f.frozen() {
						t.Error("it runs while CRIU dumps it")
					}
					f.wantStatus("", status)
					if fail == "in CRIU, which has thawed it" {
						f.thaw()
					}
					if fail != "" {
						return errTest
					}
					return nil
				})
				err := f.dump(dir, &options.CheckpointOptions{})
				if f.frozen() != paused {
					t.Errorf("frozen: %t", !paused)
				}
				f.wantStatus("", status)
				if fail != "" {
					if !errors.Is(err, errTest) {
						t.Errorf("%v; want the runtime's error", err)
					}
					if _, err := os.Lstat(dir); !os.IsNotExist(err) {
						t.Errorf("the folder of the checkpoint: %v", err)
					}
					f.wantEvents(published...)
					return
				}
				must(t, err)
				f.wantEvents(append(published, "checkpointed")...)
				ckpt, err := checkpoint.Open(t.Context(), dir)
				must(t, err)
				if m := ckpt.Manifest(); m.Container.ID != "c" || m.Container.Namespace != "test" || m.Exit || m.Runtime != (checkpoint.Runtime{Name: "fake", Version: "1.0"}) {
					t.Errorf("manifest %+v", m)
				}
			})
		}
	}
}

func (f *fixture) thaw() {
	f.Helper()
	c, err := f.s.find("c")
	must(f.T, err)
	must(f.T, c.loadedCgroup().Thaw())
}

// TestCheckpointExit ends the container, and returns after its exit is published.
func TestCheckpointExit(t *testing.T) {
	for _, paused := range []bool{false, true} {
		f := newFixture(t)
		var returned atomic.Bool
		f.log.before = func(line string) {
			if line == "exit c 137" && !f.waits("task.(*container).checkpoint(", inASelect, returned.Load) {
				t.Error("it has returned before the container has ended")
			}
		}
		f.run()
		if paused {
			must(t, pauseOf(t.Context(), f))
		}
		dir := filepath.Join(t.TempDir(), "checkpoint")
		must(t, f.dump(dir, &options.CheckpointOptions{Exit: true}))
		returned.Store(true)
		f.wantStatus("", tasktypes.Status_STOPPED)
		if got := f.log.all(); !slices.Contains(got, "exit c 137") || !slices.Contains(got, "checkpointed") {
			t.Errorf("events %q", got)
		}
		ckpt, err := checkpoint.Open(t.Context(), dir)
		must(t, err)
		if !ckpt.Manifest().Exit {
			t.Error("the manifest does not say that the container has ended")
		}
		if _, err := f.delete(""); err != nil {
			t.Error(err)
		}
		f.nothingLeft()
	}
}

// TestCheckpointExitFails: the container runs on.
func TestCheckpointExitFails(t *testing.T) {
	f := newFixture(t)
	f.run()
	f.rt.Before(processtest.Checkpoint, fails)
	if err := f.dump(filepath.Join(t.TempDir(), "checkpoint"), &options.CheckpointOptions{Exit: true}); !errors.Is(err, errTest) {
		t.Errorf("%v", err)
	}
	if f.frozen() || len(f.rt.Living()) != 1 {
		t.Errorf("frozen: %t, processes %d", f.frozen(), f.rt.Living())
	}
	f.wantStatus("", tasktypes.Status_RUNNING)
	f.wantEvents("create", "start")
}

// TestCheckpointRefused: what is asked for cannot be; the container is not touched.
func TestCheckpointRefused(t *testing.T) {
	f := newFixture(t)
	f.run()
	calls := f.rt.Calls()
	file := filepath.Join(t.TempDir(), "other")
	must(t, os.WriteFile(file, nil, 0o600))
	for name, tc := range map[string]struct {
		dir   string
		opts  *options.CheckpointOptions
		class func(error) bool
	}{
		"relative":   {"checkpoint", &options.CheckpointOptions{}, errdefs.IsInvalidArgument},
		"work path":  {t.TempDir(), &options.CheckpointOptions{WorkPath: "work"}, errdefs.IsInvalidArgument},
		"mode":       {t.TempDir(), &options.CheckpointOptions{CgroupsMode: "hard"}, errdefs.IsInvalidArgument},
		"namespaces": {t.TempDir(), &options.CheckpointOptions{EmptyNamespaces: []string{"pid"}}, errdefs.IsInvalidArgument},
		"occupied":   {filepath.Dir(file), &options.CheckpointOptions{}, errdefs.IsAlreadyExists},
	} {
		if err := f.dump(tc.dir, tc.opts); !tc.class(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, r := range map[string]*api.CheckpointRequest{
		"relative":         {ImagePath: "x"},
		"rootfs":           {ImagePath: "/x", RootfsPath: "x"},
		"rootfs and exit":  {ImagePath: "/x", RootfsPath: "/y", Exit: true},
		"sum and exit":     {ImagePath: "/x", LeaveSum: true, Exit: true},
		"base":             {ImagePath: "/x", BaseConfig: "x"},
		"pre-dumps":        {ImagePath: "/x", PreDumps: maxPreDumps + 1},
		"links, no exit":   {ImagePath: "/x", Options: &api.CRIUOptions{LinkRemap: true}},
		"mode":             {ImagePath: "/x", Options: &api.CRIUOptions{CgroupsMode: "hard"}},
		"empty namespaces": {ImagePath: "/x", Options: &api.CRIUOptions{EmptyNamespaces: []string{"pid"}}},
	} {
		r.Id = "c"
		if _, err := (checkpoints{f.s}).checkpoint(t.Context(), r, nil); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	f.wantEvents("create", "start")
	if !slices.Equal(f.rt.Calls(), calls) || f.frozen() {
		t.Errorf("calls %q, frozen: %t", f.rt.Calls(), f.frozen())
	}
}

// TestOwnCheckpoint copies the writable layer beside CRIU, while the container stands
// still.
func TestOwnCheckpoint(t *testing.T) {
	f := newFixture(t)
	must(t, os.WriteFile(filepath.Join(f.bundle, "rootfs", "file"), []byte("x"), 0o600))
	f.run()
	dir := t.TempDir()
	r := &api.CheckpointRequest{Id: "c", ImagePath: filepath.Join(dir, "checkpoint"), RootfsPath: filepath.Join(dir, "rootfs")}
	f.rt.Before(processtest.Checkpoint, func(context.Context) error {
		if !f.frozen() {
			t.Error("it is not frozen")
		}
		return nil
	})
	result, err := (checkpoints{f.s}).checkpoint(t.Context(), r, func(*api.CheckpointUpdate) error { return nil })
	must(t, err)
	if data, err := os.ReadFile(filepath.Join(dir, "rootfs", "file")); err != nil || string(data) != "x" {
		t.Errorf("the copy: %q, %v", data, err)
	}
	if result.RootfsBytes != 1 || result.RootfsIsUpper || result.RuntimeName != "fake" || result.FrozenNs == 0 || result.Unsigned != "" {
		t.Errorf("result %v", result)
	}
	if data, err := os.ReadFile(filepath.Join(r.ImagePath, layout.DumpLog)); err != nil || !strings.Contains(string(data), "finished") {
		t.Errorf("CRIU's log: %q, %v", data, err)
	}
	if f.frozen() {
		t.Error("it is frozen")
	}
	// What fails of the two, the other is removed.
	dir = t.TempDir()
	r.ImagePath, r.RootfsPath = filepath.Join(dir, "checkpoint"), filepath.Join(dir, "rootfs")
	f.rt.Before(processtest.Checkpoint, fails)
	if _, err := (checkpoints{f.s}).checkpoint(t.Context(), r, func(*api.CheckpointUpdate) error { return nil }); !errors.Is(err, errTest) {
		t.Errorf("%v", err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// TestCopyRootfs copies the writable layer alone, of a container that stands still meanwhile
// and is then as it was.
func TestCopyRootfs(t *testing.T) {
	for _, paused := range []bool{false, true} {
		f := newFixture(t)
		must(t, os.WriteFile(filepath.Join(f.bundle, "rootfs", "file"), []byte("x"), 0o600))
		f.run()
		if paused {
			must(t, pauseOf(t.Context(), f))
		}
		calls := f.rt.Calls()
		ask := func(r *api.CheckpointRequest) (*api.CheckpointResult, error) {
			return (checkpoints{f.s}).checkpoint(t.Context(), r, func(*api.CheckpointUpdate) error { return nil })
		}
		to := filepath.Join(t.TempDir(), "rootfs")
		result, err := ask(&api.CheckpointRequest{Id: "c", RootfsPath: to})
		must(t, err)
		if data, err := os.ReadFile(filepath.Join(to, "file")); err != nil || string(data) != "x" {
			t.Errorf("the copy: %q, %v", data, err)
		}
		if result.RootfsBytes != 1 || result.RootfsIsUpper || (result.FrozenNs == 0) != paused || f.frozen() != paused {
			t.Errorf("paused %t: result %v, frozen: %t", paused, result, f.frozen())
		}
		for what, r := range map[string]*api.CheckpointRequest{
			"it exists": {Id: "c", RootfsPath: to},
			"exit":      {Id: "c", RootfsPath: to + "2", Exit: true},
			"options":   {Id: "c", RootfsPath: to + "2", Options: &api.CRIUOptions{}},
			"pre-dumps": {Id: "c", RootfsPath: to + "2", PreDumps: 1},
			"no sum":    {Id: "c", RootfsPath: to + "2", LeaveSum: true},
			"relative":  {Id: "c", RootfsPath: "rootfs"},
			"nothing":   {Id: "c"},
		} {
			if _, err := ask(r); err == nil {
				t.Errorf("%s: no error", what)
			}
		}
		c, err := f.s.find("c")
		must(t, err)
		looked := 0
		_, err = c.copyRootfs(t.Context(), to+"3", func(int64) {
			looked++
			if !f.frozen() {
				t.Error("it runs while its files are copied")
			}
		})
		if err != nil || looked == 0 {
			t.Errorf("looked %d times, %v", looked, err)
		}
		// A copy that fails leaves nothing, and the container as it was.
		must(t, os.WriteFile(to+"4", nil, 0o600))
		if _, err := c.copyRootfs(t.Context(), to+"4/x", func(int64) {}); err == nil {
			t.Error("a copy into a file is no error")
		}
		if f.frozen() != paused || !slices.Equal(f.rt.Calls(), calls) {
			t.Errorf("paused %t: frozen %t, calls %q", paused, f.frozen(), f.rt.Calls())
		}
	}
}

// TestTellMemoryFile tells a client that has asked for it, and no other, where CRIU writes
// the memory of a process that has much more than the others, and how large that will be.
func TestTellMemoryFile(t *testing.T) {
	const held = 80 << 20
	for about, tc := range map[string]struct {
		ask, exit bool
		files     int
	}{
		"asked":            {ask: true, files: 1},
		"asked, with exit": {ask: true, exit: true, files: 1},
		"not asked":        {},
	} {
		t.Run(about, func(t *testing.T) {
			f := newFixture(t)
			f.run()
			f.rt.Hold(held)
			dir := filepath.Join(t.TempDir(), "checkpoint")
			var told []*api.MemoryFile
			heard := make(chan struct{}, 1)
			f.rt.Before(processtest.Checkpoint, func(context.Context) error {
				for name, size := range map[string]int64{"pages-1.img": 4096, "pages-2.img": 16 << 20} {
					path := filepath.Join(dir, layout.Partial, name)
					if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, size)); err != nil {
						return err
					}
				}
				if tc.files == 0 {
					time.Sleep(100 * time.Millisecond)
					return nil
				}
				select {
				case <-heard:
				case <-t.Context().Done():
				}
				return nil
			})
			r := &api.CheckpointRequest{Id: "c", ImagePath: dir, Exit: tc.exit, TellMemoryFile: tc.ask}
			_, err := (checkpoints{f.s}).checkpoint(t.Context(), r, func(u *api.CheckpointUpdate) error {
				if file := u.GetMemoryFile(); file != nil {
					told = append(told, file)
					heard <- struct{}{}
				}
				return nil
			})
			must(t, err)
			if len(told) != tc.files {
				t.Fatalf("told of %v, want %d", told, tc.files)
			}
			for _, file := range told {
				if file.Path != filepath.Join(layout.Partial, "pages-2.img") || file.Size < held || file.Size > held+16<<20 {
					t.Errorf("told of %v", file)
				}
			}
		})
	}
}

// TestClientGoesAway: nobody waits for its checkpoint, which ends, and the container runs
// on.
func TestClientGoesAway(t *testing.T) {
	f := newFixture(t)
	f.run()
	point := f.stopBefore(processtest.Checkpoint)
	ctx, goAway := context.WithCancel(t.Context())
	dir := filepath.Join(t.TempDir(), "checkpoint")
	dumped := async(func() error {
		_, err := (checkpoints{f.s}).checkpoint(ctx, &api.CheckpointRequest{Id: "c", ImagePath: dir}, func(*api.CheckpointUpdate) error { return nil })
		return err
	})
	point.Wait()
	goAway()
	if err := <-dumped; err == nil || !strings.Contains(err.Error(), "the client went away") {
		t.Errorf("%v", err)
	}
	if f.frozen() {
		t.Error("it is frozen")
	}
	if _, err := os.Lstat(dir); !os.IsNotExist(err) {
		t.Errorf("the folder of the checkpoint: %v", err)
	}
	f.wantEvents("create", "start")
	f.wantStatus("", tasktypes.Status_RUNNING)
}

// TestCheckpointOfAPod is signed, and says whose it is.
func TestCheckpointOfAPod(t *testing.T) {
	f := newFixture(t)
	f.inPod("default", "app")
	f.run()
	dir := filepath.Join(t.TempDir(), "checkpoint")
	must(t, f.dump(dir, &options.CheckpointOptions{}))
	ckpt, err := checkpoint.OpenWith(t.Context(), dir, checkpoint.OpenOptions{Trust: f.trust()})
	must(t, err)
	if _, signed := ckpt.Signer(); !signed {
		t.Error("it is not signed")
	}
	if c := ckpt.Manifest().Container; c.Name != "app" || c.Pod == nil || c.Pod.Namespace != "default" {
		t.Errorf("container %+v", c)
	}
}

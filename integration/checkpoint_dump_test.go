package integration

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	goruntime "runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/inventory"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/integration/stack"
)

// sleeper makes a container that does nothing and starts it.
func sleeper(ctx context.Context, s *stack.Stack, name string, opts ...oci.SpecOpts) *stack.Container {
	c := s.NewContainer(ctx, name, stack.Busybox, append([]oci.SpecOpts{stack.Args("sleep", "1000")}, opts...)...)
	c.Start(ctx)
	return c
}

// locker makes a container whose process holds a file lock, which CRIU does not
// dump unless told to, and starts it.
func locker(ctx context.Context, s *stack.Stack, name string) *stack.Container {
	c := s.NewContainer(ctx, name, stack.Probe, stack.ProbeArgs("-items", "flock"))
	c.StartProbe(ctx)
	return c
}

const noFileLocks = "Some file locks are hold by dumping tasks! You can try --file-locks to dump them."

// runsOn checks that the container's processes run: one that is frozen does not
// start another.
func runsOn(t *testing.T, ctx context.Context, c *stack.Container) {
	t.Helper()
	if status := c.Status(ctx); status != client.Running {
		t.Errorf("status %s, want running", status)
	}
	if out := c.Exec(ctx, "echo", "alive"); out != "alive\n" {
		t.Errorf("exec printed %q", out)
	}
	if state, err := os.ReadFile(procFile(c, "status")); err != nil || frozenState.Match(state) {
		t.Errorf("init is frozen: %v\n%s", err, state)
	}
}

var frozenState = regexp.MustCompile(`(?m)^State:\s+[DTt]`)

func procFile(c *stack.Container, name string) string {
	return fmt.Sprintf("/proc/%d/%s", c.Task.Pid(), name)
}

// checkpointRequest is what containerd sends to a shim.
func checkpointRequest(t *testing.T, id, dir string, opts *options.CheckpointOptions) *taskapi.CheckpointTaskRequest {
	t.Helper()
	r := &taskapi.CheckpointTaskRequest{ID: id, Path: dir}
	if opts != nil {
		var err error
		if r.Options, err = typeurl.MarshalAnyToProto(opts); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

// TestCheckpointOptions checks that each option of a checkpoint reaches CRIU,
// and that a restore repeats what it must without being told.
func TestCheckpointOptions(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	faults := s.Faults()
	seen := 0 // of the runtime's calls
	work := filepath.Join(s.Dir, "work")
	c := sleeper(ctx, s, "c")
	bundle := c.Bundle()
	for name, tc := range map[string]struct {
		opts *options.CheckpointOptions
		// What the runtime is told to dump, and to restore.
		dump, restore string
	}{
		"none":                  {opts: &options.CheckpointOptions{}},
		"open_tcp":              {&options.CheckpointOptions{OpenTcp: true}, "--tcp-established", "--tcp-established"},
		"external_unix_sockets": {&options.CheckpointOptions{ExternalUnixSockets: true}, "--ext-unix-sk", "--ext-unix-sk"},
		"terminal":              {&options.CheckpointOptions{Terminal: true}, "--shell-job", "--shell-job"},
		"file_locks":            {&options.CheckpointOptions{FileLocks: true}, "--file-locks", "--file-locks"},
		"empty_namespaces":      {&options.CheckpointOptions{EmptyNamespaces: []string{"network"}}, "--empty-ns network", "--empty-ns network"},
		"cgroups_mode soft":     {&options.CheckpointOptions{CgroupsMode: "soft"}, "--manage-cgroups-mode soft", "--manage-cgroups-mode soft"},
		"cgroups_mode full":     {&options.CheckpointOptions{CgroupsMode: "full"}, "--manage-cgroups-mode full", "--manage-cgroups-mode full"},
		"cgroups_mode strict":   {&options.CheckpointOptions{CgroupsMode: "strict"}, "--manage-cgroups-mode strict", "--manage-cgroups-mode full"},
		"cgroups_mode ignore":   {&options.CheckpointOptions{CgroupsMode: "ignore"}, "--manage-cgroups-mode ignore", "--manage-cgroups-mode ignore"},
		"work_path":             {&options.CheckpointOptions{WorkPath: work}, "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(s.Dir, "checkpoints", name)
			workPath := tc.opts.WorkPath
			if workPath == "" {
				workPath = filepath.Join(bundle, "work", "checkpoint")
			}
			args := func(command, rest string) {
				t.Helper()
				calls := faults.Calls()[seen:]
				i := slices.IndexFunc(calls, func(call string) bool { return strings.Contains(call, " "+command+" ") })
				if i < 0 {
					t.Fatalf("no %s among the runtime's calls: %q", command, calls)
				}
				_, got, _ := strings.Cut(calls[i], " "+command+" ")
				for _, known := range []string{
					"--image-path " + dir + "/.partial", "--image-path " + dir, "--work-path " + workPath,
					"--work-path " + filepath.Join(bundle, "work"), "--bundle " + bundle, "--pid-file " + bundle + "/init.pid", "--detach",
				} {
					got = strings.Replace(got, known, "", 1)
				}
				got = strings.Join(strings.Fields(got), " ")
				if want := strings.TrimSpace(rest + " c"); got != want {
					t.Errorf("%s %s, want %s", command, got, want)
				}
			}

			// As it runs on.
			seen = len(faults.Calls())
			if err := c.CheckpointErr(ctx, dir, tc.opts); err != nil {
				t.Fatal(err)
			}
			args("checkpoint", strings.TrimSpace(tc.dump+" --leave-running"))
			runsOn(t, ctx, c)
			if got, want := locksNetwork(t, dir), tc.opts.OpenTcp; got != want {
				t.Errorf("CRIU locked the network: %v, want %v", got, want)
			}
			for _, file := range []string{layout.DumpLog, layout.DumpStats} {
				if _, err := os.Stat(filepath.Join(workPath, file)); err != nil {
					t.Errorf("%v, want it in the work path", err)
				}
			}

			// As it ends, into the same folder, which has the first one.
			seen = len(faults.Calls())
			tc.opts.Exit = true
			if err := c.CheckpointErr(ctx, dir, tc.opts); err != nil {
				t.Fatal(err)
			}
			args("checkpoint", tc.dump)
			if err := c.RestoreErr(ctx, dir); err != nil {
				t.Fatal(err)
			}
			args("restore", tc.restore)
			runsOn(t, ctx, c)
		})
	}
	// Without any options at all, as clients may send it.
	dir := filepath.Join(s.Dir, "checkpoints", "nil")
	shim := dialTask(t, c)
	if _, err := shim.Checkpoint(ctx, checkpointRequest(t, "c", dir, nil)); err != nil {
		t.Fatal(err)
	}
	runsOn(t, ctx, c)
	c.Kill(ctx, syscall.SIGKILL)
	c.DeleteTask(ctx)
	c.Restore(ctx, dir)
	runsOn(t, ctx, c)
}

// locksNetwork tells whether CRIU kept packets from the container in a dump, and
// expects to in the restore.
func locksNetwork(t *testing.T, dir string) bool {
	t.Helper()
	img, err := checkpoint.Open(t.Context(), dir)
	must(t, err)
	var inv inventory.InventoryEntry
	must(t, img.Each(layout.Inventory, "INVENTORY", func(msg []byte) error { return proto.Unmarshal(msg, &inv) }))
	const skip = 2 // CRIU's include/cr_options.h
	return inv.GetNetworkLockMethod() != skip
}

// TestCheckpointCgroups checks which limits a restored container has: those of
// its spec, or those that it was given later.
func TestCheckpointCgroups(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	const spec, later = 50, 77
	for mode, want := range map[string]int64{"": spec, "soft": spec, "ignore": spec, "full": later, "strict": later} {
		c := sleeper(ctx, s, "c"+mode, oci.WithPidsLimit(spec))
		if err := c.Task.Update(ctx, client.WithResources(&specs.LinuxResources{Pids: &specs.LinuxPids{Limit: new(int64(later))}})); err != nil {
			t.Fatal(err)
		}
		dir := filepath.Join(s.Dir, "checkpoints", c.ID())
		c.Checkpoint(ctx, dir, &options.CheckpointOptions{Exit: true, CgroupsMode: mode})
		c.Restore(ctx, dir)
		if got, err := readCgroup(s, "pids", c.ID(), "pids.max"); err != nil || got != fmt.Sprint(want) {
			t.Errorf("%q: pids.max is %s, %v; want %d", mode, got, err, want)
		}
		runsOn(t, ctx, c)
	}
}

// TestCheckpointState checks that a checkpoint, whether it works or not, leaves
// a container as it was: running or paused.
func TestCheckpointState(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	c := locker(ctx, s, "c")
	dir := filepath.Join(s.Dir, "checkpoint")
	good := func() *options.CheckpointOptions { return &options.CheckpointOptions{FileLocks: true} }

	c.Checkpoint(ctx, dir, good())
	runsOn(t, ctx, c)
	if err := c.CheckpointErr(ctx, dir, nil); err == nil {
		t.Error("dumped a file lock")
	}
	runsOn(t, ctx, c)

	if err := c.Task.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	c.Checkpoint(ctx, dir, good())
	stillPaused(t, ctx, c)
	if err := c.CheckpointErr(ctx, dir, nil); err == nil {
		t.Error("dumped a file lock")
	}
	stillPaused(t, ctx, c)
	if err := c.Task.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	runsOn(t, ctx, c)

	// The one that was made before the failure is still good. It is of a paused
	// container, which nevertheless runs when it is restored.
	c.Kill(ctx, syscall.SIGKILL)
	c.DeleteTask(ctx)
	c.Restore(ctx, dir)
	runsOn(t, ctx, c)

	// As containerd's client does it.
	if err := c.Task.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	opts := good()
	opts.Exit = true
	c.Checkpoint(ctx, dir, opts)
	c.Restore(ctx, dir)
	runsOn(t, ctx, c)
}

func stillPaused(t *testing.T, ctx context.Context, c *stack.Container) {
	t.Helper()
	if status := c.Status(ctx); status != client.Paused {
		t.Errorf("status %s, want paused", status)
	}
	state, err := os.ReadFile(filepath.Join(freezer(c), "freezer.state"))
	if err != nil {
		state, err = os.ReadFile(filepath.Join(freezer(c), "cgroup.events"))
	}
	if s := string(state); err != nil || s != "FROZEN\n" && !strings.Contains(s, "frozen 1") {
		t.Errorf("the freezer says %q, %v", s, err)
	}
}

// freezer returns the folder of the control group that freezes a container.
func freezer(c *stack.Container) string {
	own, _ := os.ReadFile(procFile(c, "cgroup"))
	for line := range strings.Lines(string(own)) {
		if fields := strings.SplitN(strings.TrimSpace(line), ":", 3); fields[1] == "freezer" {
			return filepath.Join("/sys/fs/cgroup/freezer", fields[2])
		}
	}
	_, group, _ := strings.Cut(strings.TrimSpace(string(own)), "::")
	return filepath.Join("/sys/fs/cgroup", group)
}

// TestCheckpointExits checks what is told of a container that ends with its
// checkpoint.
func TestCheckpointExits(t *testing.T) {
	t.Parallel()
	for _, paused := range []bool{false, true} {
		t.Run(map[bool]string{false: "running", true: "paused"}[paused], func(t *testing.T) {
			s := stack.Start(t, stack.Options{})
			ctx := s.Ctx()
			watch := watchEvents(t, s)
			c := sleeper(ctx, s, "c")
			want := "create start checkpointed exit delete"
			if paused {
				if err := c.Task.Pause(ctx); err != nil {
					t.Fatal(err)
				}
				want = "create start paused checkpointed exit delete"
			}
			pid := c.Task.Pid()
			dir := filepath.Join(s.Dir, "checkpoint")
			if _, err := dialTask(t, c).Checkpoint(ctx, checkpointRequest(t, "c", dir, &options.CheckpointOptions{Exit: true})); err != nil {
				t.Fatal(err)
			}
			// It has ended when the call returns.
			if status := c.Status(ctx); status != client.Stopped {
				t.Errorf("status %s, want stopped", status)
			}
			if _, err := os.Stat(procFile(c, "")); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("process %d: %v, want it gone", pid, err)
			}
			if code := c.Wait(ctx); code != 137 {
				t.Errorf("exit code %d, want 137", code)
			}
			if err := c.Task.Kill(ctx, syscall.SIGKILL); !errdefs.IsNotFound(err) {
				t.Errorf("kill: %v, want not found", err)
			}
			c.DeleteTask(ctx)
			watch.waitFor(ctx, "/tasks/delete", 1)
			got := topics(t, watch, "c")
			// The exit is news of another source than the checkpoint.
			if other := strings.Replace(want, "checkpointed exit", "exit checkpointed", 1); got != want && got != other {
				t.Errorf("events %s, want %s", got, want)
			}
			c.Restore(ctx, dir)
			runsOn(t, ctx, c)
		})
	}
}

// TestCheckpointFolder checks what a checkpoint leaves on the disk.
func TestCheckpointFolder(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	c := sleeper(ctx, s, "c")
	dir := filepath.Join(s.Dir, "checkpoint")
	ls := func(dir string) []string {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, e := range entries {
			names = append(names, e.Name())
		}
		return names
	}
	check := func(dir string) {
		t.Helper()
		if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
			t.Errorf("the folder's mode is %v, %v", info.Mode(), err)
		}
		for _, name := range ls(dir) {
			info, err := os.Lstat(filepath.Join(dir, name))
			if err != nil || info.Mode() != 0o600 {
				t.Errorf("%s: %v, %v; want a file of mode 0600", name, info.Mode(), err)
			}
			if strings.HasSuffix(name, ".log") || strings.HasPrefix(name, "stats-") {
				t.Errorf("%s is not in the work path", name)
			}
		}
		for _, want := range []string{layout.Manifest, layout.Inventory, layout.ProcessTree, layout.Descriptors} {
			if !slices.Contains(ls(dir), want) {
				t.Errorf("no %s among %v", want, ls(dir))
			}
		}
	}
	// A folder that does not exist.
	if _, err := dialTask(t, c).Checkpoint(ctx, checkpointRequest(t, "c", dir, nil)); err != nil {
		t.Fatal(err)
	}
	check(dir)
	before, err := os.ReadFile(filepath.Join(dir, layout.Manifest))
	if err != nil {
		t.Fatal(err)
	}

	// The same once more, of a container with another process.
	other := s.NewContainer(ctx, "other", stack.Busybox, stack.Args("sh", "-c", "sleep 1000 & wait"))
	other.Start(ctx)
	s.Poll(ctx, "two processes", func() bool {
		pids, err := other.Task.Pids(ctx)
		return err == nil && len(pids) == 2
	})
	other.Checkpoint(ctx, dir, nil)
	check(dir)
	if after, err := os.ReadFile(filepath.Join(dir, layout.Manifest)); err != nil || string(after) == string(before) {
		t.Errorf("the manifest is the old one: %v", err)
	}
	other.Kill(ctx, syscall.SIGKILL)
	other.DeleteTask(ctx)
	other.Restore(ctx, dir)
	runsOn(t, ctx, other)

	// A folder with something else in it.
	home := filepath.Join(s.Dir, "home")
	if err := os.Mkdir(home, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"thesis.odt", "disk.img"} {
		if err := os.WriteFile(filepath.Join(home, name), []byte("precious"), 0o644); err != nil {
			t.Fatal(err)
		}
		err := c.CheckpointErr(ctx, home, nil)
		if err == nil || !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), home) {
			t.Errorf("checkpoint: %v; want the folder and %s named", err, name)
		}
		if got := ls(home); !slices.Equal(got, []string{name}) {
			t.Errorf("the folder has %v, want %s", got, name)
		}
		if err := os.Remove(filepath.Join(home, name)); err != nil {
			t.Fatal(err)
		}
	}
	// Nor a path through something that is no folder.
	if err := os.WriteFile(home+"/file", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := dialTask(t, c).Checkpoint(ctx, checkpointRequest(t, "c", home+"/file", nil)); err == nil || !strings.Contains(err.Error(), home+"/file") {
		t.Errorf("checkpoint into a file: %v; want it named", err)
	}
	runsOn(t, ctx, c)
}

var logInError = regexp.MustCompile(`log: ([^)]*/dump\.log)\)`)

// TestCheckpointError checks that the error of a checkpoint has CRIU's words,
// and says where its log is, which is there.
func TestCheckpointError(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	c := locker(ctx, s, "c")
	work := filepath.Join(s.Dir, "work")
	dir := filepath.Join(s.Dir, "checkpoint")
	for name, call := range map[string]func() error{
		"image_path": func() error { return c.CheckpointErr(ctx, dir, nil) },
		"work_path":  func() error { return c.CheckpointErr(ctx, dir, &options.CheckpointOptions{WorkPath: work}) },
		"exit":       func() error { return c.CheckpointErr(ctx, dir, &options.CheckpointOptions{Exit: true}) },
		// containerd makes a temporary folder for it, and removes it.
		"temporary": func() error { _, err := c.Task.Checkpoint(ctx); return err },
		"ctr":       func() error { _, err := s.CtrErr("tasks", "checkpoint", "c"); return err },
	} {
		t.Run(name, func(t *testing.T) {
			err := call()
			if err == nil {
				t.Fatal("dumped a file lock")
			}
			if !strings.Contains(err.Error(), noFileLocks) {
				t.Errorf("error without CRIU's words: %v", err)
			}
			m := logInError.FindStringSubmatch(err.Error())
			if m == nil {
				t.Fatalf("error without a log: %v", err)
			}
			if log, err := os.ReadFile(m[1]); err != nil || !strings.Contains(string(log), noFileLocks) {
				t.Errorf("the log: %v\n%s", err, log)
			}
			if name == "work_path" && m[1] != filepath.Join(work, layout.DumpLog) {
				t.Errorf("the log is %s, want it in %s", m[1], work)
			}
			if entries, err := os.ReadDir(dir); err == nil && len(entries) > 0 {
				t.Errorf("left behind: %v", entries)
			}
			runsOn(t, ctx, c)
		})
	}
}

// TestCheckpointBadRequests checks requests that are refused at once.
func TestCheckpointBadRequests(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	c := sleeper(ctx, s, "c")
	shim := dialTask(t, c)
	dir := filepath.Join(s.Dir, "checkpoint")
	for name, tc := range map[string]struct {
		dir  string
		opts *options.CheckpointOptions
		want string
	}{
		"no path":          {"", nil, "not absolute"},
		"relative path":    {"checkpoint", nil, "not absolute"},
		"relative work":    {dir, &options.CheckpointOptions{WorkPath: "work"}, "work_path"},
		"cgroups_mode":     {dir, &options.CheckpointOptions{CgroupsMode: "gentle"}, "gentle"},
		"empty_namespaces": {dir, &options.CheckpointOptions{EmptyNamespaces: []string{"pid"}}, "network only"},
		"parent_path":      {dir, &options.CheckpointOptions{ParentPath: "../parent"}, "parent_path"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := shim.Checkpoint(ctx, checkpointRequest(t, "c", tc.dir, tc.opts))
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%v, want %q in it", err, tc.want)
			}
			if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the folder was made: %v", err)
			}
		})
	}
	runsOn(t, ctx, c)
}

// TestCheckpointAtOnce checkpoints and pauses containers as soon as their start has
// returned, when init may still be the OCI runtime's process, on CPUs that others use.
func TestCheckpointAtOnce(t *testing.T) {
	for name, opts := range runtimes {
		t.Run(name, func(t *testing.T) {
			s := stack.Start(t, opts)
			ctx, cancel := context.WithCancel(s.Ctx())
			var busy sync.WaitGroup
			for range 2 * goruntime.NumCPU() {
				busy.Go(func() {
					for ctx.Err() == nil {
					}
				})
			}
			defer busy.Wait()
			defer cancel()
			for i := range 6 {
				c := s.NewContainer(ctx, fmt.Sprint("c", i), stack.Busybox, stack.Args("sleep", "1000"))
				c.Start(ctx)
				if i%2 == 1 {
					must(t, c.Task.Pause(ctx))
				}
				c.Checkpoint(ctx, filepath.Join(s.Dir, c.ID()), &options.CheckpointOptions{})
				if i%2 == 1 {
					must(t, c.Task.Resume(ctx))
				}
				c.Kill(ctx, syscall.SIGKILL)
				c.Delete(ctx)
			}
		})
	}
}

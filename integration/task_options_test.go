package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/cgroups/v3"
	"github.com/containerd/cgroups/v3/cgroup1"
	"github.com/containerd/containerd/api/types/runc/options"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/containerd/v2/client"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/integration/stack"
)

// TestRuntimeOptions checks that each of the runtime's options has its effect,
// whichever way it comes: as runc's own message or as CRI's generic one.
func TestRuntimeOptions(t *testing.T) {
	for name, encode := range map[string]func(*testing.T, *stack.Stack, *options.Options) any{
		"runc.v1": func(_ *testing.T, _ *stack.Stack, o *options.Options) any { return o },
		"config_body": func(_ *testing.T, _ *stack.Stack, o *options.Options) any {
			return &runtimeoptions.Options{TypeUrl: "io.containerd.stasis.v1.options", ConfigBody: []byte(toml(o))}
		},
		"config_path": func(t *testing.T, s *stack.Stack, o *options.Options) any {
			path := filepath.Join(s.Dir, "runtime.toml")
			if err := os.WriteFile(path, []byte(toml(o)), 0o600); err != nil {
				t.Fatal(err)
			}
			return &runtimeoptions.Options{ConfigPath: path}
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := stack.Start(t, stack.Options{})
			ctx := s.Ctx()
			calls := s.Faults() // whose binary notes how it is called
			newContainer := func(name string, o *options.Options, args ...string) *stack.Container {
				o.BinaryName = s.OCIRuntime()
				return s.NewContainerWith(ctx, name, stack.Busybox,
					[]client.NewContainerOpts{client.WithRuntime(s.Runtime(), encode(t, s, o))}, stack.Args(args...))
			}
			called := func(command, flag string) {
				t.Helper()
				if !slices.ContainsFunc(calls.Calls(), func(c string) bool {
					f := strings.Fields(c)
					return slices.Contains(f, command) && slices.Contains(f, flag)
				}) {
					t.Errorf("the runtime was not called with %s and %s:\n%s", command, flag, strings.Join(calls.Calls(), "\n"))
				}
			}

			shimCgroup, removeCgroup := makeCgroup(t, s.CgroupPath("shim"))
			root := filepath.Join(s.Dir, "runtime-root")
			o := &options.Options{
				Root: root, NoPivotRoot: true, NoNewKeyring: true,
				ShimCgroup: shimCgroup, IoUid: 1000, IoGid: 1001,
			}
			c := newContainer("c", o, "sh", "-c", "echo started; exec sleep 1000")
			// Runc gives the streams to the container's user before that
			// sees them, so look at what the runtime is given.
			calls.Hold("create", stack.Before)
			created := make(chan error)
			go func() { created <- c.Create(ctx) }()
			calls.WaitReached(ctx, "create", stack.Before)
			if got := stdoutOwner(t, s.OCIRuntime()); got != "1000:1001" {
				t.Errorf("init's stdout is that of %s, want 1000:1001", got)
			}
			calls.Release("create", stack.Before)
			if err := <-created; err != nil {
				t.Fatal(err)
			}
			if err := c.Task.Start(ctx); err != nil {
				t.Fatal(err)
			}
			c.Stdout.WaitFor(ctx, "started\n")
			if out := c.Exec(ctx, "stat", "-L", "-c", "%g", "/proc/self/fd/1"); out != "1001\n" {
				t.Errorf("exec's stdout is that of group %q, want 1001", out)
			}
			called("create", "--no-pivot")
			called("create", "--no-new-keyring")
			called("start", filepath.Join(root, s.Namespace))
			state := filepath.Join(root, s.Namespace, "c")
			if _, err := os.Stat(state); err != nil {
				t.Errorf("the runtime keeps its state elsewhere: %v", err)
			}
			shim := shimPid(t, c)
			if data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", shim)); err != nil || !strings.Contains(string(data), shimCgroup+"\n") {
				t.Errorf("the shim is not in cgroup %s, but in\n%s", shimCgroup, data)
			}
			if data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", c.Task.Pid())); err != nil || !strings.Contains(string(data), s.Cgroup("c")+"\n") {
				t.Errorf("the container is not in its own cgroup, but in\n%s", data)
			}
			dir := filepath.Join(s.Dir, "checkpoint")
			c.Checkpoint(ctx, dir, &options.CheckpointOptions{Exit: true})
			c.Delete(ctx)
			if _, err := os.Stat(state); err == nil {
				t.Errorf("%s is still there", state)
			}
			s.Poll(ctx, "the shim to end", func() bool { return !runs(shim, "containerd-shim") })
			removeCgroup()

			work := filepath.Join(s.Dir, "criu-work")
			c = newContainer("c", &options.Options{CriuImagePath: dir, CriuWorkPath: work, IoUid: 1000, IoGid: 1001}, "false")
			c.Start(ctx)
			if out := c.Exec(ctx, "cat", "/proc/1/comm"); out != "sleep\n" {
				t.Errorf("init is %q, want the restored sleep", out)
			}
			called("restore", work)
			if _, err := os.Stat(filepath.Join(work, layout.RestoreLog)); err != nil {
				t.Errorf("CRIU has worked elsewhere: %v", err)
			}
			if code := c.Kill(ctx, syscall.SIGKILL); code != 137 {
				t.Errorf("exit code %d, want 137", code)
			}
			c.Delete(ctx)

			// There is no systemd here, so the runtime refuses.
			c = newContainer("systemd", &options.Options{SystemdCgroup: true}, "true")
			_ = c.Create(ctx)
			called("create", "--systemd-cgroup")
		})
	}
}

// stdoutOwner returns who owns the stdout of the process that runs a program.
func stdoutOwner(t *testing.T, program string) string {
	t.Helper()
	procs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, proc := range procs {
		cmdline, err := os.ReadFile(filepath.Join(proc, "cmdline"))
		if err != nil || !strings.HasPrefix(string(cmdline), program+"\x00") {
			continue
		}
		info, err := os.Stat(filepath.Join(proc, "fd/1"))
		if err != nil {
			t.Fatal(err)
		}
		st := info.Sys().(*syscall.Stat_t)
		return fmt.Sprintf("%d:%d", st.Uid, st.Gid)
	}
	t.Fatalf("no process runs %s", program)
	return ""
}

// toml spells options as CRI's configuration file does.
func toml(o *options.Options) string {
	return fmt.Sprintf("BinaryName = %q\nRoot = %q\nNoPivotRoot = %v\nNoNewKeyring = %v\nShimCgroup = %q\n"+
		"IoUid = %d\nIoGid = %d\nSystemdCgroup = %v\nCriuImagePath = %q\nCriuWorkPath = %q\n",
		o.BinaryName, o.Root, o.NoPivotRoot, o.NoNewKeyring, o.ShimCgroup,
		o.IoUid, o.IoGid, o.SystemdCgroup, o.CriuImagePath, o.CriuWorkPath)
}

// makeCgroup makes a cgroup.
func makeCgroup(t *testing.T, path string) (_ string, remove func()) {
	t.Helper()
	if cgroups.Mode() == cgroups.Unified {
		dir := filepath.Join("/sys/fs/cgroup", path)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		return path, func() { emptied(t, func() error { return os.Remove(dir) }) }
	}
	cg, err := cgroup1.New(cgroup1.StaticPath(path), &specs.LinuxResources{})
	if err != nil {
		t.Fatal(err)
	}
	return path, func() { emptied(t, cg.Delete) }
}

// emptied removes a cgroup once the last process has left it, which a dead one
// has when it is reaped.
func emptied(t *testing.T, remove func() error) {
	t.Helper()
	err := remove()
	for end := time.Now().Add(stack.WaitTimeout()); err != nil && time.Now().Before(end); err = remove() {
		time.Sleep(10 * time.Millisecond)
	}
	if err != nil {
		t.Error(err)
	}
}

// TestMissingShimCgroup checks that a cgroup that does not exist is an error,
// and that no shim is left.
func TestMissingShimCgroup(t *testing.T) {
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	o := s.RuncOptions("")
	o.ShimCgroup = s.CgroupPath("missing")
	c := s.NewContainerWith(ctx, "c", stack.Busybox, []client.NewContainerOpts{client.WithRuntime(s.Runtime(), o)})
	if err := c.Create(ctx); err == nil || !strings.Contains(err.Error(), "shim_cgroup") {
		t.Errorf("create: %v; want an error that names shim_cgroup", err)
	}
}

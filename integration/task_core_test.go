package integration

import (
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/typeurl/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/stasis-run/stasis/integration/stack"
)

// TestTaskCore does what every client does, by whatever name Stasis runs,
// under both containerds and on both runtimes.
func TestTaskCore(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		opts stack.Options
		// byPath names Stasis by its path, in a task that runs as
		// io.containerd.runc.v2.
		byPath bool
	}{
		"by name":              {opts: stack.Options{}},
		"by path":              {opts: stack.Options{Upstream: true}, byPath: true},
		"drop-in":              {opts: stack.Options{DropIn: true}},
		"crun":                 {opts: stack.Options{Crun: true}},
		"2.1, by name":         {opts: stack.Options{Version: "2.1"}},
		"1.7, by name":         {opts: stack.Options{Version: "1.7"}},
		"1.7, by path":         {opts: stack.Options{Version: "1.7", Upstream: true}, byPath: true},
		"1.7, drop-in":         {opts: stack.Options{Version: "1.7", DropIn: true}},
		"1.7, drop-in on crun": {opts: stack.Options{Version: "1.7", DropIn: true, Crun: true}},
	} {
		t.Run(name, func(t *testing.T) {
			s := stack.Start(t, tc.opts)
			ctx := s.Ctx()
			watch := watchEvents(t, s)
			must := func(what string, err error) {
				t.Helper()
				if err != nil {
					t.Fatalf("%s: %v", what, err)
				}
			}
			shim, err := stack.Shim()
			must("shim", err)
			var opts []client.NewTaskOpts
			if tc.byPath {
				opts = append(opts, client.WithRuntimePath(shim))
			}
			c := s.NewContainer(ctx, "c", stack.Busybox, stack.Args("sh", "-c", "echo out; echo err >&2; read line; echo $line; exit 3"))
			c.Stdin = strings.NewReader("in\n")
			// Created only, it can be killed and deleted as well.
			must("create", c.Create(ctx, opts...))
			if got := shimPath(t, c); got != shim {
				t.Errorf("the shim is %s, want %s", got, shim)
			}
			if status := c.Status(ctx); status != client.Created {
				t.Errorf("status %s, want created", status)
			}
			if code := c.Kill(ctx, syscall.SIGKILL); code != 137 {
				t.Errorf("exit code %d, want 137", code)
			}
			c.DeleteTask(ctx)

			c.Stdin = nil
			spec, err := c.Spec(ctx)
			must("spec", err)
			spec.Process.Args = []string{"sh", "-c", "trap 'exit 3' USR1; echo out; echo err >&2; sleep 1000 & wait"}
			must("spec", c.Update(ctx, withSpec(spec)))
			c.Start(ctx, opts...)
			c.Stdout.WaitFor(ctx, "out\n")
			c.Stderr.WaitFor(ctx, "err\n")
			must("pause", c.Task.Pause(ctx))
			if status := c.Status(ctx); status != client.Paused {
				t.Errorf("status %s, want paused", status)
			}
			must("resume", c.Task.Resume(ctx))
			must("update", c.Task.Update(ctx, client.WithResources(&specs.LinuxResources{Pids: &specs.LinuxPids{Limit: new(int64(77))}})))
			if got, err := readCgroup(s, "pids", "c", "pids.max"); err != nil || got != "77" {
				t.Errorf("pids.max is %q, %v; want 77", got, err)
			}
			_, err = c.Task.Metrics(ctx)
			must("metrics", err)
			if r, err := c.ExecErr(ctx, "sh", "-c", "exit 4"); err != nil || r.Code != 4 {
				t.Errorf("exec: %+v, %v", r, err)
			}
			if code := c.Kill(ctx, syscall.SIGUSR1); code != 3 {
				t.Errorf("exit code %d, want 3", code)
			}
			c.Delete(ctx)

			watch.waitFor(ctx, "/tasks/delete", 2)
			want := "create exit delete create start paused resumed exec-added exec-started exit exit delete"
			if got := topics(t, watch, "c"); got != want {
				t.Errorf("events %s, want %s", got, want)
			}
		})
	}
}

// withSpec replaces a container's spec.
func withSpec(spec *specs.Spec) client.UpdateContainerOpts {
	return client.UpdateContainerOpts(client.WithSpec(spec))
}

// TestPidsDetails checks that clients see which process is which exec's.
func TestPidsDetails(t *testing.T) {
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	c := s.NewContainer(ctx, "c", stack.Busybox, stack.Args("sleep", "1000"))
	c.Start(ctx)
	p, err := c.Task.Exec(ctx, "e", &specs.Process{Args: []string{"sleep", "1000"}, Cwd: "/", Env: []string{"PATH=/bin"}}, cio.NullIO)
	if err == nil {
		err = p.Start(ctx)
	}
	if err != nil {
		t.Fatal(err)
	}
	pids, err := c.Task.Pids(ctx)
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(pids, func(info client.ProcessInfo) bool { return info.Pid == p.Pid() })
	if i < 0 || len(pids) != 2 {
		t.Fatalf("pids %v: want that of init, %d, and that of the exec, %d", pids, c.Task.Pid(), p.Pid())
	}
	var d options.ProcessDetails
	if err := typeurl.UnmarshalTo(pids[i].Info, &d); err != nil || d.ExecID != "e" {
		t.Errorf("details %v, %v; want exec e", &d, err)
	}
}

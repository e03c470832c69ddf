package integration

import (
	"fmt"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/errdefs"

	"github.com/stasis-run/stasis/integration/stack"
)

var _ stack.TB = testing.TB(nil)

// TestSmoke runs, looks into, kills and deletes a container, on everything
// that a stack can consist of.
func TestSmoke(t *testing.T) {
	for name, opts := range map[string]stack.Options{
		"stasis":        {},
		"drop-in":       {DropIn: true},
		"crun":          {Crun: true},
		"1.7":           {Version: "1.7"},
		"1.7 drop-in":   {Version: "1.7", DropIn: true},
		"upstream":      {Upstream: true},
		"upstream 1.7":  {Upstream: true, Version: "1.7"},
		"upstream crun": {Upstream: true, Crun: true},
	} {
		t.Run(name, func(t *testing.T) {
			s := stack.Start(t, opts)
			ctx := s.Ctx()
			c := s.NewContainer(ctx, "c", stack.Busybox, stack.Args("sh", "-c", "echo hi; exec sleep 1000"))
			c.Start(ctx)
			c.Stdout.WaitFor(ctx, "hi\n")
			if out := c.Exec(ctx, "echo", "there"); out != "there\n" {
				t.Errorf("exec printed %q", out)
			}
			if r, err := c.ExecErr(ctx, "sh", "-c", "echo oops >&2; exit 3"); err != nil || r.Code != 3 || r.Stderr != "oops\n" {
				t.Errorf("exec: %+v, %v; want exit code 3 and oops on stderr", r, err)
			}
			s.Kill9()
			s.Restart()
			c.Load(ctx)
			if code := c.Kill(ctx, syscall.SIGKILL); code != 137 {
				t.Errorf("exit code %d, want 137", code)
			}
			c.Delete(ctx)
		})
	}
}

// TestFaults checks that faultrunc does what tests ask of it, and nothing else.
func TestFaults(t *testing.T) {
	// What upstream's shim leaves behind when it is killed.
	leaks := []string{"shim socket", "runc-process"}
	s := stack.Start(t, stack.Options{Upstream: true, KnownLeaks: leaks})
	ctx := s.Ctx()
	f := s.Faults()
	c := s.NewContainer(ctx, "c", stack.Busybox, stack.Args("sleep", "1000"))
	dir := filepath.Join(s.Dir, "checkpoint")

	f.Fail("create", stack.Before, "as requested")
	if err := c.StartErr(ctx); err == nil || !strings.Contains(err.Error(), "as requested") {
		t.Fatalf("create: %v, want it to fail as requested", err)
	}
	f.Clear("create")

	// Two parents of the container's process have come and gone.
	f.Hold("create", stack.After)
	created := make(chan error)
	go func() { created <- c.StartErr(ctx) }()
	f.WaitReached(ctx, "create", stack.After)
	select {
	case err := <-created:
		t.Fatalf("create did not wait: %v", err)
	default:
	}
	f.Release("create", stack.After)
	if err := <-created; err != nil {
		t.Fatal(err)
	}

	f.Hold("exec", stack.After)
	execed := make(chan error)
	go func() {
		r, err := c.ExecErr(ctx, "sh", "-c", "exit 7")
		if err == nil && r.Code != 7 {
			err = fmt.Errorf("exec: exit code %d, want 7", r.Code)
		}
		execed <- err
	}()
	f.WaitReached(ctx, "exec", stack.After)
	f.Release("exec", stack.After)
	if err := <-execed; err != nil {
		t.Error(err)
	}

	f.Hold("checkpoint", stack.During("Dumping task"))
	dumped := make(chan error)
	go func() { dumped <- c.CheckpointErr(ctx, dir, nil) }()
	f.WaitReached(ctx, "checkpoint", stack.During(""))
	select {
	case err := <-dumped:
		t.Fatalf("checkpoint did not wait: %v", err)
	default:
	}
	f.Release("checkpoint", stack.During(""))
	if err := <-dumped; err != nil {
		t.Fatal(err)
	}

	// Before CRIU puts its parasite into the process: that dies without CRIU.
	f.KillCRIU("checkpoint", "Version:")
	if err := c.CheckpointErr(ctx, filepath.Join(s.Dir, "killed"), nil); err == nil {
		t.Fatal("checkpoint succeeded without CRIU")
	}
	f.Clear("checkpoint")
	f.Fail("checkpoint", stack.After, "as requested")
	if err := c.CheckpointErr(ctx, dir, nil); err == nil {
		t.Fatal("checkpoint did not fail as requested")
	}
	f.Clear("checkpoint")
	c.Checkpoint(ctx, dir, &options.CheckpointOptions{Exit: true})
	c.Restore(ctx, dir)
	c.Kill(ctx, syscall.SIGKILL)
	c.DeleteTask(ctx)

	c.Start(ctx)
	f.KillShim("exec", stack.Before)
	if _, err := c.ExecErr(ctx, "true"); err == nil {
		t.Error("exec succeeded without a shim")
	}
	// As long as it takes containerd to find out.
	s.Poll(ctx, "the task to end", func() bool {
		_, err := c.Task.Status(ctx)
		return errdefs.IsNotFound(err)
	})
}

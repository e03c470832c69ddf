package integration

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"

	"github.com/stasis-run/stasis/checkpoint/api"
	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/integration/stack"
	"github.com/stasis-run/stasis/process"
)

// freeze has the shim make a checkpoint by its own service.
func freeze(ctx context.Context, conn *ttrpc.Client, r *api.CheckpointRequest) (*api.CheckpointResult, error) {
	stream, err := api.NewCheckpointsClient(conn).Checkpoint(ctx, r)
	if err != nil {
		return nil, errgrpc.ToNative(err)
	}
	for {
		u, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil, errors.New("no result")
		}
		if err != nil {
			return nil, errgrpc.ToNative(err)
		}
		if r := u.GetResult(); r != nil {
			return r, nil
		}
	}
}

// ownService are the runtimes and releases under which the shim's own service is
// looked at.
var ownService = map[string]stack.Options{
	"runc": {}, "crun": {Crun: true}, "1.7": {Version: "1.7", DropIn: true},
}

// TestFreeze checkpoints by the shim's own service: the images, a copy of the
// writable layer of the very moment, and a container that runs on, or is paused
// still, or has ended.
func TestFreeze(t *testing.T) {
	t.Parallel()
	for name, opts := range ownService {
		t.Run(name, func(t *testing.T) {
			s := stack.Start(t, opts)
			ctx := s.Ctx()
			c := s.NewContainer(ctx, "c", stack.Busybox,
				stack.Args("sh", "-c", "mkdir /d; rm /etc/hostname; i=0; while :; do i=$((i+1)); echo $i > /d/n.tmp; mv /d/n.tmp /d/n; done"))
			c.Start(ctx)
			s.Poll(ctx, "the counter", func() bool {
				r, err := c.ExecErr(ctx, "cat", "/d/n")
				return err == nil && r.Code == 0
			})
			conn := dialShim(t, c)
			dir, upper := filepath.Join(s.Dir, "images"), filepath.Join(s.Dir, "upper")
			r, err := freeze(ctx, conn, &api.CheckpointRequest{Id: "c", ImagePath: dir, RootfsPath: upper})
			if err != nil {
				t.Fatal(err)
			}
			if !r.RootfsIsUpper || r.FrozenNs == 0 || r.ImageBytes == 0 || r.RuntimeName == "" || r.CriuVersion == "" || r.Criu.GetPagesWritten() == 0 || len(r.Stages) == 0 {
				t.Errorf("result %v", r)
			}
			for _, name := range []string{layout.Manifest, layout.Inventory, layout.DumpLog, layout.DumpStats} {
				if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
					t.Error(err)
				}
			}
			if st := c.Status(ctx); st != client.Running {
				t.Errorf("%s after the checkpoint", st)
			}
			// It runs on, and the copy stays as it was.
			was := readFile(t, filepath.Join(upper, "d", "n"))
			s.Poll(ctx, "the counter", func() bool { return c.Exec(ctx, "cat", "/d/n") != was })
			if now := readFile(t, filepath.Join(upper, "d", "n")); now != was {
				t.Errorf("the copy changes: %q, was %q", now, was)
			}

			// Paused stays paused.
			if err := c.Task.Pause(ctx); err != nil {
				t.Fatal(err)
			}
			must(t, os.RemoveAll(upper))
			if _, err := freeze(ctx, conn, &api.CheckpointRequest{Id: "c", ImagePath: dir, RootfsPath: upper}); err != nil {
				t.Fatal(err)
			}
			if st := c.Status(ctx); st != client.Paused {
				t.Errorf("%s after a checkpoint of a paused container", st)
			}
			if err := c.Task.Resume(ctx); err != nil {
				t.Fatal(err)
			}

			// And with exit it ends, and is as any that was killed.
			if _, err := freeze(ctx, conn, &api.CheckpointRequest{Id: "c", ImagePath: dir, Exit: true}); err != nil {
				t.Fatal(err)
			}
			if code := c.Wait(ctx); code != 137 {
				t.Errorf("exit code %d", code)
			}
			c.DeleteTask(ctx)
			c.Restore(ctx, dir)
			c.Kill(ctx, syscall.SIGKILL)
			c.Delete(ctx)
			must(t, os.RemoveAll(dir))
			must(t, os.RemoveAll(upper))
		})
	}
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestFreezeFails has the shim's own service fail in every way: the container
// runs on, and nothing is left.
func TestFreezeFails(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	f := s.Faults()
	c := s.NewContainer(ctx, "c", stack.Busybox, stack.Args("sleep", "1000"))
	c.Start(ctx)
	dir, upper := filepath.Join(s.Dir, "images"), filepath.Join(s.Dir, "upper")
	request := func() *api.CheckpointRequest {
		return &api.CheckpointRequest{Id: "c", ImagePath: dir, RootfsPath: upper, Options: &api.CRIUOptions{}}
	}
	whole := func(t *testing.T) {
		t.Helper()
		if st := c.Status(ctx); st != client.Running {
			t.Errorf("the container is %s", st)
		}
		c.Exec(ctx, "true") // which a frozen one cannot
		for _, path := range []string{dir, upper} {
			if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%s is left (%v)", path, err)
			}
		}
	}
	for name, tc := range map[string]struct {
		change func(*api.CheckpointRequest)
		is     func(error) bool
		says   string
	}{
		"no such container":     {func(r *api.CheckpointRequest) { r.Id = "d" }, errdefs.IsNotFound, "d"},
		"relative images":       {func(r *api.CheckpointRequest) { r.ImagePath = "images" }, errdefs.IsInvalidArgument, "image_path"},
		"no images":             {func(r *api.CheckpointRequest) { r.ImagePath = "" }, errdefs.IsInvalidArgument, "image_path"},
		"relative rootfs":       {func(r *api.CheckpointRequest) { r.RootfsPath = "upper" }, errdefs.IsInvalidArgument, "rootfs_path"},
		"remap without exit":    {func(r *api.CheckpointRequest) { r.Options.LinkRemap = true }, errdefs.IsInvalidArgument, "link_remap"},
		"a copy with exit":      {func(r *api.CheckpointRequest) { r.Exit = true }, errdefs.IsInvalidArgument, "rootfs_path with exit"},
		"no sum with exit":      {func(r *api.CheckpointRequest) { r.Exit, r.RootfsPath, r.LeaveSum = true, "", true }, errdefs.IsInvalidArgument, "leave_sum with exit"},
		"rootfs exists already": {func(r *api.CheckpointRequest) { r.RootfsPath = s.TempDir() }, errdefs.IsAlreadyExists, "rootfs_path"},
	} {
		t.Run(name, func(t *testing.T) {
			r := request()
			tc.change(r)
			_, err := freeze(ctx, dialShim(t, c), r)
			if err == nil || !tc.is(err) || !strings.Contains(err.Error(), tc.says) {
				t.Errorf("error %v, want one that says %q", err, tc.says)
			}
			if _, err := os.Stat(s.TempDir()); err != nil {
				t.Error(err)
			}
			whole(t)
		})
	}
	t.Run("the runtime fails", func(t *testing.T) {
		f.Fail("checkpoint", stack.Before, "as requested")
		defer f.Clear("checkpoint")
		_, err := freeze(ctx, dialShim(t, c), request())
		if err == nil || !strings.Contains(err.Error(), "as requested") {
			t.Errorf("error %v", err)
		}
		whole(t)
	})
	for name, when := range map[string]stack.When{"before": stack.Before, "in": frozen, "after": stack.After} {
		t.Run(fmt.Sprintf("the client goes away %s the dump", name), func(t *testing.T) {
			f.Hold("checkpoint", when)
			conn := dialShim(t, c)
			failed := make(chan error, 1)
			go func() {
				_, err := freeze(ctx, conn, request())
				failed <- err
			}()
			f.WaitReached(ctx, "checkpoint", when)
			conn.Close()
			if err := <-failed; err == nil {
				t.Error("a result without a connection")
			}
			// The shim ends the runtime, which would wait for ever.
			s.Poll(ctx, "the shim to give up", func() bool {
				_, err := os.Lstat(dir)
				return errors.Is(err, os.ErrNotExist)
			})
			f.Clear("checkpoint")
			whole(t)
		})
	}
	c.Kill(ctx, syscall.SIGKILL)
	c.Delete(ctx)
}

// frozen is when the shim has frozen the container, and copies its files, and CRIU is about
// to look at it.
var frozen = stack.During("freezing cgroup")

// TestFreezeKilled kills the shim, and containerd, while the container is frozen
// for a checkpoint. Without its shim it ends, as at any other time, and nothing is
// left; containerd's death it does not notice.
func TestFreezeKilled(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{KnownLeaks: []string{"runc-process"}})
	ctx := s.Ctx()
	f := s.Faults()
	dir, upper := filepath.Join(s.Dir, "images"), filepath.Join(s.Dir, "upper")
	start := func(id string) (*stack.Container, chan error) {
		c := s.NewContainer(ctx, id, stack.Busybox, stack.Args("sleep", "1000"))
		c.Start(ctx)
		f.Hold("checkpoint", frozen)
		failed := make(chan error, 1)
		conn := dialShim(t, c)
		go func() {
			_, err := freeze(ctx, conn, &api.CheckpointRequest{Id: id, ImagePath: dir, RootfsPath: upper})
			failed <- err
		}()
		f.WaitReached(ctx, "checkpoint", frozen)
		return c, failed
	}

	c, failed := start("containerd")
	s.Kill9()
	f.Release("checkpoint", frozen)
	must(t, <-failed)
	s.Restart()
	c.Load(ctx)
	c.Exec(ctx, "true") // which a frozen one cannot
	must(t, os.RemoveAll(dir))
	must(t, os.RemoveAll(upper))
	c.Kill(ctx, syscall.SIGKILL)
	c.Delete(ctx)
	f.Clear("checkpoint")

	c, failed = start("shim")
	exited, err := c.Task.Wait(ctx)
	must(t, err)
	must(t, syscall.Kill(shimPid(t, c), syscall.SIGKILL))
	if err := <-failed; err == nil {
		t.Error("a result without a shim")
	}
	<-exited
	f.Clear("checkpoint")
	c.Task = nil // containerd has deleted it
	c.Delete(ctx)
	must(t, os.RemoveAll(dir))
	must(t, os.RemoveAll(upper))
}

// TestFreezeExec freezes a container whose process has threads and executes its
// program over and over. The freezer of cgroup v1 can stop such a process where it
// waits for the end of its other threads, which are frozen already.
func TestFreezeExec(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	c := s.NewContainer(ctx, "c", stack.Python, stack.Args("python3", "-uc", `
import os, sys, threading, time
print("up")
for _ in range(100): threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
os.execv(sys.executable, sys.orig_argv)`))
	c.Start(ctx)
	c.Stdout.WaitFor(ctx, "up\nup\n")
	spec, err := c.Spec(ctx)
	must(t, err)
	group, err := process.LoadCgroup(int(c.Task.Pid()), spec.Linux.CgroupsPath)
	must(t, err)
	for i := range 200 {
		must(t, group.Freeze())
		if err := group.WaitFrozen(ctx); err != nil {
			t.Fatalf("freeze %d: %v", i, err)
		}
		must(t, group.Thaw())
		// Wherever it is by the next time.
		for range i % 20 {
			goruntime.Gosched()
		}
	}
	c.Kill(ctx, syscall.SIGKILL)
	c.Delete(ctx)
}

package integration

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/oci"

	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/integration/stack"
)

const (
	stasisRuntime   = "io.containerd.stasis.v1"
	upstreamRuntime = "io.containerd.runc.v2"
)

// TestRestoreForeign restores checkpoints that others have made: what options
// they were made with is found in their images.
func TestRestoreForeign(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	noManifest := func(t *testing.T, dir string) {
		t.Helper()
		if _, err := os.Stat(filepath.Join(dir, layout.Manifest)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("a manifest: %v", err)
		}
	}
	for name, args := range map[string][]string{
		"runc":                 {"--tcp-established", "--file-locks"},
		"runc, more than need": {"--tcp-established", "--file-locks", "--ext-unix-sk", "--shell-job"},
	} {
		t.Run(name, func(t *testing.T) {
			c := newProbe(ctx, t, s, "probe")
			before := c.Probe(ctx)
			dir := filepath.Join(s.Dir, "checkpoints", name)
			runcCheckpoint(t, s, c, dir, args...)
			noManifest(t, dir)
			c.Restore(ctx, dir)
			checkSame(t, before, c.Probe(ctx))
			c.Kill(ctx, syscall.SIGKILL)
			c.Delete(ctx)
		})
	}
	t.Run("runc, terminal", func(t *testing.T) {
		c := s.NewContainer(ctx, "terminal", stack.Busybox, oci.WithTTY, stack.Args("sh", "-c", "echo up; while sleep 0.01; do :; done"))
		c.Start(ctx)
		c.Stdout.WaitFor(ctx, "up")
		dir := filepath.Join(s.Dir, "checkpoints", "terminal")
		runcCheckpoint(t, s, c, dir)
		noManifest(t, dir)
		c.Restore(ctx, dir)
		runsOn(t, ctx, c)
		c.Kill(ctx, syscall.SIGKILL)
		c.Delete(ctx)
	})
	t.Run("upstream", func(t *testing.T) {
		img := s.Image(ctx, stack.Probe)
		c := s.NewContainerWith(ctx, "upstream", img.Name(),
			[]client.NewContainerOpts{client.WithRuntime(upstreamRuntime, s.RuncOptions(""))}, stack.ProbeArgs())
		c.StartProbe(ctx)
		before := c.Probe(ctx)
		dir := filepath.Join(s.Dir, "checkpoints", "upstream")
		c.Checkpoint(ctx, dir, everything())
		noManifest(t, dir)
		c = underOther(ctx, t, s, c, stasisRuntime)
		c.Restore(ctx, dir)
		checkSame(t, before, c.Probe(ctx))
		c.Kill(ctx, syscall.SIGKILL)
		c.Delete(ctx)
	})
}

// TestRestoreByUpstream has containerd's own shim restore a checkpoint of ours.
// It passes no options on, so the container has nothing that needs one.
func TestRestoreByUpstream(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	c := startProbe(ctx, s, "c", stack.ProbeArgs("-skip", "tcp,listen,udp,flock,fcntl,ofd"))
	before := c.Probe(ctx)
	dir := filepath.Join(s.Dir, "checkpoint")
	c.Checkpoint(ctx, dir, &options.CheckpointOptions{Exit: true})
	c = underOther(ctx, t, s, c, upstreamRuntime)
	c.Restore(ctx, dir)
	checkSame(t, before, c.Probe(ctx))
	c.Kill(ctx, syscall.SIGKILL)
	c.Delete(ctx)
}

// runcCheckpoint has runc alone checkpoint a container, which ends, and deletes
// its task.
func runcCheckpoint(t *testing.T, s *stack.Stack, c *stack.Container, dir string, args ...string) {
	t.Helper()
	args = append([]string{"--root", filepath.Join("/run/containerd/runc", s.Namespace), "checkpoint",
		"--image-path", dir, "--work-path", filepath.Join(s.Dir, "work")}, args...)
	cmd := exec.CommandContext(s.Ctx(), s.OCIRuntime(), append(args, c.ID())...)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", cmd, err, out)
	}
	c.Wait(s.Ctx())
	c.DeleteTask(s.Ctx())
}

// underOther makes the same container of another runtime, with its rootfs. It
// has no task.
func underOther(ctx context.Context, t *testing.T, s *stack.Stack, c *stack.Container, runtime string) *stack.Container {
	t.Helper()
	info, err := c.Info(ctx)
	if err != nil {
		t.Fatal(err)
	}
	spec, err := c.Spec(ctx)
	if err != nil {
		t.Fatal(err)
	}
	img, err := c.Image(ctx)
	if err != nil {
		t.Fatal(err)
	}
	// Else nobody refers to it for a moment, and it is collected as garbage.
	_, err = s.Client().SnapshotService(info.Snapshotter).Update(ctx, snapshots.Info{
		Name: info.SnapshotKey, Labels: map[string]string{"containerd.io/gc.root": "kept"},
	}, "labels.containerd.io/gc.root")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Container.Delete(ctx); err != nil {
		t.Fatal(err)
	}
	other, err := s.Client().NewContainer(ctx, c.ID(),
		client.WithImage(img),
		client.WithSnapshotter(info.Snapshotter),
		client.WithSnapshot(info.SnapshotKey),
		client.WithSpec(spec),
		client.WithRuntime(runtime, s.RuncOptions("")))
	if err != nil {
		t.Fatal(err)
	}
	return s.Wrap(other)
}

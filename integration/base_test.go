package integration

import (
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/core/images"

	"github.com/stasis-run/stasis/integration/stack"
)

// TestBase checkpoints a container whose image has lost its name to another, or has none:
// a checkpoint builds on what the container's snapshot was made from.
func TestBase(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	store := s.Client().ImageService()
	const app = "stasis.test/app:1"
	is := s.Image(ctx, stack.Busybox)
	other := s.ImportRootfs(ctx, "stasis.test/other:1", stack.Rootfs("busybox"), t.TempDir())
	if is.Target().Digest == other.Target().Digest {
		t.Fatal("the images are the same")
	}
	_, err := store.Create(ctx, images.Image{Name: app, Target: is.Target()})
	must(t, err)
	c := s.NewContainer(ctx, "c", app, stack.Args("sh", "-c", "echo kept >/kept; rm /etc/group; echo ready; exec sleep 100000"))
	c.Start(ctx)
	c.Stdout.WaitFor(ctx, "ready")
	// restores tells that checkpoint comes back on the image of the container.
	restores := func(checkpoint string) {
		t.Helper()
		s.Stasis("restore", checkpoint, "d", "--runtime", s.Runtime())
		d := load(t, s, "d")
		record, err := d.Container.Info(ctx)
		must(t, err)
		base := s.Stasis("inspect", record.Image, "--output", "json")
		if !strings.Contains(base, stack.Busybox) || strings.Contains(base, "stasis.test/other") {
			t.Errorf("%s: not of %s: %s", checkpoint, stack.Busybox, base)
		}
		if out := d.Exec(ctx, "sh", "-c", "cat /kept; ls /etc/group 2>/dev/null; true"); out != "kept\n" {
			t.Errorf("%s: %q", checkpoint, out)
		}
		d.Kill(ctx, syscall.SIGKILL)
		d.Delete(ctx)
		s.Stasis("rm", record.Image)
	}
	file := filepath.Join(t.TempDir(), "c.tar")

	_, err = store.Update(ctx, images.Image{Name: app, Target: other.Target()}, "target")
	must(t, err)
	s.Stasis("checkpoint", "c", "stasis.test/moved:1")
	restores("stasis.test/moved:1")

	// A restored one, time and again under the name of what it was restored from.
	s.Stasis("checkpoint", "c", "stasis.test/gen:1")
	s.Stasis("restore", "stasis.test/gen:1", "e", "--runtime", s.Runtime())
	e := load(t, s, "e")
	for range 3 {
		s.Stasis("checkpoint", "e", "stasis.test/gen:1")
	}
	e.Kill(ctx, syscall.SIGKILL)
	e.Delete(ctx)
	s.Stasis("restore", "stasis.test/gen:1", "f", "--runtime", s.Runtime())
	f := load(t, s, "f")
	if out := f.Exec(ctx, "sh", "-c", "cat /kept; ls /etc/group 2>/dev/null; true"); out != "kept\n" {
		t.Errorf("the third generation: %q", out)
	}
	f.Kill(ctx, syscall.SIGKILL)
	f.Delete(ctx)
	all, err := store.List(ctx, "name~=stasis.test/gen@")
	must(t, err)
	if len(all) != 1 {
		t.Errorf("bases that are kept: %v", all)
	}
	for _, base := range all {
		must(t, store.Delete(ctx, base.Name))
	}

	s.Stasis("checkpoint", "c", "--output", file)
	restores(file)

	must(t, store.Delete(ctx, app))
	s.Stasis("checkpoint", "c", "stasis.test/gone:1")
	restores("stasis.test/gone:1")

	// Nothing is done with a container that would come back on another image.
	_, err = store.Create(ctx, images.Image{Name: app, Target: other.Target()})
	must(t, err)
	must(t, store.Delete(ctx, stack.Busybox, images.SynchronousDelete()))
	for _, args := range [][]string{{"stasis.test/never:1", "--exit"}, {"--output", file + ".never", "--exit"}, {"stasis.test/never:1", "--format", "podman"}} {
		out, err := s.StasisCommand(append([]string{"checkpoint", "c"}, args...)...).CombinedOutput()
		if err == nil || !strings.Contains(string(out), "is another now than the one that it was made from") {
			t.Errorf("checkpoint %q: %v, %s", args, err, out)
		}
	}
	c.Exec(ctx, "true")
	c.Kill(ctx, syscall.SIGKILL)
	c.Delete(ctx)
	checkTidy(t, s)
}

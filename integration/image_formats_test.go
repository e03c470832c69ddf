package integration

import (
	"archive/tar"
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/oci"
	"github.com/stasis-run/stasis/integration/stack"
)

// readImage reads a checkpoint image into a folder that ends with the test.
func readImage(ctx context.Context, t *testing.T, s *stack.Stack, name string, format oci.Format) *capture.Capture {
	t.Helper()
	img, err := s.Client().GetImage(ctx, name)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := oci.Detect(ctx, s.Client().ContentStore(), img.Target()); got != format || err != nil {
		t.Fatalf("%s is of format %q, %v; want %q", name, got, err, format)
	}
	c, err := oci.Read(ctx, s.Client().ContentStore(), img.Target(), filepath.Join(t.TempDir(), "capture"))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// saveImage writes a checkpoint image of a format and names it.
func saveImage(ctx context.Context, t *testing.T, s *stack.Stack, name string, format oci.Format, base string, c *capture.Capture, comp compression.Compression) client.Image {
	t.Helper()
	cl := s.Client()
	ctx, done, err := oci.WithLease(ctx, cl.LeasesService(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	var desc ocispec.Descriptor
	o := oci.Options{Compression: comp}
	switch format {
	case oci.Runnable:
		desc, err = oci.WriteRunnable(ctx, cl.ContentStore(), s.Image(ctx, base).Target(), c, o)
	case oci.Index:
		desc, err = oci.WriteIndex(ctx, cl.ContentStore(), s.Image(ctx, base).Target(), c, o)
	case oci.Podman:
		desc, err = oci.WritePodman(ctx, cl.ContentStore(), c, o)
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := oci.Save(ctx, cl.ContentStore(), cl.ImageService(), name, desc, nil); err != nil {
		t.Fatal(err)
	}
	img, err := cl.GetImage(ctx, name)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// noLeases checks that nothing is kept but by names.
func noLeases(ctx context.Context, t *testing.T, s *stack.Stack) {
	t.Helper()
	if left, err := s.Client().LeasesService().List(ctx); err != nil || len(left) > 0 {
		t.Errorf("leases are left: %+v, %v", left, err)
	}
}

// TestImageOfCtr reads a checkpoint that ctr made, writes it in containerd's format
// again, and has ctr restore that.
func TestImageOfCtr(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	// ctr has no flags for what these need.
	c := startProbe(ctx, s, "c", stack.ProbeArgs("-skip", "tcp,flock,fcntl,ofd"))
	before := c.Probe(ctx)
	s.Ctr("containers", "checkpoint", "--rw", "--image", "--task", "c", "stasis.test/theirs:1")
	c.Kill(ctx, syscall.SIGKILL)
	c.Delete(ctx)

	got := readImage(ctx, t, s, "stasis.test/theirs:1", oci.Index)
	if i := got.Info; i.ContainerID != "c" || i.Base.Name != stack.Probe || i.Base.Digest != s.Image(ctx, stack.Probe).Target().Digest.String() ||
		i.Runtime != stasisRuntime || i.Base.Snapshotter == "" || i.CRIU == "" || i.Checkpointed.IsZero() {
		t.Errorf("info %+v", i)
	}
	if got.Layer == nil || !bytes.Contains(got.Spec, []byte("/probe")) {
		t.Errorf("layer %v, spec %s", got.Layer, got.Spec)
	}

	// Nothing of theirs is left that ours could lean on.
	ours := saveImage(ctx, t, s, "stasis.test/ours:1", oci.Index, stack.Probe, got, compression.Zstd)
	s.Ctr("images", "delete", "--sync", "stasis.test/theirs:1")
	noLeases(ctx, t, s)
	s.Ctr("containers", "restore", "--rw", "--live", "again", ours.Name())
	loaded, err := s.Client().LoadContainer(ctx, "again")
	if err != nil {
		t.Fatal(err)
	}
	again := s.Wrap(loaded)
	again.Load(ctx)
	r, err := again.ProbeErr(ctx)
	if err == nil {
		err = r.Err()
	}
	if err != nil || r.ID != before.ID {
		t.Errorf("restored by ctr: %+v, %v", r, err)
	}

	// What `ctr tasks checkpoint` writes has less.
	ref := strings.TrimSpace(s.Ctr("tasks", "checkpoint", "again"))
	less := readImage(ctx, t, s, ref, oci.Index)
	if i := less.Info; i.ContainerID != "again" || i.Base.Name != stack.Probe || i.Runtime != "" || less.Layer == nil {
		t.Errorf("of a task: %+v", i)
	}
	again.Kill(ctx, syscall.SIGKILL)
	again.Delete(ctx)
}

// TestImageUnderRunc starts a runnable image with containerd's own shim: it
// begins afresh, on the files that the container had, by each snapshotter and
// compression.
func TestImageUnderRunc(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		snapshotter string
		compression compression.Compression
	}{
		{"overlayfs", compression.Zstd},
		{"overlayfs", compression.Uncompressed},
		{"native", compression.Gzip},
		{"erofs", compression.Zstd},
	} {
		t.Run(c.snapshotter, func(t *testing.T) {
			s := stack.Start(t, stack.Options{Snapshotter: c.snapshotter})
			ctx := s.Ctx()
			run := s.NewContainer(ctx, "run", stack.Busybox,
				stack.Args("sh", "-c", "echo saved >/etc/saved; rm -r /etc/passwd /var; mkdir -m 700 /new; echo up; exec sleep 1000"))
			run.Start(ctx)
			run.Stdout.WaitFor(ctx, "up")
			s.Ctr("containers", "checkpoint", "--rw", "--image", "--task", "run", "stasis.test/theirs:1")
			run.Kill(ctx, syscall.SIGKILL)
			run.Delete(ctx)

			got := readImage(ctx, t, s, "stasis.test/theirs:1", oci.Index)
			img := saveImage(ctx, t, s, "stasis.test/runnable:1", oci.Runnable, stack.Busybox, got, c.compression)
			s.Ctr("images", "delete", "--sync", "stasis.test/theirs:1")
			s.Ctr("images", "delete", "--sync", stack.Busybox)
			noLeases(ctx, t, s)
			if err := img.Unpack(ctx, c.snapshotter); err != nil {
				t.Fatal(err)
			}
			afresh := s.NewContainerWith(ctx, "afresh", img.Name(),
				[]client.NewContainerOpts{client.WithRuntime(upstreamRuntime, s.RuncOptions(""))}, stack.Args("sleep", "1000"))
			afresh.Start(ctx)
			if out := afresh.Exec(ctx, "sh", "-c", "cat /etc/saved; stat -c %a /new; ls -d /etc/passwd /var 2>&1; cat /proc/uptime >/dev/null; ls /.stasis"); out !=
				"saved\n700\nls: /etc/passwd: No such file or directory\nls: /var: No such file or directory\ncheckpoint\ninfo.json\nspec.json\n" {
				t.Errorf("afresh:\n%s", out)
			}
			afresh.Kill(ctx, syscall.SIGKILL)
			afresh.Delete(ctx)

			// It is still whole, and what it says of itself is true.
			again := readImage(ctx, t, s, img.Name(), oci.Runnable)
			if again.Info.ContainerID != "run" || !bytes.Equal(again.Spec, got.Spec) {
				t.Errorf("info %+v, spec %s", again.Info, again.Spec)
			}
			entries, err := os.ReadDir(again.Images)
			if err != nil || len(entries) == 0 {
				t.Errorf("images: %v, %v", entries, err)
			}
			var layer bytes.Buffer
			if err := again.Layer.WriteLayer(ctx, &layer); err != nil {
				t.Fatal(err)
			}
			if _, err := tar.NewReader(&layer).Next(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestImageCollected: when its name is deleted, nothing of a checkpoint stays,
// and all of its base does.
func TestImageCollected(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	c := s.NewContainer(ctx, "c", stack.Busybox, stack.Args("sleep", "1000"))
	c.Start(ctx)
	s.Ctr("containers", "checkpoint", "--rw", "--image", "--task", "c", "stasis.test/theirs:1")
	c.Kill(ctx, syscall.SIGKILL)
	c.Delete(ctx)
	got := readImage(ctx, t, s, "stasis.test/theirs:1", oci.Index)
	list := func() string { return s.Ctr("content", "list", "--quiet") }
	collect(ctx, t, s)
	before := list()
	for _, format := range []oci.Format{oci.Runnable, oci.Index, oci.Podman} {
		img := saveImage(ctx, t, s, "stasis.test/ours:1", format, stack.Busybox, got, compression.Zstd)
		collect(ctx, t, s)
		readImage(ctx, t, s, img.Name(), format)
		s.Ctr("images", "delete", "--sync", img.Name())
		if after := list(); after != before {
			t.Errorf("%s: content before\n%s\nafter\n%s", format, before, after)
		}
	}
}

// collect has containerd collect its garbage. By itself it may miss a deletion
// that comes while it does so, and then waits for the next one.
func collect(ctx context.Context, t *testing.T, s *stack.Stack) {
	t.Helper()
	l, err := s.Client().LeasesService().Create(ctx, leases.WithRandomID())
	if err == nil {
		err = s.Client().LeasesService().Delete(ctx, l, leases.SynchronousDelete)
	}
	if err != nil {
		t.Fatal(err)
	}
}

package integration

import (
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/stasis-run/stasis/integration/stack"
)

// layersOf returns the layers of an image in a stack's store.
func layersOf(t *testing.T, s *stack.Stack, ref string) []ocispec.Descriptor {
	t.Helper()
	ctx := s.Ctx()
	img, err := s.Client().ImageService().Get(ctx, ref)
	must(t, err)
	m, err := images.Manifest(ctx, s.Client().ContentStore(), img.Target, platforms.Default())
	must(t, err)
	return m.Layers
}

// uploads counts the blobs that the registry was sent, or, with a layer, how
// often it was that one.
func (r *registry) uploads(of ...ocispec.Descriptor) int {
	if len(of) == 0 {
		return r.requests("PUT", "/blobs/uploads/")
	}
	return r.requests("PUT", "sha256%3A"+of[0].Digest.Encoded())
}

// TestCLIMachine moves a container to another machine and back: a second containerd,
// with an empty store, that gets what it needs from the registry. What the
// registry has is not sent again, be it the image's layers, which it has in
// another repository, or those of the checkpoint before.
func TestCLIMachine(t *testing.T) {
	t.Parallel()
	here := stack.Start(t, stack.Options{})
	r := startRegistry(t, here, registryConfig{})
	ctx := here.Ctx()
	base := r.host + "/lib/busybox:1"
	here.Image(ctx, stack.Busybox)
	here.Ctr("images", "push", "--plain-http", base, stack.Busybox)
	here.Stasis("pull", base)
	baseLayers := layersOf(t, here, base)
	if n := r.uploads(baseLayers[0]); n != 1 {
		t.Fatalf("the registry's log has %d uploads of the image's layer, want 1", n)
	}

	c := here.NewContainer(ctx, "c", base, stack.Args("sh", "-c", counting))
	c.Start(ctx)
	counts(here, c)
	there := stack.Start(t, stack.Options{})
	for _, compress := range []string{"gzip", "none", "zstd"} {
		ref := r.host + "/backup/c:" + compress
		before, at := r.uploads(), count(t, c.Exec(ctx, "cat", "/n"))
		args := []string{"checkpoint", "c", ref, "--push", "--compress", compress}
		if compress == "zstd" {
			args = append(args, "--exit")
		}
		if out := here.Stasis(args...); out != ref+"\n" {
			t.Errorf("%s: checkpoint printed %q", compress, out)
		}
		// The config, the writable layer, the checkpoint.
		if n := r.uploads() - before; n != 3 {
			t.Errorf("%s: %d blobs were sent, want 3", compress, n)
		}
		for _, l := range baseLayers {
			if n := r.uploads(l); n != 1 {
				t.Errorf("%s: the image's layer %s was sent %d times", compress, l.Digest, n)
			}
		}

		if out := there.Stasis("restore", ref, "c-"+compress); out != "c-"+compress+"\n" {
			t.Errorf("%s: restore printed %q", compress, out)
		}
		d := load(t, there, "c-"+compress)
		if n := count(t, d.Exec(there.Ctx(), "cat", "/n")); n < at {
			t.Errorf("%s: the counter was at %d, and is at %d", compress, at, n)
		}
		countsOn(t, there, d)
		if out := d.Exec(there.Ctx(), "cat", "/changed", "/d/e/hard", "/d/soft", "/proc/1/fd/3"); out != "was\nwas\nwas\nheld\n" {
			t.Errorf("%s: files: %q", compress, out)
		}
		if compress != "zstd" {
			d.Kill(there.Ctx(), syscall.SIGKILL)
			d.Delete(there.Ctx())
		}
	}
	c.Wait(ctx)
	c.Delete(ctx)

	// And back, with only what has changed since.
	d := load(t, there, "c-zstd")
	d.Exec(there.Ctx(), "sh", "-c", "echo there > /been")
	last := count(t, d.Exec(there.Ctx(), "cat", "/n"))
	back := r.host + "/backup/c:back"
	before := r.uploads()
	there.Stasis("checkpoint", "c-zstd", back, "--push", "--exit")
	if n := r.uploads() - before; n != 3 {
		t.Errorf("back: %d blobs were sent, want 3", n)
	}
	for _, l := range append(layersOf(t, there, r.host+"/backup/c:zstd"), baseLayers...) {
		if n := r.uploads(l); n != 1 {
			t.Errorf("back: layer %s was sent %d times", l.Digest, n)
		}
	}
	d.Wait(there.Ctx())
	d.Delete(there.Ctx())

	here.Stasis("restore", back, "c")
	c = load(t, here, "c")
	if n := count(t, c.Exec(ctx, "cat", "/n")); n < last {
		t.Errorf("the counter was at %d, and is at %d", last, n)
	}
	countsOn(t, here, c)
	if out := c.Exec(ctx, "cat", "/changed", "/been", "/proc/1/fd/3"); out != "was\nthere\nheld\n" {
		t.Errorf("back: files: %q", out)
	}
	c.Kill(ctx, syscall.SIGKILL)
	c.Delete(ctx)
	checkTidy(t, here)
	checkTidy(t, there)
}

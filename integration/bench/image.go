package main

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/images/archive"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/integration/stack"
)

// image measures checkpoints by the command line, from the call to an image in
// the store, beside what others need for the like.
func (b *bench) image(size size) {
	b.logf("stasis checkpoint, %v: %d times each", size, size.rounds)
	compressed := func(compress string) func(id, ref string) {
		return func(id, ref string) { b.s.Stasis("checkpoint", id, ref, "--compress", compress) }
	}
	c := b.startProbe(stasis, gap(size.mib))
	bundle := b.newBundle(stack.Probe, stack.Args(gap(size.mib)...))
	bundle.start()
	b.settleProbe(bundle.pid)
	b.rounds(size.rounds, []*row{
		{Name: fmt.Sprintf("stasis checkpoint %v: total", size), Unit: "ms"},
		{Name: fmt.Sprintf("stasis checkpoint %v: frozen", size), Unit: "ms", Target: target{raw, 1.15}},
	}, contender{stasis, func() []float64 { return b.toImage(c, size, compressed("none")) }},
		contender{raw, func() []float64 { return b.dump(size, bundle.pid, bundle.checkpoint) }})
	bundle.remove()
	b.kill(c)

	// To look at the clock ten thousand times a second, as a frozen time needs it,
	// is a load of its own, of which there would be two.
	quiet := gap(size.mib, "-every", "20ms")
	c = b.startProbe(stasis, quiet)
	defer b.kill(c)
	p := b.newPodman()
	defer p.remove()
	p.run(append([]string{"run", "--detach", "--name", "gap", "--network", "none", stack.Probe}, quiet...)...)
	b.settleProbe(func() int { return p.pid("gap") })
	for _, compress := range []string{"none", "zstd"} {
		b.logf("an image or archive, %s, %v: %d times each", compress, size, size.rounds)
		b.rounds(size.rounds, []*row{{
			Name: fmt.Sprintf("to an image %v, %s", size, compress), Unit: "ms", Target: target{podmanName, 0.6},
		}}, contender{stasis, func() []float64 { return b.toImage(c, size, compressed(compress))[:1] }},
			contender{podmanName, func() []float64 {
				file := filepath.Join(b.s.Dir, b.name("archive"))
				unix.Sync()
				b.warm(size)
				start := time.Now()
				p.run("container", "checkpoint", "--leave-running", "--compress", compress, "--export", file, "gap")
				figures := since(start)
				if err := os.Remove(file); err != nil {
					b.tb.Fatalf("%v", err)
				}
				return figures
			}})
	}
}

// toImage measures one checkpoint of it as an image, as dump does.
func (b *bench) toImage(c *stack.Container, size size, checkpoint func(id, ref string)) []float64 {
	ref := "localhost/bench/" + b.name("checkpoint") + ":1"
	figures := b.dump(size, func() int { return int(c.Task.Pid()) }, func(string) { checkpoint(c.ID(), ref) })
	b.removeImage(ref)
	return figures
}

// files measures checkpoints of a container with much in its writable layer.
func (b *bench) files(mib, rounds int) {
	b.logf("checkpoint with %d MiB of files: %d times each", mib, rounds)
	heap := size{16, rounds}
	containers := map[string]*stack.Container{}
	for _, shim := range shims {
		c := b.startProbe(shim, gap(heap.mib))
		defer b.kill(c)
		b.fill(fmt.Sprintf("/proc/%d/root/data", c.Task.Pid()), mib)
		containers[shim] = c
	}
	// Room for what is copied.
	room := size{mib, rounds}
	with := func(shim string, checkpoint func(id, ref string)) contender {
		return contender{shim, func() []float64 { return b.toImage(containers[shim], room, checkpoint) }}
	}
	name := fmt.Sprintf("checkpoint with %d MiB of files", mib)
	b.rounds(rounds, []*row{
		{Name: name + ": total", Unit: "ms"},
		{Name: name + ": frozen", Unit: "ms", Target: target{upstream, 0.1}},
	}, with(stasis, func(id, ref string) { b.s.Stasis("checkpoint", id, ref) }),
		with(upstream, func(id, ref string) { b.s.Ctr("containers", "checkpoint", "--rw", "--task", id, ref) }))
}

func (b *bench) fill(path string, mib int) {
	f, err := os.Create(path)
	if err == nil {
		_, err = io.CopyN(f, rand.Reader, int64(mib)<<20)
		f.Close()
	}
	if err != nil {
		b.tb.Fatalf("fill %s: %v", path, err)
	}
}

func (b *bench) removeImage(ref string) {
	if err := b.s.Client().ImageService().Delete(b.ctx, ref, images.SynchronousDelete()); err != nil {
		b.tb.Fatalf("remove checkpoint image: %v", err)
	}
}

// podman is a Podman with containers of its own, in the stack's folder.
type podman struct {
	b     *bench
	dir   string
	flags []string
}

func (b *bench) newPodman() *podman {
	dir := filepath.Join(b.s.Dir, "podman")
	p := &podman{b: b, dir: dir, flags: []string{
		"--root", filepath.Join(dir, "root"), "--runroot", filepath.Join(dir, "run"), "--tmpdir", filepath.Join(dir, "tmp")}}
	b.tb.Cleanup(p.remove)
	if err := os.Mkdir(dir, 0o700); err != nil {
		b.tb.Fatalf("%v", err)
	}
	if words := strings.Fields(p.run("--version")); len(words) > 0 {
		b.report.Machine.Versions = append(b.report.Machine.Versions, version{podmanName, words[len(words)-1]})
	}
	b.s.Image(b.ctx, stack.Probe)
	file := filepath.Join(dir, "image.tar")
	f, err := os.Create(file)
	if err == nil {
		err = b.s.Client().Export(b.ctx, f, archive.WithImage(b.s.Client().ImageService(), stack.Probe))
		f.Close()
	}
	if err != nil {
		b.tb.Fatalf("export an image for Podman: %v", err)
	}
	p.run("load", "--quiet", "--input", file)
	return p
}

func (p *podman) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, p.b.podman, append(p.flags, args...)...)
	cmd.Env = append(os.Environ(), "STASIS_TEST_ID="+p.b.s.ID, "TMPDIR="+p.b.s.TempDir())
	return cmd
}

func (p *podman) run(args ...string) string {
	cmd := p.command(p.b.ctx, args...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		p.b.tb.Fatalf("podman %s: %v (make setup installs it)\n%s", strings.Join(args, " "), err, stderr.String())
	}
	return strings.TrimSpace(string(out))
}

func (p *podman) pid(name string) (pid int) {
	fmt.Sscan(p.run("inspect", "--format", "{{.State.Pid}}", name), &pid)
	return pid
}

func (p *podman) remove() {
	_ = p.command(context.Background(), "rm", "--all", "--force", "--time=0").Run()
	// Podman mounts it onto itself and leaves it so.
	_ = unix.Unmount(filepath.Join(p.dir, "root", "overlay"), 0)
}

// Command bench measures Stasis beside what it stands in for: containerd's own
// shim (called upstream here), under the same containerd, and where that has a
// meaning runc by itself. Everything is measured in one run, the contenders in
// turn within each round, so that a machine whose speed drifts is as slow for
// one as for the other. It must run as root; `make bench` sets up what it needs.
//
//	bench [-quick] [-only latency,memory,checkpoint,image,rest] [-json FILE]
//
// See docs/performance.md for what the rows mean.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/oci"

	"github.com/stasis-run/stasis/integration/stack"
)

// The contenders.
const (
	stasis   = "stasis"
	upstream = "upstream"
	raw      = "runc"

	podmanName = "podman"
	cli        = "command line" // of Stasis, beside stasisd
)

// shims are the contenders that containerd runs containers with.
var shims = []string{stasis, upstream}

func main() {
	quick := flag.Bool("quick", false, "fewer runs and smaller heaps")
	only := flag.String("only", strings.Join(parts, ","), "comma-separated parts to run")
	podman := flag.String("podman", "podman", "the Podman to measure beside, a `program`; default: the setup's")
	file := flag.String("json", "bin/bench.json", "`file` to write the figures to; empty for none")
	flag.Parse()
	chosen := strings.Split(*only, ",")
	for _, p := range chosen {
		if !slices.Contains(parts, p) {
			fmt.Fprintf(os.Stderr, "bench: no part %q: they are %s\n", p, strings.Join(parts, ", "))
			os.Exit(2)
		}
	}
	os.Exit(stack.Main("bench", func(tb stack.TB) {
		b := newBench(tb, *quick)
		b.podman = *podman
		// Also of a run that fails in the middle: it took minutes.
		defer b.report.print(os.Stdout)
		for _, p := range chosen {
			b.measure(p)
		}
		if *file == "" {
			return
		}
		if err := b.report.write(*file); err != nil {
			tb.Fatalf("%v", err)
		}
	}))
}

var parts = []string{"latency", "memory", "checkpoint", "image", "rest"}

// bench is one run of the program.
type bench struct {
	tb     stack.TB
	s      *stack.Stack
	ctx    context.Context
	quick  bool
	podman string
	start  time.Time
	report report
	next   int // makes names unique
}

func newBench(tb stack.TB, quick bool) *bench {
	// One containerd for both shims: it has both in its PATH.
	s := stack.Start(tb, stack.Options{
		// Upstream's shim leaves the socket of a pod.
		KnownLeaks: []string{"shim socket"},
	})
	if s.Runtime() != runtimes[stasis] {
		tb.Fatalf("STASIS_UPSTREAM is set: there would be nothing to compare")
	}
	b := &bench{tb: tb, s: s, ctx: s.Ctx(), quick: quick, start: time.Now()}
	b.report.Machine = describeMachine(b.tool)
	return b
}

func (b *bench) measure(part string) {
	switch part {
	case "latency":
		b.latency()
	case "memory":
		b.memory()
	case "image":
		if b.quick {
			b.files(64, 2)
			b.image(size{64, 2})
			return
		}
		b.files(512, 3)
		b.image(size{1024, 6})
	case "rest":
		if b.quick {
			b.rest(size{64, 3}, 20)
			return
		}
		b.rest(size{512, 6}, 100)
	case "checkpoint":
		sizes := []size{{64, 12}, {512, 6}, {2048, 3}}
		if b.quick {
			sizes = []size{{64, 3}, {512, 3}}
		}
		for _, size := range sizes {
			b.checkpoint(size)
		}
	}
}

// few is n, or about a fifth of it in a quick run.
func (b *bench) few(n int) int {
	if b.quick {
		return max(2, n/5)
	}
	return n
}

// logf tells what is going on, for the run takes minutes.
func (b *bench) logf(format string, args ...any) {
	b.tb.Logf("%3.0f s  %s", time.Since(b.start).Seconds(), fmt.Sprintf(format, args...))
}

// tool returns the path of a program of the set-up.
func (b *bench) tool(name string) string {
	return filepath.Join(filepath.Dir(b.s.OCIRuntime()), name)
}

var runtimes = map[string]string{
	stasis:   "io.containerd.stasis.v1",
	upstream: "io.containerd.runc.v2",
}

// container makes a container for one of the shims. All get the same spec.
func (b *bench) container(shim, image string, opts ...oci.SpecOpts) *stack.Container {
	copts := []client.NewContainerOpts{client.WithRuntime(runtimes[shim], b.s.RuncOptions(""))}
	return b.s.NewContainerWith(b.ctx, b.name(shim), image, copts, opts...)
}

func (b *bench) name(prefix string) string {
	b.next++
	return fmt.Sprintf("%s-%d", prefix, b.next)
}

// kill ends a container and removes it.
func (b *bench) kill(c *stack.Container) {
	b.endTask(c)
	c.Delete(b.ctx)
}

func (b *bench) endTask(c *stack.Container) {
	c.Kill(b.ctx, 9)
	c.DeleteTask(b.ctx)
}

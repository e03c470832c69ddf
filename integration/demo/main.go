// Command demo is Stasis's main job, here and now: it starts a private
// containerd with the shim, runs a real server in a container, gives it data
// through a real connection, checkpoints it to an image, kills it, restores it
// under another name, and compares.
//
//	go run ./integration/demo -workload redis
//
// It needs root and what contrib/setup.sh installs (`make demo` sees to that),
// and leaves nothing behind.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"sort"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/oci"

	"github.com/stasis-run/stasis/integration/stack"
)

// A workload is a server with state, and a client that knows what it should be.
type workload interface {
	// spec is the image to run, and how.
	spec() (image string, opts []oci.SpecOpts)
	// connect waits for the server and keeps the connection.
	connect(ctx context.Context, addr string) error
	// load gives the server its data and says what it was.
	load() (string, error)
	// verify asks over the connection that was made before the checkpoint, and
	// over a new one, whether all is as it was. It says what it found.
	verify(addr string) ([]string, error)
	close()
}

var workloads = map[string]func() workload{
	"redis":  func() workload { return &redis{keys: 100_000} },
	"python": func() workload { return &python{} },
}

func main() {
	name := flag.String("workload", "redis", "what to checkpoint: redis or python")
	flag.Parse()
	make, ok := workloads[*name]
	if !ok {
		var known []string
		for w := range workloads {
			known = append(known, w)
		}
		sort.Strings(known)
		fmt.Fprintf(os.Stderr, "demo: unknown workload %q; it is one of: %s\n", *name, strings.Join(known, ", "))
		os.Exit(2)
	}
	os.Exit(stack.Main("demo", func(tb stack.TB) { run(tb, *name, make()) }))
}

// demo prints its steps with the time that each takes.
type demo struct {
	tb    stack.TB
	ctx   context.Context
	total time.Duration
}

func (d *demo) step(what string, fn func() error) {
	fmt.Printf("  %-62s", what)
	start := time.Now()
	err := fn()
	took := time.Since(start)
	d.total += took
	if err == nil {
		err = d.ctx.Err()
	}
	if err != nil {
		fmt.Println()
		d.tb.Fatalf("%s: %v", what, err)
	}
	fmt.Printf("%7.3f s\n", took.Seconds())
}

func run(tb stack.TB, name string, w workload) {
	fmt.Printf("Stasis: checkpoint and restore of a live %s\n\n", name)
	d := &demo{tb: tb, ctx: tb.Context()}
	var (
		s        *stack.Stack
		net      *stack.Netns
		old, new *stack.Container
		image    client.Image
		loaded   string
		found    []string
	)
	defer w.close()

	d.step("start a private containerd, with Stasis as its runtime", func() error {
		s = stack.Start(tb, stack.Options{})
		d.ctx = s.Ctx()
		net = s.NewNetns()
		return nil
	})
	ref, opts := w.spec()
	d.step("make an image of Debian's packages, and import it", func() error {
		s.Image(d.ctx, ref)
		return nil
	})
	d.step("run it as container \"before\"", func() error {
		old = s.NewContainer(d.ctx, "before", ref, append(opts, net.With())...)
		old.Start(d.ctx)
		return nil
	})
	d.step("connect from outside", func() error { return w.connect(d.ctx, net.Addr) })
	d.step("load data", func() (err error) {
		loaded, err = w.load()
		return err
	})
	d.step("checkpoint it to image \"demo/checkpoint\", with its connection", func() error {
		image = old.CheckpointImage(d.ctx, "demo/checkpoint:latest", &options.CheckpointOptions{OpenTcp: true, Exit: true})
		return nil
	})
	d.step("see that its process is gone, and delete the container", func() error {
		if code := old.Wait(d.ctx); code != 128+uint32(syscall.SIGKILL) {
			return fmt.Errorf("it exited with code %d", code)
		}
		old.Delete(d.ctx)
		return nil
	})
	d.step("restore it from the image as container \"after\"", func() error {
		new = s.RestoreImage(d.ctx, "after", image)
		return nil
	})
	d.step("ask it what it remembers", func() (err error) {
		found, err = w.verify(net.Addr)
		return err
	})
	d.step("exec in it, kill it, delete it", func() error {
		new.Exec(d.ctx, "true")
		new.Kill(d.ctx, syscall.SIGKILL)
		new.Delete(d.ctx)
		return nil
	})

	fmt.Printf("  %62s%7.3f s\n\n  loaded: %s\n", "", d.total.Seconds(), loaded)
	for _, f := range found {
		fmt.Printf("  proven: %s\n", f)
	}
	fmt.Println()
}

// poll tries until it succeeds, for a minute at most.
func poll(ctx context.Context, what string, try func() error) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		err := try()
		if err == nil {
			return nil
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", what, err)
		}
	}
}

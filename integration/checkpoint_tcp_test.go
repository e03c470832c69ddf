package integration

import (
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/client"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/integration/stack"
)

// TestRestoreTCP checks what becomes of a connection to someone outside of the
// container: it is kept where the container has its address, and closed where it
// has not, unless an annotation says otherwise.
func TestRestoreTCP(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	here, there := s.NewNetns(), s.NewNetns()
	echo := stack.EchoServer(t, here.HostAddr)
	c := s.NewContainer(ctx, "c", stack.Probe, here.With(),
		stack.ProbeArgs("-items", "counter,out,listen,flock", "-connect", echo),
		// A configuration of its own is kept.
		s.CRIUConfig("# the user's own", "ghost-limit 2097152"))
	c.StartProbe(ctx)
	c.Probe(ctx)
	dir := filepath.Join(s.Dir, "checkpoint")
	noLocks := func(t *testing.T) {
		t.Helper()
		for _, n := range []*stack.Netns{here, there} {
			rules, err := n.Firewall()
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range rules {
				if strings.Contains(r, "CRIU") {
					t.Errorf("firewall in %s: %s", n.Name, r)
				}
			}
		}
	}
	annotated := func(t *testing.T, n *stack.Netns, how string) {
		t.Helper()
		spec, err := c.Spec(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := n.With()(ctx, nil, nil, spec); err != nil {
			t.Fatal(err)
		}
		delete(spec.Annotations, checkpoint.AnnotationTCP)
		if how != "" {
			spec.Annotations[checkpoint.AnnotationTCP] = how
		}
		if err := c.Update(ctx, client.UpdateContainerOpts(client.WithSpec(spec))); err != nil {
			t.Fatal(err)
		}
	}

	// With the same address, as many times as one likes. Meanwhile CRIU's lock
	// keeps the kernel from telling the peer that nobody is there.
	for range 2 {
		c.Checkpoint(ctx, dir, everything())
		c.Restore(ctx, dir)
		c.Probe(ctx)
		noLocks(t)
	}
	// As it runs on.
	running := everything()
	running.Exit = false
	c.Checkpoint(ctx, dir, running)
	noLocks(t)
	c.Probe(ctx)
	c.Checkpoint(ctx, dir, running)
	c.Kill(ctx, syscall.SIGKILL)
	c.DeleteTask(ctx)

	closed := func(t *testing.T) {
		t.Helper()
		r, err := c.ProbeErr(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if failed := slices.Collect(maps.Keys(r.Failed)); !slices.Equal(failed, []string{"out"}) {
			t.Errorf("failed items %v, want out only", r.Failed)
		}
		if strings.Contains(r.Failed["out"], "timeout") {
			t.Errorf("the connection is not closed: %s", r.Failed["out"])
		}
		// Further checkpoints decide for themselves.
		for _, dir := range []string{"", "work"} {
			if left, _ := filepath.Glob(filepath.Join(c.Bundle(), dir, "criu.conf")); len(left) > 0 {
				t.Errorf("CRIU's configuration is left after the restore: %v", left)
			}
		}
		noLocks(t)
	}
	restored := func(t *testing.T) {
		t.Helper()
		if err := c.RestoreErr(ctx, dir); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if c.Task != nil {
				c.Kill(ctx, syscall.SIGKILL)
				c.DeleteTask(ctx)
			}
		})
	}
	t.Run("other address", func(t *testing.T) {
		annotated(t, there, "")
		restored(t)
		closed(t)
		// What was closed is of no interest to the next checkpoint.
		next := filepath.Join(s.Dir, "next")
		c.Checkpoint(ctx, next, &options.CheckpointOptions{Exit: true, FileLocks: true})
		if err := c.RestoreErr(ctx, next); err != nil {
			t.Fatal(err)
		}
		noLocks(t)
	})
	t.Run("close", func(t *testing.T) {
		annotated(t, here, "close")
		restored(t)
		closed(t)
	})
	t.Run("keep", func(t *testing.T) {
		annotated(t, there, "keep")
		err := c.RestoreErr(ctx, dir)
		if err == nil || !strings.Contains(err.Error(), "Can't bind inet socket") {
			t.Errorf("restore: %v; want CRIU's words", err)
		}
		noLocks(t)
		c.DeleteTask(ctx)
	})
	t.Run("unknown", func(t *testing.T) {
		annotated(t, here, "perhaps")
		err := c.RestoreErr(ctx, dir)
		if err == nil || !strings.Contains(err.Error(), "perhaps") || !strings.Contains(err.Error(), checkpoint.AnnotationTCP) {
			t.Errorf("restore: %v; want the annotation named", err)
		}
		if c.Task != nil {
			c.DeleteTask(ctx)
		}
	})
}

package integration

import (
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/api/types/runc/options"

	"github.com/stasis-run/stasis/integration/stack"
)

// TestLoopback restores a container with a network namespace of its own, which
// runc has CRIU leave empty: its loopback device has to work again.
func TestLoopback(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	c := s.NewContainer(ctx, "c", stack.Busybox, stack.Args("sh", "-c", "while true; do echo hello | nc -l -p 7777; done"))
	c.Start(ctx)
	ask := func() string {
		r, err := c.ExecErr(ctx, "sh", "-c", "nc -w 5 127.0.0.1 7777")
		if err != nil {
			t.Fatal(err)
		}
		return r.Stdout + r.Stderr
	}
	s.Poll(ctx, "nc to listen", func() bool { return strings.Contains(ask(), "hello") })
	dir := filepath.Join(s.Dir, "checkpoint")
	for range 2 { // what was restored can be restored
		c.Checkpoint(ctx, dir, &options.CheckpointOptions{Exit: true})
		c.Restore(ctx, dir)
		// The shell may have been checkpointed between two runs of nc.
		s.Poll(ctx, "the restored container to answer", func() bool { return ask() == "hello\n" })
	}
	c.Kill(ctx, syscall.SIGKILL)
	c.Delete(ctx)
}

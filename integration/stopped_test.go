package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/cgroups/v3"
	"github.com/containerd/containerd/v2/client"

	"github.com/stasis-run/stasis/integration/stack"
)

// TestStoppedProcess checkpoints a container with a process that is stopped by a
// signal. With cgroup v1, CRIU would wait for it for ever.
func TestStoppedProcess(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	c := s.NewContainer(ctx, "c", stack.Busybox, stack.Args("sh", "-c", "sleep 1000 & kill -STOP $!; echo stopped; wait"))
	c.Start(ctx)
	c.Stdout.WaitFor(ctx, "stopped\n")
	s.Poll(ctx, "process to stop", func() bool {
		pids, err := c.Task.Pids(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return slices.ContainsFunc(pids, func(p client.ProcessInfo) bool {
			status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Pid))
			return strings.Contains(string(status), "State:\tT")
		})
	})
	dir := filepath.Join(s.Dir, "checkpoint")
	for _, paused := range []bool{false, true} {
		if paused {
			if err := c.Task.Pause(ctx); err != nil {
				t.Fatal(err)
			}
		}
		err := c.CheckpointErr(ctx, dir, nil)
		if cgroups.Mode() == cgroups.Unified {
			if err != nil {
				t.Error(err)
			}
		} else if err == nil || !strings.Contains(err.Error(), "is stopped by a signal") {
			t.Errorf("paused %v: %v, want that it is refused for the stopped process", paused, err)
		}
	}
	if err := c.Task.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	c.Exec(ctx, "true")
	c.Kill(ctx, syscall.SIGKILL)
	c.Delete(ctx)
}

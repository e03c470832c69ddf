package integration

import (
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/client"

	"github.com/stasis-run/stasis/integration/stack"
)

// TestIndexForCtr has ctr restore what `stasis checkpoint` writes in containerd's
// format.
func TestIndexForCtr(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	c := startProbe(ctx, s, "c", stack.ProbeArgs("-skip", "tcp"))
	c.Exec(ctx, "sh", "-c", "echo new >/new && rm /etc/group")
	before := c.Probe(ctx)
	const ref = "stasis.test/cp:1"
	s.Stasis("checkpoint", "c", ref, "--format", "index", "--file-locks", "--exit")
	c.Wait(ctx)
	c.Delete(ctx)
	s.Ctr("containers", "restore", "--rw", "--live", "again", ref)
	loaded, err := s.Client().LoadContainer(ctx, "again")
	must(t, err)
	again := s.Wrap(loaded)
	again.Load(ctx)
	checkSame(t, before, again.Probe(ctx))
	if out := again.Exec(ctx, "sh", "-c", "cat /new; ls -d /etc/group 2>/dev/null; true"); out != "new\n" {
		t.Errorf("the root filesystem is %q", out)
	}
	again.Kill(ctx, syscall.SIGKILL)
	again.Delete(ctx)
}

// TestIndexOfCtr restores what ctr writes of containers under Stasis and under
// containerd's own shim: with all that ctr can put into it, and with less.
func TestIndexOfCtr(t *testing.T) {
	t.Parallel()
	for name, runtime := range map[string]string{"stasis": stasisRuntime, "upstream": upstreamRuntime} {
		t.Run(name, func(t *testing.T) {
			s := stack.Start(t, stack.Options{})
			ctx := s.Ctx()
			// ctr has no flags for what these need.
			c := s.NewContainerWith(ctx, "c", stack.Probe, []client.NewContainerOpts{client.WithRuntime(runtime, s.RuncOptions(""))},
				stack.ProbeArgs("-skip", "tcp,flock,fcntl,ofd"))
			c.StartProbe(ctx)
			c.Exec(ctx, "sh", "-c", "echo new >/new && rm /etc/group")
			before := c.Probe(ctx)
			const all, unchanged, noTask = "stasis.test/all:1", "stasis.test/unchanged:1", "stasis.test/no-task:1"
			s.Ctr("containers", "checkpoint", "--rw", "--image", "--task", "c", all)
			s.Ctr("containers", "checkpoint", "--image", "--task", "c", unchanged)
			s.Ctr("containers", "checkpoint", "--rw", "--image", "c", noTask)
			ofTask := strings.TrimSpace(s.Ctr("tasks", "checkpoint", "c"))
			c.Kill(ctx, syscall.SIGKILL)
			c.Delete(ctx)

			for id, ref := range map[string]string{"all": all, "of-task": ofTask} {
				r := restoreForeign(ctx, t, s, ref, id)
				checkSame(t, before, r.Probe(ctx))
				if out := r.Exec(ctx, "sh", "-c", "cat /new; ls -d /etc/group 2>/dev/null; true"); out != "new\n" {
					t.Errorf("%s: the root filesystem is %q", id, out)
				}
				r.Kill(ctx, syscall.SIGKILL)
				r.Delete(ctx)
			}
			// Only Stasis's manifest has a container's ID.
			if _, err := s.StasisErr("restore", all); (err != nil) != (runtime == upstreamRuntime) || err != nil && !strings.Contains(err.Error(), "give a NAME") {
				t.Errorf("restored without a name: %v", err)
			} else if err == nil {
				s.Ctr("tasks", "kill", "-s", "KILL", "c")
				s.Poll(ctx, "the container's end", func() bool { _, err := s.CtrErr("tasks", "delete", "c"); return err == nil })
				s.Ctr("containers", "delete", "c")
			}
			if _, err := s.StasisErr("restore", noTask, "nowhere"); err == nil || !strings.Contains(err.Error(), "--task") {
				t.Errorf("restored without processes: %v", err)
			}
			// The probe holds files that are in the writable layer.
			if _, err := s.StasisErr("restore", unchanged, "nowhere"); err == nil || !strings.Contains(err.Error(), "--rw") {
				t.Errorf("restored without the container's files: %v", err)
			}
			checkTidy(t, s)
		})
	}
}

package integration

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"

	"github.com/stasis-run/stasis/integration/stack"
)

// counter starts a container that counts on in its file /n.
func counter(ctx context.Context, s *stack.Stack, id string, opts ...client.NewContainerOpts) *stack.Container {
	c := s.NewContainerWith(ctx, id, stack.Busybox, opts, stack.Args("sh", "-c", counting))
	c.Start(ctx)
	counts(s, c)
	return c
}

// counts waits until a container that runs counting has begun to.
func counts(s *stack.Stack, c *stack.Container) {
	s.Poll(s.Ctx(), "the counter", func() bool {
		r, err := c.ExecErr(s.Ctx(), "cat", "/n")
		return err == nil && r.Code == 0
	})
}

// countsOn fails the test unless the container of counter counts on.
func countsOn(t *testing.T, s *stack.Stack, c *stack.Container) {
	t.Helper()
	ctx := s.Ctx()
	runsOn(t, ctx, c)
	first := count(t, c.Exec(ctx, "cat", "/n"))
	s.Poll(ctx, "the counter to go on", func() bool { return count(t, c.Exec(ctx, "cat", "/n")) > first })
}

// load attaches to a container that `stasis restore` has made.
func load(t *testing.T, s *stack.Stack, id string) *stack.Container {
	t.Helper()
	container, err := s.Client().LoadContainer(s.Ctx(), id)
	must(t, err)
	c := s.Wrap(container)
	c.Load(s.Ctx())
	return c
}

// checkNone looks for a checkpoint that must not be visible.
func checkNone(t *testing.T, s *stack.Stack, ref string) {
	t.Helper()
	if list := listCheckpoints(t, s); len(list) != 0 {
		t.Errorf("checkpoints: %+v", list)
	}
	if _, err := s.Client().ImageService().Get(s.Ctx(), ref); !errdefs.IsNotFound(err) {
		t.Errorf("image %s: %v, want none", ref, err)
	}
}

// heldCheckpoint starts `stasis checkpoint`, and returns when the runtime that it
// has called is held. The container was made after a call of Faults.
func heldCheckpoint(t *testing.T, s *stack.Stack, when stack.When, args ...string) (*exec.Cmd, *strings.Builder) {
	t.Helper()
	f := s.Faults()
	f.Hold("checkpoint", when)
	cmd := s.StasisCommand(append([]string{"checkpoint"}, args...)...)
	errs := &strings.Builder{}
	cmd.Stdout, cmd.Stderr = errs, errs
	must(t, cmd.Start())
	f.WaitReached(s.Ctx(), "checkpoint", when)
	return cmd, errs
}

// workFolder returns the one folder of a command at work.
func workFolder(t *testing.T, s *stack.Stack) string {
	t.Helper()
	work, err := filepath.Glob(filepath.Join(s.Dir, "stasis", "work", "*"))
	must(t, err)
	if len(work) != 1 {
		t.Fatalf("folders of the work: %q, want one", work)
	}
	return work[0]
}

// interrupt sends Ctrl-C to a command, and returns what it says.
func interrupt(t *testing.T, cmd *exec.Cmd, out *strings.Builder) string {
	t.Helper()
	must(t, cmd.Process.Signal(os.Interrupt))
	_ = cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != 130 || !strings.Contains(out.String(), "interrupted") {
		t.Errorf("Ctrl-C: exit code %d, %q", code, out)
	}
	return out.String()
}

// TestCLIAborted ends `stasis checkpoint` before, in and after the dump: by
// Ctrl-C, which it has time to clean up after, and by SIGKILL, which leaves that
// to prune. Either way the container runs on.
func TestCLIAborted(t *testing.T) {
	t.Parallel()
	const ref = "stasis.test/cp:1"
	for name, when := range map[string]stack.When{
		"before": stack.Before, "in": stack.During("Dumping task"), "after": stack.After,
	} {
		t.Run(name, func(t *testing.T) {
			s := stack.Start(t, stack.Options{})
			ctx := s.Ctx()
			f := s.Faults()
			c := counter(ctx, s, "c")
			for _, args := range [][]string{{"c", ref}, {"c", ref, "--exit"}} {
				if when == stack.After && len(args) > 2 {
					continue // it is too late: TestCLIAbortedLate
				}
				cmd, out := heldCheckpoint(t, s, when, args...)
				interrupt(t, cmd, out)
				f.Clear("checkpoint")
				countsOn(t, s, c)
				checkNone(t, s, ref)
				checkTidy(t, s)
			}

			cmd, _ := heldCheckpoint(t, s, when, "c", ref)
			must(t, cmd.Process.Signal(syscall.SIGKILL))
			_ = cmd.Wait()
			// The shim ends the runtime, which would wait for ever, and removes
			// what it has made.
			work := workFolder(t, s)
			s.Poll(ctx, "the shim to give up", func() bool {
				_, err := os.Lstat(filepath.Join(work, "checkpoint"))
				return errors.Is(err, fs.ErrNotExist)
			})
			f.Clear("checkpoint")
			countsOn(t, s, c)
			checkNone(t, s, ref)
			if pruned := s.Stasis("prune"); !strings.HasPrefix(pruned, work+"\nlease "+s.Namespace+"/") || strings.Count(pruned, "\n") != 2 {
				t.Errorf("prune printed %q, want %s and a lease", pruned, work)
			}
			checkTidy(t, s)
			if _, err := os.Lstat(work); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("after prune: %v", err)
			}

			// And the next one is as any.
			s.Stasis("checkpoint", "c", ref, "--exit")
			c.Wait(ctx)
			c.Delete(ctx)
			s.Stasis("restore", ref)
			c = load(t, s, "c")
			countsOn(t, s, c)
			c.Kill(ctx, syscall.SIGKILL)
			c.Delete(ctx)
		})
	}
}

// TestCLIAbortedLate presses Ctrl-C when CRIU has ended the container already:
// what it wrote is all there is, and is kept.
func TestCLIAbortedLate(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	f := s.Faults()
	c := counter(ctx, s, "c")
	cmd, out := heldCheckpoint(t, s, stack.After, "c", "stasis.test/cp:1", "--exit")
	said := interrupt(t, cmd, out)
	f.Clear("checkpoint")
	c.Wait(ctx)
	checkNone(t, s, "stasis.test/cp:1")
	restoreKept(t, s, c, said)
}

// restoreKept stores and restores a container from the folder that an error has
// named, where its images are, as its writable layer is still its own.
func restoreKept(t *testing.T, s *stack.Stack, c *stack.Container, said string) {
	t.Helper()
	ctx := s.Ctx()
	work := workFolder(t, s)
	if !strings.Contains(said, work) || !strings.Contains(said, "has ended") {
		t.Errorf("its images are in %s, and what is said is %q", work, said)
	}
	if out := s.Stasis("prune", "--dry-run"); out != work+"\n" {
		t.Errorf("prune --dry-run printed %q", out)
	}
	ref := "stasis.test/kept:1"
	if out := s.Stasis("checkpoint", c.ID(), ref, "--from", work); out != ref+"\n" {
		t.Errorf("--from printed %q", out)
	}
	checkTidy(t, s)
	s.Stasis("restore", ref, "again")
	again := load(t, s, "again")
	countsOn(t, s, again)
	again.Kill(ctx, syscall.SIGKILL)
	again.Delete(ctx)
	c.Delete(ctx)
}

// TestCLIRefused has CRIU refuse: its words are told, and nothing is left.
func TestCLIRefused(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	c := startProbe(ctx, s, "c", stack.ProbeArgs("-items", "counter,tcp"))
	_, err := s.StasisErr("checkpoint", "c", "stasis.test/cp:1", "--exit")
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(err.Error(), "Connected TCP socket") {
		t.Errorf("checkpoint: %v", err)
	}
	runsOn(t, ctx, c)
	c.Probe(ctx)
	checkNone(t, s, "stasis.test/cp:1")
	checkTidy(t, s)

	// Of several, the others are checkpointed.
	counter(ctx, s, "d")
	out, err := s.StasisErr("checkpoint", "c", "d")
	if err == nil || !strings.Contains(err.Error(), "checkpoint c:") || strings.Contains(err.Error(), "checkpoint d:") {
		t.Errorf("checkpoint of both: %v", err)
	}
	if !strings.HasPrefix(out, "localhost/d:") || strings.Count(out, "\n") != 1 {
		t.Errorf("checkpoint of both printed %q", out)
	}
	s.Stasis("checkpoint", "c", "stasis.test/cp:1", "--exit", "--tcp-established")
	c.Wait(ctx)
	c.Delete(ctx)
	checkTidy(t, s)
}

// TestCLINotStored has a checkpoint with --exit, but nowhere to put it: what is
// left of the container is in the folder that the error names.
func TestCLINotStored(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	f := s.Faults()
	c := counter(ctx, s, "c")
	const ref = "stasis.test/taken:1"
	cmd, out := heldCheckpoint(t, s, stack.After, "c", ref, "--exit")
	// Meanwhile somebody takes the name.
	s.Ctr("images", "tag", stack.Busybox, ref)
	f.Release("checkpoint", stack.After)
	_ = cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != 1 {
		t.Errorf("exit code %d", code)
	}
	c.Wait(ctx)
	if list := listCheckpoints(t, s); len(list) != 0 {
		t.Errorf("checkpoints: %+v", list)
	}
	restoreKept(t, s, c, out.String())
}

// TestCLIUpstream checkpoints a container of containerd's own shim, by
// Task.Checkpoint, and restores it under Stasis.
func TestCLIUpstream(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	f := s.Faults()
	c := counter(ctx, s, "c", client.WithRuntime(upstreamRuntime, s.RuncOptions("")))
	const ref = "stasis.test/cp:1"

	// What fails leaves it running, as with our own.
	f.Fail("checkpoint", stack.Before, "as requested")
	if _, err := s.StasisErr("checkpoint", "c", ref); err == nil || !strings.Contains(err.Error(), "as requested") {
		t.Errorf("checkpoint: %v", err)
	}
	f.Clear("checkpoint")
	countsOn(t, s, c)
	if _, err := s.StasisErr("checkpoint", "c", ref, "--tcp-close"); err == nil || !strings.Contains(err.Error(), "--tcp-close") {
		t.Errorf("checkpoint --tcp-close: %v", err)
	}
	countsOn(t, s, c)
	cmd, said := heldCheckpoint(t, s, stack.During("Dumping task"), "c", ref)
	// This shim does not give up a dump, so Ctrl-C waits for its end.
	must(t, cmd.Process.Signal(os.Interrupt))
	f.Clear("checkpoint")
	_ = cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != 130 {
		t.Errorf("Ctrl-C: exit code %d, %q", code, said)
	}
	countsOn(t, s, c)
	checkNone(t, s, ref)
	checkTidy(t, s)

	cmd = s.StasisCommand("checkpoint", "c", ref)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil || string(out) != ref+"\n" {
		t.Fatalf("%v, %q\n%s", err, out, &stderr)
	}
	if !strings.Contains(stderr.String(), upstreamRuntime+" and not Stasis") {
		t.Errorf("no note about the longer freeze: %q", &stderr)
	}
	countsOn(t, s, c)

	l := findListed(listCheckpoints(t, s), ref)
	if l == nil || l.Format != "runnable" || l.Checkpoint == 0 {
		t.Fatalf("ls: %+v", l)
	}
	var report struct {
		Info struct{ Runtime string }
	}
	must(t, json.Unmarshal([]byte(s.Stasis("inspect", ref, "-o", "json")), &report))
	if report.Info.Runtime != upstreamRuntime {
		t.Errorf("inspect tells runtime %q", report.Info.Runtime)
	}

	s.Stasis("restore", ref, "d")
	d := load(t, s, "d")
	if out := d.Exec(ctx, "cat", "/changed", "/d/e/hard", "/d/soft", "/proc/1/fd/3"); out != "was\nwas\nwas\nheld\n" {
		t.Errorf("files: %q", out)
	}
	countsOn(t, s, d)

	// With exit, and under its own name.
	s.Stasis("checkpoint", "c", ref, "--exit")
	c.Wait(ctx)
	c.Delete(ctx)
	s.Stasis("restore", ref)
	c = load(t, s, "c")
	countsOn(t, s, c)
	for _, c := range []*stack.Container{c, d} {
		c.Kill(ctx, syscall.SIGKILL)
		c.Delete(ctx)
	}
	checkTidy(t, s)
}

// TestCLIUpstreamAborted presses Ctrl-C in a dump that ends the container, and
// that its shim does not give up: what is written is kept.
func TestCLIUpstreamAborted(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	f := s.Faults()
	c := counter(ctx, s, "c", client.WithRuntime(upstreamRuntime, s.RuncOptions("")))
	cmd, said := heldCheckpoint(t, s, stack.During("Dumping task"), "c", "stasis.test/cp:1", "--exit")
	must(t, cmd.Process.Signal(os.Interrupt))
	f.Clear("checkpoint")
	_ = cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != 130 {
		t.Errorf("Ctrl-C: exit code %d, %q", code, said)
	}
	c.Wait(ctx)
	checkNone(t, s, "stasis.test/cp:1")
	restoreKept(t, s, c, said.String())
}

package integration

import (
	"encoding/json"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/stasis-run/stasis/checkpoint/criu"
	"github.com/stasis-run/stasis/checkpoint/inspect"
	"github.com/stasis-run/stasis/integration/stack"
)

// TestPreDump has the memory written before the dump: what comes back is the same,
// and the container stands still for what has changed only. A kernel that does not
// track changes refuses it.
func TestPreDump(t *testing.T) {
	t.Parallel()
	works, err := criu.SoftDirty()
	must(t, err)
	for name, opts := range map[string]stack.Options{"runc": {}, "crun": {Crun: true}} {
		t.Run(name, func(t *testing.T) {
			opts.KnownLeaks = []string{"runc-process"} // what a killed shim's runtime leaves
			s := stack.Start(t, opts)
			if !works {
				preDumpRefused(t, s)
				return
			}
			t.Run("state", func(t *testing.T) { preDumpState(t, s) })
			t.Run("pages", func(t *testing.T) { preDumpPages(t, s) })
			t.Run("killed", func(t *testing.T) { preDumpKilled(t, s) })
		})
	}
}

func preDumpRefused(t *testing.T, s *stack.Stack) {
	ctx := s.Ctx()
	c := sleeper(ctx, s, "c")
	for _, rounds := range []string{"1", "auto"} {
		_, err := s.StasisErr("checkpoint", "c", "--exit", "--pre-dump", rounds)
		if err == nil || !strings.Contains(err.Error(), "CONFIG_MEM_SOFT_DIRTY") {
			t.Errorf("--pre-dump %s: %v", rounds, err)
		}
		runsOn(t, ctx, c)
	}
}

// preDumpState takes a process with state of every kind through it, with a thread
// that writes all the time, in all ways out of a container.
func preDumpState(t *testing.T, s *stack.Stack) {
	ctx := s.Ctx()
	c := s.NewContainer(ctx, "c", stack.Probe, stack.ProbeArgs("-items", "all", "-skip", "out", "-mib", "32"))
	c.StartProbe(ctx)
	before := c.Probe(ctx)
	flags := []string{"--tcp-established", "--file-locks", "--ext-unix-sk"}
	s.Stasis(append([]string{"checkpoint", "c", "localhost/pre:1", "--pre-dump", "3"}, flags...)...)
	c.Probe(ctx) // as it runs on
	file := s.Dir + "/pre.tar.zst"
	s.Stasis(append([]string{"checkpoint", "c", "--output", file, "--exit", "--pre-dump", "auto"}, flags...)...)
	c.Wait(ctx)
	c.Delete(ctx)
	for _, from := range []string{"localhost/pre:1", file} {
		s.Stasis("restore", from, "d", "--runtime", s.Runtime())
		container, err := s.Client().LoadContainer(ctx, "d")
		must(t, err)
		d := s.Wrap(container)
		d.Load(ctx)
		if after := d.Probe(ctx); after.ID != before.ID {
			t.Errorf("from %s: it is another process", from)
		}
		d.Kill(ctx, syscall.SIGKILL)
		d.Delete(ctx)
	}
	must(t, os.Remove(file))
	for _, made := range listCheckpoints(t, s) {
		s.Stasis("rm", made.Ref)
	}
}

// preDumpPages counts what is written while a process stands still that changes one
// per cent of a large heap all the time.
func preDumpPages(t *testing.T, s *stack.Stack) {
	ctx := s.Ctx()
	c := s.NewContainer(ctx, "p", stack.Probe, stack.Args("/probe", "gap", "-mib", "128", "-dirty", "1"))
	c.Start(ctx)
	defer c.Delete(ctx)
	defer c.Kill(ctx, syscall.SIGKILL)
	c.Stdout.WaitFor(ctx, "ready")
	pages := func(ref string, args ...string) uint64 {
		t.Helper()
		s.Stasis(append([]string{"checkpoint", "p", ref}, args...)...)
		var report inspect.Report
		must(t, json.Unmarshal([]byte(s.Stasis("inspect", ref, "-o", "json")), &report))
		if report.Stats == nil {
			t.Fatal("no statistics of CRIU")
		}
		s.Stasis("rm", ref)
		return report.Stats.PagesWritten
	}
	full := pages("localhost/full:1")
	for _, rounds := range []string{"2", "auto"} {
		if last := pages("localhost/pre:"+rounds, "--pre-dump", rounds); last*20 > full {
			t.Errorf("--pre-dump %s: the dump has %d pages, one without has %d", rounds, last, full)
		} else {
			t.Logf("--pre-dump %s: %d pages of %d", rounds, last, full)
		}
	}
}

// preDumpKilled kills CRIU, the runtime's work, the command line and the shim in the
// middle of a pre-dump.
func preDumpKilled(t *testing.T, s *stack.Stack) {
	ctx := s.Ctx()
	f := s.Faults()
	const ref = "localhost/killed:1"
	command := []string{"checkpoint", "k", ref, "--pre-dump", "2", "--exit"}
	c := counter(ctx, s, "k")
	fails := func(what, want string) {
		t.Helper()
		_, err := s.StasisErr(command...)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q in it", what, err, want)
		}
		f.Clear("checkpoint")
		countsOn(t, s, c)
		checkNone(t, s, ref)
		checkTidy(t, s)
	}
	for _, stage := range []string{"Collecting netns", "Pre-dumping task (", "Pre-dumping tasks' memory"} {
		f.KillCRIU("checkpoint", stage)
		fails("CRIU, at "+stage, "pre-dump 1")
	}
	f.Fail("checkpoint", stack.After, "as requested")
	fails("the runtime", "pre-dump 1: ")
	for _, when := range []stack.When{stack.Before, stack.During("Pre-dumping task ("), stack.After} {
		cmd, said := heldCheckpoint(t, s, when, command[1:]...)
		interrupt(t, cmd, said)
		f.Clear("checkpoint")
		s.Poll(ctx, "the container to run on", func() bool {
			r, err := c.ExecErr(ctx, "true")
			return err == nil && r.Code == 0
		})
		countsOn(t, s, c)
		checkNone(t, s, ref)
		checkTidy(t, s)
	}
	s.Stasis(command...) // as if nothing had been
	c.Wait(ctx)
	c.DeleteTask(ctx)
	s.Stasis("rm", ref)

	c.Start(ctx)
	exited, err := c.Task.Wait(ctx)
	must(t, err)
	f.KillShim("checkpoint", stack.After)
	if _, err := s.StasisErr(command...); err == nil {
		t.Error("a checkpoint without a shim")
	}
	<-exited
	f.Clear("checkpoint")
	c.Task = nil // containerd has deleted it
	c.Delete(ctx)
	checkNone(t, s, ref)
	checkTidy(t, s)
}

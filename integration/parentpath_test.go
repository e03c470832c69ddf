package integration

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/api/types/runc/options"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/criu"
	"github.com/stasis-run/stasis/checkpoint/criu/img"
	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/integration/stack"
)

// TestParentPath makes checkpoints that build on others (parent_path), by containerd's
// client. Where the kernel tracks changes of memory, CRIU writes only what has changed
// since, and only if it is certain what has. Either way each checkpoint has all of the
// memory, and needs no other.
func TestParentPath(t *testing.T) {
	t.Parallel()
	tracks, err := criu.SoftDirty()
	must(t, err)
	for name, opts := range map[string]stack.Options{"runc": {}, "crun": {Crun: true}} {
		t.Run(name, func(t *testing.T) {
			s := stack.Start(t, opts)
			t.Run("state", func(t *testing.T) { parentState(t, s) })
			t.Run("memory", func(t *testing.T) { parentMemory(t, s, tracks) })
		})
	}
}

// parentState takes a process with state of every kind, with a thread that writes all the
// time, through two checkpoints that build on the one before.
func parentState(t *testing.T, s *stack.Stack) {
	ctx := s.Ctx()
	c := s.NewContainer(ctx, "c", stack.Probe, stack.ProbeArgs("-items", "all", "-skip", "out"))
	c.StartProbe(ctx)
	before := c.Probe(ctx)
	parent := ""
	for _, name := range []string{"a", "b", "c"} {
		dir := filepath.Join(s.Dir, "state", name)
		c.Checkpoint(ctx, dir, &options.CheckpointOptions{
			ParentPath: parent, Exit: name == "c",
			OpenTcp: true, FileLocks: true, ExternalUnixSockets: true,
		})
		if parent = dir; name != "c" {
			c.Probe(ctx)
		}
	}
	c.Restore(ctx, parent)
	if after := c.Probe(ctx); after.ID != before.ID {
		t.Error("it is another process")
	}
	c.Kill(ctx, syscall.SIGKILL)
	c.Delete(ctx)
}

// parentMemory changes one per cent of a large heap between checkpoints, looks at what
// CRIU wrote in each, and restores them all.
func parentMemory(t *testing.T, s *stack.Stack, tracks bool) {
	ctx := s.Ctx()
	f := s.Faults()
	c := s.NewContainer(ctx, "m", stack.Probe, stack.ProbeArgs("-items", "heap", "-mib", "16"))
	c.StartProbe(ctx)
	before := c.Probe(ctx)
	work := filepath.Join(s.Dir, "memory-work")
	at := func(name string) string { return filepath.Join(s.Dir, "memory", name) }

	full := uint64(0)
	wrote := func(what string, increment bool) {
		t.Helper()
		stats := criu.ReadDumpStats(filepath.Join(work, layout.DumpStats))
		if stats == nil {
			t.Fatalf("%s: no statistics of CRIU", what)
		}
		pages, skipped := stats.GetPagesWritten(), stats.GetPagesSkippedParent()
		if full == 0 {
			full = pages
		}
		t.Logf("%s: %d pages, %d in the parent", what, pages, skipped)
		switch increment = increment && tracks; {
		case increment && (pages*3 > full || skipped == 0):
			t.Errorf("%s: CRIU wrote %d pages, of a full dump %d", what, pages, full)
		case !increment && (pages < full*9/10 || skipped > 0):
			t.Errorf("%s: not a full dump", what)
		}
	}
	dump := func(name, parent string, increment bool, opts *options.CheckpointOptions) {
		t.Helper()
		opts.ParentPath, opts.WorkPath = parent, work
		dir := at(name)
		c.Checkpoint(ctx, dir, opts)
		wrote(name, increment)
		standsAlone(t, dir)
		if !opts.Exit {
			c.Probe(ctx)
		}
	}
	dump("a", "", false, &options.CheckpointOptions{})
	dump("b", at("a"), true, &options.CheckpointOptions{})
	// What has changed before b, the kernel does not tell any more.
	dump("stale", at("a"), false, &options.CheckpointOptions{})
	dump("relative", "../stale", true, &options.CheckpointOptions{})

	// This one has reset the kernel's notes, and is discarded.
	f.Fail("checkpoint", stack.After, "as requested")
	err := c.CheckpointErr(ctx, at("failed"), &options.CheckpointOptions{ParentPath: at("relative"), WorkPath: work})
	if err == nil || !strings.Contains(err.Error(), "as requested") {
		t.Errorf("%v", err)
	}
	f.Clear("checkpoint")
	c.Probe(ctx)
	dump("after failed", at("relative"), false, &options.CheckpointOptions{})

	// Into an image, by way of a folder that containerd removes.
	image := c.CheckpointImage(ctx, "localhost/parent:1", &options.CheckpointOptions{ParentPath: at("after failed"), WorkPath: work})
	wrote("image", true)
	c.Probe(ctx)

	err = c.CheckpointErr(ctx, at("refused"), &options.CheckpointOptions{ParentPath: at("nothing")})
	if err == nil || !strings.Contains(err.Error(), "options: parent_path: ") {
		t.Errorf("a parent that is not there: %v", err)
	}
	runsOn(t, ctx, c)

	dump("last", at("after failed"), false, &options.CheckpointOptions{})
	dump("exit", at("last"), true, &options.CheckpointOptions{Exit: true})
	must(t, os.RemoveAll(at("last")))

	for _, name := range []string{"a", "b", "stale", "relative", "after failed", "exit"} {
		c.Restore(ctx, at(name))
		if after := c.Probe(ctx); after.ID != before.ID {
			t.Errorf("from %s: it is another process", name)
		}
		if name == "exit" {
			// The processes have the IDs of those that the parent is of.
			dump("restored", at("exit"), false, &options.CheckpointOptions{})
		}
		c.Kill(ctx, syscall.SIGKILL)
		c.DeleteTask(ctx)
	}
	c.Restore(ctx, at("restored"))
	c.Probe(ctx)
	c.Kill(ctx, syscall.SIGKILL)
	c.Delete(ctx)

	archive := filepath.Join(s.Dir, "parent.tar")
	s.Stasis("export", image.Name(), archive, "--compress", "none")
	for from, restore := range map[string]func() *stack.Container{
		"image": func() *stack.Container { return s.RestoreImage(ctx, "d", image) },
		"archive": func() *stack.Container {
			s.Stasis("restore", archive, "d", "--runtime", s.Runtime())
			container, err := s.Client().LoadContainer(ctx, "d")
			must(t, err)
			d := s.Wrap(container)
			d.Load(ctx)
			return d
		},
	} {
		d := restore()
		if after := d.Probe(ctx); after.ID != before.ID {
			t.Errorf("from the %s: it is another process", from)
		}
		d.Kill(ctx, syscall.SIGKILL)
		d.Delete(ctx)
	}
	must(t, os.Remove(archive))
	checkTidy(t, s)
}

// standsAlone checks that a folder has a checkpoint with all of its memory.
func standsAlone(t *testing.T, dir string) {
	t.Helper()
	_, err := checkpoint.Open(t.Context(), dir)
	must(t, err)
	lists, err := img.OpenLists(dir)
	must(t, err)
	lists.Close()
	for _, name := range []string{layout.Parent, layout.Partial} {
		if _, err := os.Lstat(filepath.Join(dir, name)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s has %s: %v", dir, name, err)
		}
	}
}

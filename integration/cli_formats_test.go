package integration

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/stasis-run/stasis/integration/stack"
)

// listedCheckpoint is what the tests look at of `stasis ls -o json`.
type listedCheckpoint struct {
	Ref    string
	Format string `json:"format"`
	Info   struct {
		ContainerName string `json:"container_name"`
		Base          struct{ Name string }
	}
	Checkpoint int64  `json:"checkpoint_bytes"`
	Broken     string `json:"broken"`
}

func listCheckpoints(t *testing.T, s *stack.Stack) []listedCheckpoint {
	t.Helper()
	var list []listedCheckpoint
	must(t, json.Unmarshal([]byte(s.Stasis("ls", "-o", "json")), &list))
	return list
}

func findListed(list []listedCheckpoint, ref string) *listedCheckpoint {
	i := slices.IndexFunc(list, func(l listedCheckpoint) bool { return l.Ref == ref })
	if i < 0 {
		return nil
	}
	return &list[i]
}

// memoryAndFiles is `stasis diff -o json`.
type memoryAndFiles struct {
	Files []struct{ Path, Change string }
	// Sizes in bytes.
	Processes []struct{ Changed, Added, Removed, Same int64 }
}

func diff(t *testing.T, s *stack.Stack, first, second string) (d memoryAndFiles) {
	t.Helper()
	must(t, json.Unmarshal([]byte(s.Stasis("diff", first, second, "-o", "json")), &d))
	return d
}

// checkEqual compares two checkpoints that are the same in different formats.
func checkEqual(t *testing.T, s *stack.Stack, first, second string) {
	t.Helper()
	d := diff(t, s, first, second)
	if len(d.Files) != 0 || d.Files == nil {
		t.Errorf("%s and %s differ in files: %+v", first, second, d.Files)
	}
	if len(d.Processes) == 0 {
		t.Errorf("%s and %s: no process", first, second)
	}
	for _, p := range d.Processes {
		if p.Changed+p.Added+p.Removed != 0 || p.Same == 0 {
			t.Errorf("%s and %s differ in memory: %+v", first, second, p)
		}
	}
}

// checkTidy looks for what commands must not leave behind.
func checkTidy(t *testing.T, s *stack.Stack) {
	t.Helper()
	leases, err := s.Client().LeasesService().List(s.Ctx())
	must(t, err)
	if len(leases) != 0 {
		t.Errorf("leases are left: %v", leases)
	}
	work, err := filepath.Glob(filepath.Join(s.Dir, "stasis", "work", "*"))
	must(t, err)
	if len(work) != 0 {
		t.Errorf("folders of the work are left: %v", work)
	}
}

// TestCLIFormats takes one checkpoint through every format, and every command that
// does not need a registry.
func TestCLIFormats(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	c := s.NewContainer(ctx, "c", stack.Busybox, stack.Args("sh", "-c", "echo one > /file; rm /etc/group; echo ready; exec sleep 1000"))
	c.Start(ctx)
	c.Stdout.WaitFor(ctx, "ready")
	dir := t.TempDir()

	const original = "stasis.test/cp:runnable"
	if out := s.Stasis("checkpoint", "c", original); out != original+"\n" {
		t.Errorf("checkpoint printed %q", out)
	}
	l := findListed(listCheckpoints(t, s), original)
	if l == nil || l.Format != "runnable" || l.Info.ContainerName != "c" || l.Info.Base.Name != stack.Busybox || l.Checkpoint == 0 {
		t.Fatalf("ls: %+v", l)
	}

	// From each format to each, as all are read and written by way of one.
	formats := map[string]string{"index": "stasis.test/cp:index", "podman": "stasis.test/cp:podman", "archive": filepath.Join(dir, "cp.tar.zst")}
	for format, name := range formats {
		if out := s.Stasis("convert", original, name, "--format", format); out != name+"\n" {
			t.Errorf("convert to %s printed %q", format, out)
		}
		checkEqual(t, s, original, name)
		back := "stasis.test/back:" + format
		s.Stasis("convert", name, back, "--compress", "none")
		checkEqual(t, s, original, back)
	}
	list := listCheckpoints(t, s)
	for format, name := range formats {
		if l := findListed(list, name); format != "archive" && (l == nil || l.Format != format) {
			t.Errorf("ls: %s is %+v", name, l)
		}
	}
	if out := s.Stasis("ls", "--format", "index", "--container", "c"); strings.Count(out, "\n") != 2 || !strings.Contains(out, formats["index"]) {
		t.Errorf("ls of an index:\n%s", out)
	}
	for _, name := range append([]string{original}, formats["index"], formats["podman"], formats["archive"]) {
		if out := s.Stasis("inspect", name); !strings.Contains(out, "sleep 1000") || !strings.Contains(out, stack.Busybox) {
			t.Errorf("inspect %s:\n%s", name, out)
		}
	}

	if out := s.Stasis("inspect", original); !strings.Contains(out, "Frozen ") || !strings.Contains(out, "CRIU ") {
		t.Errorf("inspect does not tell CRIU's version and statistics:\n%s", out)
	}

	// Through files, and back without what was there before.
	tar, oci := filepath.Join(dir, "export.tar"), filepath.Join(dir, "oci.tar")
	s.Stasis("export", original, tar, "--compress", "gzip")
	s.Stasis("export", original, oci, "--format", "oci")
	for _, name := range []string{tar, oci} {
		if info, err := os.Stat(name); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
	s.Stasis("convert", original, "stasis.test/kept:1", "--format", "podman")
	s.Stasis("rm", original)
	if out := s.Stasis("import", oci); out != original+"\n" {
		t.Errorf("import of an OCI image printed %q", out)
	}
	checkEqual(t, s, original, "stasis.test/kept:1")
	s.Stasis("import", oci, "stasis.test/other:1")
	s.Stasis("import", tar, "stasis.test/imported:1")
	checkEqual(t, s, original, "stasis.test/imported:1")
	if out := s.Stasis("import", tar); !strings.HasPrefix(out, "localhost/c:") {
		t.Errorf("import of an archive printed %q", out)
	}

	// What changes, changes in the next checkpoint.
	c.Exec(ctx, "sh", "-c", "echo two > /file; echo new > /new")
	s.Stasis("checkpoint", "c", "stasis.test/cp:second", "--exit")
	c.Wait(ctx)
	d := diff(t, s, original, "stasis.test/cp:second")
	changes := map[string]string{}
	for _, f := range d.Files {
		changes[f.Path] = f.Change
	}
	if changes["/file"] != "changed" || changes["/new"] != "added" || changes["/etc/group"] != "" {
		t.Errorf("diff: %v", changes)
	}

	// Other images are none of ours.
	if _, err := s.StasisErr("rm", stack.Busybox); err == nil || !strings.Contains(err.Error(), "no checkpoint") {
		t.Errorf("rm of an ordinary image: %v", err)
	}
	if _, err := s.StasisErr("convert", original, stack.Busybox); err == nil {
		t.Error("convert replaced an ordinary image")
	}
	if out := s.Stasis("prune", "--keep", "1", "--container", "c", "--dry-run"); strings.Count(out, "\n") != len(listCheckpoints(t, s))-1 {
		t.Errorf("prune --dry-run:\n%s", out)
	}
	s.Stasis("prune", "--keep", "1")
	if list := listCheckpoints(t, s); len(list) != 1 || list[0].Ref != "stasis.test/cp:second" {
		t.Errorf("after prune: %+v", list)
	}
	s.Stasis("inspect", "stasis.test/cp:second")
	s.Stasis("rm", "stasis.test/cp:second")

	checkTidy(t, s)
	c.Delete(ctx)
}

// A crash in the middle leaves nothing that looks like a checkpoint, and prune
// removes the rest.
func TestCLIKilled(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	c := s.NewContainer(ctx, "c", stack.Busybox, stack.Args("sleep", "1000"))
	c.Start(ctx)
	const ref = "stasis.test/cp:1"
	s.Stasis("checkpoint", "c", ref)
	// The pipe is full soon, and the command waits.
	cmd := s.StasisCommand("export", ref, "-", "--compress", "none")
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	_, err = out.Read(make([]byte, 1))
	must(t, err)
	must(t, cmd.Process.Signal(syscall.SIGKILL))
	_ = cmd.Wait()
	if pruned := s.Stasis("prune"); !strings.Contains(pruned, filepath.Join("stasis", "work")) {
		t.Errorf("prune printed %q", pruned)
	}
	if list := listCheckpoints(t, s); len(list) != 1 {
		t.Errorf("%+v", list)
	}
	s.Stasis("rm", ref)
	checkTidy(t, s)
	c.Kill(ctx, syscall.SIGKILL)
	c.Delete(ctx)
}

// TestCLICheck runs `stasis check` on a host that is fit.
func TestCLICheck(t *testing.T) {
	for _, version := range []string{"2.4", "1.7"} {
		s := stack.Start(t, stack.Options{Version: version})
		out := s.Stasis("check")
		for _, part := range []string{"criu", "runc", "containerd", "shim", "snapshotter"} {
			if !strings.Contains(out, part) {
				t.Errorf("%s: no line about %s:\n%s", version, part, out)
			}
		}
		if strings.Contains(out, "missing") {
			t.Errorf("%s:\n%s", version, out)
		}
		if out := s.Stasis("version"); !strings.Contains(out, version+".") {
			t.Errorf("%s: version says %q", version, out)
		}
	}
}

// TestDefaultNames: checkpoints without a name of one container, of the same second maybe,
// do not replace each other.
func TestDefaultNames(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	c := s.NewContainer(ctx, "c", stack.Busybox, stack.Args("sleep", "1000"))
	c.Start(ctx)
	refs := strings.Fields(s.Stasis("checkpoint", "c", "c", "c", "c"))
	list := s.Stasis("ls", "--output", "json")
	for i, ref := range refs {
		if !strings.Contains(list, `"`+ref+`"`) || slices.Contains(refs[:i], ref) {
			t.Errorf("%s of %q is no name of its own: %s", ref, refs, list)
		}
	}
	if len(refs) != 4 {
		t.Errorf("names %q", refs)
	}
	c.Kill(ctx, syscall.SIGKILL)
	c.Delete(ctx)
	checkTidy(t, s)
}

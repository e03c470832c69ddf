package checkpoint

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/checkpoint/sum"
)

// fill writes a checkpoint's files as CRIU would, without the modes we want.
func fill(t testing.TB, dir string, more ...string) {
	t.Helper()
	must(t, os.CopyFS(dir, os.DirFS(filepath.Join("testdata", "runc-sleep"))))
	for _, name := range more {
		must(t, os.WriteFile(filepath.Join(dir, name), []byte(name), 0o644))
	}
}

func names(t testing.TB, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	must(t, err)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func TestCommit(t *testing.T) {
	for _, durable := range []bool{false, true} {
		dir := filepath.Join(t.TempDir(), "a", "b")
		f, err := NewFolder(dir)
		must(t, err)
		fill(t, f.Path(), "dump.log", layout.DumpStats)
		before := time.Now().Add(-time.Second)
		must(t, f.Commit(Manifest{
			Container: Container{ID: "c", Namespace: "n", SpecDigest: "sha256:0"}, CRIU: "4.2.1",
			Options: Options{FileLocks: true, EmptyNamespaces: []string{"network"}},
		}, durable))

		want := append(names(t, filepath.Join("testdata", "runc-sleep")), "dump.log", layout.DumpStats, layout.Manifest)
		slices.Sort(want)
		if got := names(t, dir); !slices.Equal(got, want) {
			t.Errorf("files\n%q, want\n%q", got, want)
		}
		for _, name := range append(want, ".") {
			info, err := os.Lstat(filepath.Join(dir, name))
			must(t, err)
			mode := os.FileMode(0o600)
			if name == "." {
				mode = os.ModeDir | 0o700
			}
			if info.Mode() != mode {
				t.Errorf("%s has mode %v", name, info.Mode())
			}
		}
		ckpt, err := Open(t.Context(), dir)
		must(t, err)
		m := ckpt.Manifest()
		if m.Version != 3 || m.Host == "" || m.Created.Before(before) || m.Container.Namespace != "n" || m.CRIU != "4.2.1" {
			t.Errorf("manifest %+v", m)
		}
		if !slices.IsSortedFunc(m.Files, func(a, b File) int { return strings.Compare(a.Name, b.Name) }) {
			t.Errorf("files are not sorted: %v", m.Files)
		}
		for _, file := range m.Files {
			if layout.IsIncidental(file.Name) {
				t.Errorf("%s is listed", file.Name)
			}
			checkSum(t, dir, file.Name)
		}
	}
}

func TestNewFolderIn(t *testing.T) {
	old := func(t *testing.T, dir string) {
		f, err := NewFolder(dir)
		must(t, err)
		fill(t, f.Path(), "core-77.img")
		must(t, f.Commit(Manifest{}, false))
	}
	for _, tc := range []struct {
		name    string
		prepare func(t *testing.T, dir string)
		refused string // named in the error
	}{
		{"nothing", func(t *testing.T, dir string) { must(t, os.Remove(dir)) }, ""},
		{"an empty folder", func(t *testing.T, dir string) {}, ""},
		{"an ext4 mount point", func(t *testing.T, dir string) { must(t, os.Mkdir(filepath.Join(dir, "lost+found"), 0o700)) }, ""},
		{"a checkpoint", old, ""},
		{"a checkpoint without manifest", func(t *testing.T, dir string) { fill(t, dir, "core-77.img", "dump.log") }, ""},
		{"an unfinished checkpoint", func(t *testing.T, dir string) {
			old(t, dir)
			must(t, os.Remove(filepath.Join(dir, layout.Inventory)))
		}, ""},
		{"the rest of a killed one", func(t *testing.T, dir string) {
			must(t, os.Mkdir(filepath.Join(dir, layout.Partial), 0o755))
			fill(t, filepath.Join(dir, layout.Partial), "core-77.img")
			must(t, os.Mkdir(filepath.Join(dir, layout.Partial, "sub"), 0o700))
		}, ""},
		{"a log", func(t *testing.T, dir string) { write(t, filepath.Join(dir, "dump.log"), nil) }, ""},
		{"a foreign file", func(t *testing.T, dir string) { write(t, filepath.Join(dir, "letter.txt"), nil) }, "letter.txt"},
		{"foreign images", func(t *testing.T, dir string) { write(t, filepath.Join(dir, "disk.img"), nil) }, "disk.img"},
		{"foreign images and a rest", func(t *testing.T, dir string) {
			write(t, filepath.Join(dir, "disk.img"), nil)
			must(t, os.Mkdir(filepath.Join(dir, layout.Partial), 0o755))
			write(t, filepath.Join(dir, layout.Partial, layout.Inventory), nil)
		}, "disk.img"},
		{"a checkpoint and a foreign file", func(t *testing.T, dir string) {
			old(t, dir)
			write(t, filepath.Join(dir, "letter.txt"), nil)
		}, "letter.txt"},
		{"a checkpoint and a foreign folder", func(t *testing.T, dir string) {
			old(t, dir)
			must(t, os.Mkdir(filepath.Join(dir, "src"), 0o700))
		}, "src"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			tc.prepare(t, dir)
			before := []string(nil)
			if tc.refused != "" {
				before = names(t, dir)
			}
			f, err := NewFolder(dir)
			if tc.refused != "" {
				wantError(t, err, errdefs.ErrAlreadyExists, tc.refused, dir)
				if after := names(t, dir); !slices.Equal(before, after) {
					t.Errorf("the folder had %q and has %q", before, after)
				}
				return
			}
			must(t, err)
			if rest := names(t, f.Path()); len(rest) > 0 {
				t.Errorf(".partial holds %q", rest)
			}
			fill(t, f.Path(), "core-88.img")
			must(t, f.Commit(Manifest{}, false))
			_, err = Open(t.Context(), dir)
			must(t, err)
			if _, err := os.Lstat(filepath.Join(dir, "core-77.img")); err == nil {
				t.Error("a file of the old checkpoint is still there")
			}
		})
	}
}

// TestUncommitted: what CRIU has written to the end is found until it is committed.
func TestUncommitted(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "c")
	none := func(when string) {
		t.Helper()
		if got := Uncommitted(dir); got != "" {
			t.Errorf("%s: %s", when, got)
		}
	}
	none("no folder")
	f, err := NewFolder(dir)
	must(t, err)
	none("CRIU has not begun")
	write(t, filepath.Join(f.Path(), "core-99.img"), nil)
	none("CRIU has not ended")
	fill(t, f.Path())
	if got := Uncommitted(dir); got != f.Path() {
		t.Errorf("CRIU has ended: %q", got)
	}
	must(t, f.Commit(Manifest{}, false))
	none("it is committed")
}

func TestDiscard(t *testing.T) {
	parent := t.TempDir()
	made := filepath.Join(parent, "made")
	f, err := NewFolder(made)
	must(t, err)
	fill(t, f.Path())
	must(t, f.Discard())
	if rest := names(t, parent); len(rest) > 0 {
		t.Errorf("left %q", rest)
	}
	// An older checkpoint stays, and a folder that was there.
	dir := t.TempDir()
	for range 2 {
		f, err = NewFolder(dir)
		must(t, err)
		fill(t, f.Path())
		must(t, f.Commit(Manifest{Container: Container{ID: "old"}}, false))
	}
	f, err = NewFolder(dir)
	must(t, err)
	fill(t, f.Path(), "core-99.img")
	must(t, f.Discard())
	ckpt, err := Open(t.Context(), dir)
	must(t, err)
	if ckpt.Manifest().Container.ID != "old" || slices.Contains(names(t, dir), layout.Partial) {
		t.Errorf("after Discard: %q", names(t, dir))
	}
}

func TestCommitFails(t *testing.T) {
	begin := func(t *testing.T) *Folder {
		f, err := NewFolder(filepath.Join(t.TempDir(), "c"))
		must(t, err)
		fill(t, f.Path())
		return f
	}
	t.Run("without an inventory", func(t *testing.T) {
		f := begin(t)
		must(t, os.Remove(filepath.Join(f.Path(), layout.Inventory)))
		wantError(t, f.Commit(Manifest{}, false), nil, "inventory.img is not listed", f.dir)
		if _, err := os.Lstat(f.dir); err == nil {
			t.Errorf("left %q", names(t, f.dir))
		}
	})
	t.Run("with a link", func(t *testing.T) {
		f := begin(t)
		must(t, os.Symlink("..", filepath.Join(f.Path(), "parent")))
		wantError(t, f.Commit(Manifest{}, false), nil, `"parent"`)
	})
	t.Run("half way", func(t *testing.T) {
		f := begin(t)
		must(t, os.MkdirAll(filepath.Join(f.dir, "mm-1.img", "x"), 0o700))
		if err := f.Commit(Manifest{}, false); err == nil {
			t.Fatal("no error")
		}
		if rest := names(t, f.dir); !slices.Equal(rest, []string{"mm-1.img"}) {
			t.Errorf("left %q", rest)
		}
	})
	t.Run("and keeps what is left of a stopped container", func(t *testing.T) {
		f := begin(t)
		must(t, os.MkdirAll(filepath.Join(f.dir, "mm-1.img", "x"), 0o700))
		err := f.Commit(Manifest{Exit: true}, false)
		wantError(t, err, nil, f.Path())
		if _, err := os.Lstat(filepath.Join(f.Path(), layout.Inventory)); err != nil {
			t.Error(err)
		}
		_, err = Open(t.Context(), f.dir)
		wantError(t, err, errdefs.ErrFailedPrecondition, "unfinished")
	})
}

// TestLeaveSum leaves the sum of the largest file to AddSum, before which no restore
// takes the checkpoint.
func TestLeaveSum(t *testing.T) {
	const largest = "pages-1.img"
	data := bytes.Repeat([]byte("memory"), recheckSize)
	size := int64(len(data))
	for i, known := range []File{{Name: largest, Size: size}, {Name: largest, Size: size}, {Name: largest, Size: size - 1}, {Name: "pages-2.img", Size: size}, {}} {
		dir := filepath.Join(t.TempDir(), "checkpoint")
		f, err := NewFolder(dir)
		must(t, err)
		fill(t, f.Path())
		write(t, filepath.Join(f.Path(), largest), data)
		f.LeaveSum = true
		must(t, f.Commit(Manifest{}, false))
		_, err = Open(t.Context(), dir)
		wantError(t, err, errdefs.ErrInvalidArgument, largest+" has no valid sum")
		known.setSum(sum.Join(make([]byte, sum.Chunks(known.Size)*sum.Size)))
		var st unix.Stat_t
		must(t, unix.Stat(filepath.Join(dir, largest), &st))
		known.Inode = st.Ino
		switch i {
		case 1: // another file
			known.Inode++
		case 0:
			known.setSum(sumOf(data))
		}
		for range 2 { // the second has nothing to do
			must(t, AddSum(t.Context(), dir, known, nil))
			known.Sum = "blake3:0"
		}
		checkSum(t, dir, largest)
		checkSum(t, dir, layout.Inventory)
		_, err = Open(t.Context(), dir)
		must(t, err)
	}
	// What an interruption leaves of one is replaced.
	dir := filepath.Join(t.TempDir(), "checkpoint")
	f, err := NewFolder(dir)
	must(t, err)
	fill(t, f.Path())
	f.LeaveSum = true
	must(t, f.Commit(Manifest{}, false))
	must(t, os.Remove(filepath.Join(dir, layout.Inventory)))
	f, err = NewFolder(dir)
	must(t, err)
	must(t, f.Discard())
	// Another runtime's has no manifest.
	must(t, AddSum(t.Context(), realFolder(t, "runc-sleep"), File{}, nil))
	dir = t.TempDir()
	write(t, filepath.Join(dir, layout.Manifest), []byte("{}"))
	wantError(t, AddSum(t.Context(), dir, File{}, nil), errdefs.ErrInvalidArgument, dir)
}

func TestTwoWriters(t *testing.T) {
	dir := t.TempDir()
	f, err := NewFolder(dir)
	must(t, err)
	fill(t, f.Path())
	_, err = NewFolder(dir)
	wantError(t, err, errdefs.ErrFailedPrecondition, "another checkpoint")
	must(t, f.Commit(Manifest{}, false))
	must(t, f.Discard())
	_, err = Open(t.Context(), dir)
	must(t, err)
	g, err := NewFolder(dir)
	must(t, err)
	must(t, g.Discard())
}

func sumOf(data []byte) sum.Sum {
	w := sum.NewWriter()
	_, _ = w.Write(data)
	return w.Sum()
}

// checkSum compares a file of a checkpoint with the manifest.
func checkSum(t *testing.T, dir, name string) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(dir, name))
	must(t, err)
	m, err := readManifest(dir)
	must(t, err)
	want := sumOf(data).Text
	i := slices.IndexFunc(m.Files, func(f File) bool { return f.Name == name })
	if i < 0 || m.Files[i].Sum != want || m.Files[i].Size != int64(len(data)) {
		t.Errorf("%s: wrong sum or size", name)
	}
}

// TestReserve fills what a folder has reserved, as CRIU might.
func TestReserve(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "checkpoint")
	f, err := NewFolder(dir)
	must(t, err)
	must(t, f.Reserve(0))
	info, err := os.Stat(filepath.Join(f.Path(), layout.Reserve))
	must(t, err)
	if info.Size() != reserveSize {
		t.Errorf("reserved %d bytes", info.Size())
	}
	must(t, f.Discard())
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("left: %v", err)
	}
}

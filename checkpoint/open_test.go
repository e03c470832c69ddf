package checkpoint

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/stasis-run/stasis/checkpoint/criu/img"
	"github.com/stasis-run/stasis/checkpoint/layout"
)

// realFolder copies a checkpoint that runc made, with page images of the right
// length in place of those that testdata lacks.
func realFolder(t testing.TB, name string) string {
	t.Helper()
	if runtime.GOARCH != "amd64" {
		t.Skip("testdata was made on amd64")
	}
	dir := filepath.Join(t.TempDir(), name)
	if err := os.CopyFS(dir, os.DirFS(filepath.Join("testdata", name))); err != nil {
		t.Fatal(err)
	}
	files, err := listFolder(dir)
	if err != nil {
		t.Fatal(err)
	}
	for name := range files {
		if !layout.Pagemap.Has(name) {
			continue
		}
		var id uint32
		var pages int64
		err := img.EachIn(dir, name, "PAGEMAP", img.Pagemap(&id, func(r img.PageRun) error {
			if r.Present() {
				pages += int64(r.Pages)
			}
			return nil
		}))
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, layout.Pages.Name(id))
		if _, err := os.Stat(path); err == nil {
			continue
		}
		write(t, path, nil)
		if err := os.Truncate(path, pages*int64(os.Getpagesize())); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// committed makes a checkpoint with a manifest of a real one.
func committed(t testing.TB, name string) string {
	t.Helper()
	src := realFolder(t, name)
	dir := filepath.Join(t.TempDir(), "ckpt")
	f, err := NewFolder(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(f.Path(), os.DirFS(src)); err != nil {
		t.Fatal(err)
	}
	if err := f.Commit(Manifest{Container: Container{ID: name}, Options: Options{OpenTCP: true}}, false); err != nil {
		t.Fatal(err)
	}
	return dir
}

func write(t testing.TB, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// wantError checks an error's kind, nil for any, and that its text has all the parts.
func wantError(t testing.TB, err, kind error, parts ...string) {
	t.Helper()
	if err == nil || kind != nil && !errors.Is(err, kind) {
		t.Fatalf("error %v, want one of kind %v", err, kind)
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("error %q lacks %q", err, p)
		}
	}
}

func TestOpenWithoutManifest(t *testing.T) {
	for _, tc := range []struct {
		name    string
		options Options
		tcp     string
	}{
		{"runc-sleep", Options{}, "[]"},
		{"runc-tcp", Options{OpenTCP: true, FileLocks: true}, "[127.0.0.1 ::1]"},
		{"runc-terminal", Options{}, "[]"},
		{"runc-unix", Options{ExternalUnixSockets: true}, "[]"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := realFolder(t, tc.name)
			ckpt, err := Open(t.Context(), dir)
			must(t, err)
			if got := ckpt.Options(); !equalOptions(got, tc.options) {
				t.Errorf("options %+v, want %+v", got, tc.options)
			}
			addrs, err := ckpt.EstablishedTCP()
			must(t, err)
			var got []string
			for _, a := range addrs {
				got = append(got, a.String())
			}
			if s := "[" + strings.Join(got, " ") + "]"; s != tc.tcp {
				t.Errorf("addresses %s, want %s", s, tc.tcp)
			}
			if ckpt.Dir() != dir || ckpt.Manifest() != nil {
				t.Errorf("Dir %q, Manifest %v", ckpt.Dir(), ckpt.Manifest())
			}
		})
	}
}

func equalOptions(a, b Options) bool {
	return a.OpenTCP == b.OpenTCP && a.ExternalUnixSockets == b.ExternalUnixSockets && a.Terminal == b.Terminal &&
		a.FileLocks == b.FileLocks && a.CgroupsMode == b.CgroupsMode && slices.Equal(a.EmptyNamespaces, b.EmptyNamespaces)
}

func TestOpenWithManifest(t *testing.T) {
	dir := committed(t, "runc-tcp")
	ckpt, err := Open(t.Context(), dir)
	must(t, err)
	m := ckpt.Manifest()
	if m == nil || m.Container.ID != "runc-tcp" || m.Kernel != KernelRelease() || m.Architecture != runtime.GOARCH {
		t.Errorf("manifest %+v", m)
	}
	// The manifest's options, not those of the images.
	if o := ckpt.Options(); !o.OpenTCP || o.FileLocks {
		t.Errorf("options %+v", o)
	}
	if addrs, err := ckpt.EstablishedTCP(); err != nil || len(addrs) != 2 {
		t.Errorf("EstablishedTCP: %v, %v", addrs, err)
	}
	// A second checkpoint that was killed does not spoil this one.
	must(t, os.Mkdir(filepath.Join(dir, layout.Partial), 0o700))
	write(t, filepath.Join(dir, layout.Partial, "core-1.img"), nil)
	_, err = Open(t.Context(), dir)
	must(t, err)
}

func TestOpenRefuses(t *testing.T) {
	for _, tc := range []struct {
		name   string
		damage func(t *testing.T, dir string)
		kind   error
		parts  []string
	}{
		{"no folder", func(t *testing.T, dir string) { must(t, os.RemoveAll(dir)) },
			errdefs.ErrNotFound, []string{"no such folder"}},
		{"a file", func(t *testing.T, dir string) { must(t, os.RemoveAll(dir)); write(t, dir, nil) },
			errdefs.ErrInvalidArgument, []string{"not a folder"}},
		{"unfinished", func(t *testing.T, dir string) { must(t, os.Remove(filepath.Join(dir, layout.Inventory))) },
			errdefs.ErrFailedPrecondition, []string{"unfinished"}},
		{"missing", func(t *testing.T, dir string) { must(t, os.Remove(filepath.Join(dir, "core-1.img"))) },
			errdefs.ErrInvalidArgument, []string{"core-1.img: missing"}},
		{"truncated", func(t *testing.T, dir string) { must(t, os.Truncate(filepath.Join(dir, "pages-1.img"), 100)) },
			errdefs.ErrInvalidArgument, []string{"pages-1.img: expected 65536 bytes, has 100 (truncated)"}},
		{"altered", func(t *testing.T, dir string) { flip(t, filepath.Join(dir, "pages-1.img"), 4711) },
			errdefs.ErrInvalidArgument, []string{"pages-1.img: altered: its sum is blake3:"}},
		{"longer", func(t *testing.T, dir string) { must(t, os.Truncate(filepath.Join(dir, "pages-1.img"), 1<<17)) },
			errdefs.ErrInvalidArgument, []string{"pages-1.img: expected 65536 bytes, has 131072"}},
		{"added image", func(t *testing.T, dir string) { write(t, filepath.Join(dir, "core-9.img"), nil) },
			errdefs.ErrInvalidArgument, []string{"core-9.img", "not listed"}},
		{"added file", func(t *testing.T, dir string) { write(t, filepath.Join(dir, "spec.dump"), nil) },
			errdefs.ErrInvalidArgument, []string{"spec.dump", "not listed"}},
		{"folder", func(t *testing.T, dir string) { must(t, os.Mkdir(filepath.Join(dir, "sub"), 0o700)) },
			errdefs.ErrInvalidArgument, []string{`"sub": a folder`}},
		{"link", func(t *testing.T, dir string) { replaceByLink(t, filepath.Join(dir, "core-1.img")) },
			errdefs.ErrInvalidArgument, []string{`"core-1.img": a symbolic link`}},
		{"manifest is a link", func(t *testing.T, dir string) { replaceByLink(t, filepath.Join(dir, layout.Manifest)) },
			errdefs.ErrInvalidArgument, []string{`"stasis.json": a symbolic link`}},
		{"parent link", func(t *testing.T, dir string) { must(t, os.Symlink("..", filepath.Join(dir, "parent"))) },
			errdefs.ErrInvalidArgument, []string{`"parent": a symbolic link`}},
		{"other architecture", func(t *testing.T, dir string) { edit(t, dir, `"amd64"`, `"arm64"`) },
			errdefs.ErrFailedPrecondition, []string{"made on arm64, this host is amd64"}},
		{"other CPU", func(t *testing.T, dir string) { edit(t, dir, `"cpu_features": [`, `"cpu_features": ["avx1024",`) },
			errdefs.ErrFailedPrecondition, []string{"avx1024", "this host's lacks"}},
		{"newer format", func(t *testing.T, dir string) { edit(t, dir, `"version": 3,`, `"version": 4, "x": 1,`) },
			errdefs.ErrFailedPrecondition, []string{layout.Manifest, "format version 4", "newer Stasis"}},
		{"unknown key", func(t *testing.T, dir string) { edit(t, dir, `"version": 3,`, `"version": 3, "x": 1,`) },
			errdefs.ErrInvalidArgument, []string{layout.Manifest, `"x"`}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := committed(t, "runc-sleep")
			tc.damage(t, dir)
			ckpt, err := Open(t.Context(), dir)
			if err == nil {
				t.Fatalf("opened %+v", ckpt)
			}
			wantError(t, err, tc.kind, append(tc.parts, "checkpoint "+dir)...)
		})
	}
}

func TestOpenAllowsLogs(t *testing.T) {
	for _, dir := range []string{realFolder(t, "runc-sleep"), committed(t, "runc-sleep")} {
		write(t, filepath.Join(dir, "dump.log"), []byte("x"))
		write(t, filepath.Join(dir, layout.DumpStats), []byte("x"))
		_, err := Open(t.Context(), dir)
		must(t, err)
	}
}

// A file of a checkpoint that still is the one that was committed is not read
// again; one that was copied or touched is.
func TestOpenTrustsInodeAndCtime(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "c")
	f, err := NewFolder(dir)
	must(t, err)
	must(t, os.CopyFS(f.Path(), os.DirFS(filepath.Join("testdata", "runc-sleep"))))
	big := bytes.Repeat([]byte("0123456789abcdef"), recheckSize/16)
	write(t, filepath.Join(f.Path(), "pages-9.img"), big)
	must(t, f.Commit(Manifest{}, true))

	ckpt, err := Open(t.Context(), dir)
	must(t, err)
	i := slices.IndexFunc(ckpt.Manifest().Files, func(f File) bool { return f.Name == "pages-9.img" })
	file := ckpt.Manifest().Files[i]
	if file.Inode == 0 || file.CtimeNs == 0 {
		t.Fatalf("no inode or ctime: %+v", file)
	}
	for _, small := range ckpt.Manifest().Files {
		if small.Size < recheckSize && small.Inode != 0 {
			t.Errorf("%s has an inode", small.Name)
		}
	}
	// With a false sum, only a hash can tell.
	edit(t, dir, file.Sum, "blake3:"+strings.Repeat("0", 64))
	_, err = Open(t.Context(), dir)
	must(t, err)
	_, err = OpenWith(t.Context(), dir, OpenOptions{Reread: true})
	wantError(t, err, errdefs.ErrInvalidArgument, "pages-9.img: altered")
	must(t, os.Chmod(filepath.Join(dir, "pages-9.img"), 0o640))
	_, err = Open(t.Context(), dir)
	wantError(t, err, errdefs.ErrInvalidArgument, "pages-9.img: altered")
}

func TestOpenEndsWithContext(t *testing.T) {
	dir := committed(t, "runc-sleep")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Open(ctx, dir); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
}

func flip(t *testing.T, path string, at int) {
	t.Helper()
	data, err := os.ReadFile(path)
	must(t, err)
	data[at] ^= 1
	write(t, path, data)
}

func replaceByLink(t *testing.T, path string) {
	t.Helper()
	other := filepath.Join(t.TempDir(), "other")
	must(t, os.Rename(path, other))
	must(t, os.Symlink(other, path))
}

// edit changes the manifest of a checkpoint.
func edit(t *testing.T, dir, old, new string) {
	t.Helper()
	path := filepath.Join(dir, layout.Manifest)
	data, err := os.ReadFile(path)
	must(t, err)
	if !bytes.Contains(data, []byte(old)) {
		t.Fatalf("the manifest lacks %s:\n%s", old, data)
	}
	write(t, path, bytes.Replace(data, []byte(old), []byte(new), 1))
}

package rootfs

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// header is an entry of a tar made by a test: content, or what a link leads to.
type header struct {
	name    string
	kind    byte
	content string
	change  func(*tar.Header)
}

func tarOf(t testing.TB, headers ...header) []byte {
	t.Helper()
	var out bytes.Buffer
	tw := tar.NewWriter(&out)
	for _, h := range headers {
		hdr := &tar.Header{Name: h.name, Typeflag: h.kind, Mode: 0o755, Format: tar.FormatPAX, ModTime: clock}
		switch h.kind {
		case tar.TypeReg:
			hdr.Size = int64(len(h.content))
		case tar.TypeLink, tar.TypeSymlink:
			hdr.Linkname = h.content
		}
		if h.change != nil {
			h.change(hdr)
		}
		must(t, tw.WriteHeader(hdr))
		if h.kind == tar.TypeReg && h.content != "" {
			_, err := io.WriteString(tw, h.content)
			must(t, err)
		}
	}
	must(t, tw.Close())
	return out.Bytes()
}

const (
	file    = tar.TypeReg
	dir     = tar.TypeDir
	hard    = tar.TypeLink
	symlink = tar.TypeSymlink
)

func record(key, value string) func(*tar.Header) {
	return func(hdr *tar.Header) { hdr.PAXRecords = map[string]string{key: value} }
}

// jail is a root with something outside of it that nothing may change.
type jail struct {
	tree
	outside string
	before  map[string]string
}

func newJail(t testing.TB) jail {
	t.Helper()
	top := tree{t, t.TempDir()}
	top.dir("root/etc")
	top.file("root/etc/passwd", "inside")
	top.dir("outside")
	top.file("outside/secret", "outside")
	outside := top.at("outside")
	return jail{tree{t, top.at("root")}, outside, describe(t, outside, nothing)}
}

func (j jail) intact() {
	j.t.Helper()
	same(j.t, "outside", j.before, describe(j.t, j.outside, nothing))
	entries, err := os.ReadDir(filepath.Dir(j.outside))
	must(j.t, err)
	if len(entries) != 2 {
		j.t.Fatal("something was made beside the root")
	}
}

func TestApplyRefuses(t *testing.T) {
	device := func(major, minor int64) func(*tar.Header) {
		return func(hdr *tar.Header) { hdr.Devmajor, hdr.Devminor = major, minor }
	}
	for _, test := range []struct {
		name    string
		headers []header
		says    string
	}{
		{"a path that goes up", []header{{name: "../outside/x", kind: file}}, `".."`},
		{"and comes back", []header{{name: "etc/../etc/x", kind: file}}, `".."`},
		{"an absolute path", []header{{name: "/etc/x", kind: file}}, "absolute"},
		{"the root as a file", []header{{name: "./.", kind: file}}, "root"},
		{"a hard link up", []header{{name: "x", kind: hard, content: "../outside/secret"}}, "nowhere"},
		{"an absolute hard link", []header{{name: "x", kind: hard, content: "/etc/passwd"}}, "nowhere"},
		{"a hard link to what is not there", []header{{name: "x", kind: hard, content: "none"}}, "hard link"},
		{"a hard link through a link", []header{{name: "l", kind: symlink, content: "../outside"}, {name: "x", kind: hard, content: "l/secret"}}, "hard link"},
		{"a file twice", []header{{name: "x", kind: file}, {name: "./x", kind: file}}, "twice"},
		{"a folder, then a file", []header{{name: "x", kind: dir}, {name: "x", kind: file}}, "twice"},
		{"a whiteout of overlayfs", []header{{name: "x", kind: tar.TypeChar}}, "whiteout"},
		{"a device that cannot be", []header{{name: "x", kind: tar.TypeBlock, change: device(1<<20, 0)}}, "device"},
		{"whiteout of itself", []header{{name: "etc/.wh..", kind: file}}, "whiteout"},
		{"whiteout of the folder above", []header{{name: "etc/.wh...", kind: file}}, "whiteout"},
		{"whiteout of nothing", []header{{name: "etc/.wh.", kind: file}}, "whiteout"},
		{"overlayfs's attributes", []header{{name: "x", kind: dir, change: record("SCHILY.xattr.trusted.overlay.opaque", "y")}}, "trusted.overlay"},
		{"and in a user namespace", []header{{name: "x", kind: dir, change: record("SCHILY.xattr.user.overlay.opaque", "y")}}, "user.overlay"},
		{"a long target", []header{{name: "x", kind: symlink, content: strings.Repeat("x", 5000)}}, "target"},
		{"a long path", []header{{name: strings.Repeat("x/", 3000), kind: dir}}, "too long"},
		{"an unknown type", []header{{name: "x", kind: 'Z'}}, "type"},
		{"an owner that cannot be", []header{{name: "x", kind: file, change: func(hdr *tar.Header) { hdr.Uid = 1<<32 - 1 }}}, "owner"},
	} {
		t.Run(test.name, func(t *testing.T) {
			j := newJail(t)
			_, err := Apply(context.Background(), j.root, bytes.NewReader(tarOf(t, test.headers...)))
			if !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), test.says) {
				t.Errorf("%v", err)
			}
			j.intact()
		})
	}
}

// Links lead nowhere but into the root.
func TestApplyStaysInside(t *testing.T) {
	for _, link := range []string{"/outside", "../outside", "../../../../..", "/", "/proc/self/cwd"} {
		j := newJail(t)
		layer := tarOf(t,
			header{name: "l", kind: symlink, content: link},
			header{name: "l/secret", kind: file, content: "overwritten"},
			header{name: "l/.wh.other", kind: file},
			header{name: "l/sub/", kind: dir})
		_, err := Apply(context.Background(), j.root, bytes.NewReader(layer))
		t.Logf("%s: %v", link, err) // either way
		j.intact()

		j = newJail(t)
		j.symlink(j.outside, "l") // in the image
		layer = tarOf(t, header{name: "l/.wh..wh..opq", kind: file}, header{name: "l/.wh.secret", kind: file})
		_, err = Apply(context.Background(), j.root, bytes.NewReader(layer))
		t.Logf("%s: %v", link, err)
		j.intact()
	}
}

// As a container sees it: /lib is a link to usr/lib.
func TestApplyFollowsLinksInside(t *testing.T) {
	j := newJail(t)
	j.dir("usr/lib")
	j.symlink("/usr/lib", "lib")
	_, err := Apply(context.Background(), j.root, bytes.NewReader(tarOf(t, header{name: "lib/x", kind: file, content: "1"})))
	must(t, err)
	if data, err := os.ReadFile(j.at("usr/lib/x")); err != nil || string(data) != "1" {
		t.Errorf("%q %v", data, err)
	}
}

func TestApplyMarkers(t *testing.T) {
	opaque := header{name: "d/.wh..wh..opq", kind: file}
	for _, test := range []struct {
		name    string
		headers []header
		want    string
	}{
		{"opaque first", []header{opaque, {name: "d/new", kind: file}}, "d/new"},
		{"opaque last", []header{{name: "d/new", kind: file}, {name: "d/sub/new", kind: file}, opaque}, "d/new d/sub d/sub/new"},
		{"opaque folder of the layer", []header{{name: "d/", kind: dir}, {name: "d/sub/", kind: dir}, opaque}, "d/sub"},
		{"a whiteout after what replaces it", []header{{name: "d/", kind: dir}, {name: "d/new", kind: file}, {name: ".wh.d", kind: file}}, "d/new"},
		{"a whiteout of nothing", []header{{name: "none/.wh.x", kind: file}}, "d/old d/sub d/sub/old none"},
		{"a file in place of a folder", []header{{name: "d", kind: file}}, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := tree{t, t.TempDir()}
			f.dir("d/sub")
			f.file("d/old", "1")
			f.file("d/sub/old", "1")
			_, err := Apply(context.Background(), f.root, bytes.NewReader(tarOf(t, test.headers...)))
			must(t, err)
			var have []string
			must(t, filepath.WalkDir(f.root, func(path string, _ os.DirEntry, err error) error {
				if rel := strings.TrimPrefix(path, f.root+"/"); rel != path && rel != "d" {
					have = append(have, rel)
				}
				return err
			}))
			if strings.Join(have, " ") != test.want {
				t.Errorf("%q", have)
			}
		})
	}
}

func TestApplyBounds(t *testing.T) {
	layer := tarOf(t, header{name: "a", kind: file, content: "12345"}, header{name: "b", kind: file, content: "12345"})
	for _, l := range []limits{
		{entries: 1, content: 1 << 20, names: 1 << 20},
		{entries: 10, content: 9, names: 1 << 20},
		{entries: 10, content: 1 << 20, names: 100},
	} {
		if _, err := apply(context.Background(), t.TempDir(), bytes.NewReader(layer), l); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%+v: %v", l, err)
		}
	}
	for _, cut := range []int{0, 100, 1000, 1024, 2000, len(layer) / 2, len(layer) - 1024, len(layer) - 512} {
		if _, err := Apply(context.Background(), t.TempDir(), bytes.NewReader(layer[:cut])); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("cut after %d bytes: %v", cut, err)
		}
	}
	broken := errors.New("the network")
	if _, err := Apply(context.Background(), t.TempDir(), io.MultiReader(bytes.NewReader(layer[:1000]), errReader{broken})); !errors.Is(err, broken) || errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("a reader that fails: %v", err)
	}
}

type errReader struct{ error }

func (r errReader) Read([]byte) (int, error) { return 0, r.error }

// Attributes of other programs' layers: those of the host's policy are passed
// over, and what is not said is left alone.
func TestApplyForeignAttributes(t *testing.T) {
	f := tree{t, t.TempDir()}
	f.dir("d")
	f.xattr("d", "user.mine", "1")
	_, err := Apply(context.Background(), f.root, bytes.NewReader(tarOf(t,
		header{name: "d", kind: dir, change: record("SCHILY.xattr.security.selinux", "label")})))
	must(t, err)
	x := xattrsAt(f.at("d"))
	if _, ok, _ := x.value("security.selinux"); ok {
		t.Error("a label of another host was set")
	}
	if _, ok, _ := x.value("user.mine"); !ok {
		t.Error("an attribute of the image's folder is gone")
	}
	var st unix.Stat_t
	must(t, unix.Lstat(f.at("d"), &st))
	if st.Mtim != timespec(clock) || st.Mode&0o7777 != 0o755 {
		t.Errorf("%+v", st)
	}
}

// A layer of many tiny files does not take all the inodes of a disk.
func TestApplyInodes(t *testing.T) {
	root := t.TempDir()
	if err := unix.Mount("tmpfs", root, "tmpfs", 0, "nr_inodes=100"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(root, 0)
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	for i := range 80 {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprint(i), Mode: 0o600}); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := Apply(t.Context(), root, &layer); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "entries") {
		t.Errorf("error %v", err)
	}
	if made, err := os.ReadDir(root); err != nil || len(made) > 50 {
		t.Errorf("%d files, %v", len(made), err)
	}
}

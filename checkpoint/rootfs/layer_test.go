package rootfs

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// entries lists the names in a tar.
func entries(t testing.TB, data []byte) []string {
	t.Helper()
	var names []string
	for tr := tar.NewReader(bytes.NewReader(data)); ; {
		hdr, err := tr.Next()
		if err == io.EOF {
			return names
		}
		must(t, err)
		names = append(names, hdr.Name)
	}
}

// What a container may do to its files, by the entries that the layer has to have
// and must not have. Each is done on overlayfs, and restored from either kind of
// layer.
func TestLayerOf(t *testing.T) {
	capability := func(f tree, path string) { f.xattr(path, "security.capability", netBind) }
	for _, test := range []struct {
		name    string
		options string
		base    func(tree)
		change  func(tree)
		want    []string
		never   []string
	}{
		{name: "nothing", base: func(f tree) { f.file("a", "1") }, change: func(tree) {}, never: []string{"a"}},
		{name: "a folder made anew is no opaque marker",
			base: func(f tree) {
				f.dir("d/sub")
				f.file("d/gone", "1")
				f.file("d/sub/gone", "1")
				f.file("d/kept", "1")
			},
			change: func(f tree) { f.remove("d"); f.dir("d/sub"); f.file("d/kept", "2") },
			want:   []string{"d/.wh.gone", "d/sub/.wh.gone", "d/kept"},
			never:  []string{"d/.wh..wh..opq", ".wh.d", "d/.wh.kept"}},
		{name: "a folder renamed by copying",
			base:   func(f tree) { f.dir("old"); f.file("old/file", "1") },
			change: func(f tree) { f.remove("old"); f.dir("new"); f.file("new/file", "1") },
			want:   []string{".wh.old", "new/file"}, never: []string{"old/.wh.file"}},
		{name: "a folder renamed by a redirect", options: ",redirect_dir=on",
			base:   func(f tree) { f.dir("old/sub"); f.file("old/sub/file", "1") },
			change: func(f tree) { f.rename("old", "new") },
			want:   []string{".wh.old", "new/sub/file"}},
		{name: "another mode by metacopy", options: ",redirect_dir=on,metacopy=on",
			base:   func(f tree) { f.file("file", "content below") },
			change: func(f tree) { must(f.t, os.Chmod(f.at("file"), 0o600)) },
			want:   []string{"file"}},
		{name: "a folder replaced by a file",
			base:   func(f tree) { f.dir("d"); f.file("d/file", "1") },
			change: func(f tree) { f.remove("d"); f.file("d", "now a file") }, want: []string{"d"}},
		{name: "a file replaced by a folder",
			base:   func(f tree) { f.file("f", "1") },
			change: func(f tree) { f.remove("f"); f.dir("f"); f.file("f/in", "1") }, want: []string{"f/", "f/in"}},
		{name: "a link to a file of the image",
			base:   func(f tree) { f.file("a", "1"); f.link("a", "b") },
			change: func(f tree) { f.dir("sub"); f.link("a", "sub/c") }, want: []string{"sub/c"}},
		{name: "links no more",
			base:   func(f tree) { f.file("a", "1"); f.link("a", "b") },
			change: func(f tree) { f.remove("b"); f.file("b", "1"); f.touch("b", clock); f.touch("a", clock) }},
		{name: "capabilities and attributes",
			base: func(f tree) {
				f.file("lost", "1")
				capability(f, "lost")
				f.dir("d")
				f.xattr("d", "user.lost", "x")
			},
			change: func(f tree) {
				f.file("new", "2")
				capability(f, "new")
				f.xattr("new", "user.bytes", "\x00=\n\xff")
				f.xattr("new", "user.empty", "")
				must(f.t, unix.Lremovexattr(f.at("lost"), "security.capability"))
				must(f.t, unix.Lremovexattr(f.at("d"), "user.lost"))
			}},
		{name: "a default ACL is not inherited",
			base: func(f tree) { f.dir("d") },
			change: func(f tree) {
				f.file("d/before", "1")
				acl := "\x02\x00\x00\x00\x01\x00\x07\x00\xff\xff\xff\xff\x04\x00\x05\x00\xff\xff\xff\xff\x20\x00\x00\x00\xff\xff\xff\xff"
				f.xattr("d", "system.posix_acl_default", acl)
			}},
		{name: "setuid and owners and nanoseconds",
			base: func(f tree) { f.file("f", "1") },
			change: func(f tree) {
				must(f.t, os.Chown(f.at("f"), 4000000000, 3000000))
				must(f.t, unix.Chmod(f.at("f"), 0o6755))
				f.touch("f", clock)
				f.symlink("f", "l")
				f.touch("l", clock.Add(time.Hour))
				f.touch(".", clock.Add(-time.Nanosecond))
			}},
		{name: "a folder only touched",
			base: func(f tree) { f.dir("d"); f.file("d/f", "1") }, change: func(f tree) { f.touch("d", clock) },
			want: []string{"d/"}, never: []string{"d/f"}},
		{name: "names that are not UTF-8",
			base:   func(f tree) { f.file("\xff\xfe", "1") },
			change: func(f tree) { f.remove("\xff\xfe"); f.file("\xe9", "1"); f.symlink("\xfa", "l") },
			want:   []string{".wh.\xff\xfe", "\xe9"}},
		{name: "devices and FIFOs but no sockets",
			base: func(f tree) { f.file("socket", "a file, before") },
			change: func(f tree) {
				f.remove("socket")
				f.node("socket", unix.S_IFSOCK|0o600, 0, 0)
				f.node("fifo", unix.S_IFIFO|0o622, 0, 0)
				f.node("char", unix.S_IFCHR|0o620, unusedMajor, 70000)
				f.node("block", unix.S_IFBLK|0o660, unusedMajor, 3)
			},
			want: []string{".wh.socket", "fifo", "char", "block"}, never: []string{"socket"}},
		{name: "sparse", base: func(tree) {}, change: func(f tree) { f.sparse("s", 64<<20) }, want: []string{"s"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			lower := tree{t, t.TempDir()}
			test.base(lower)
			base := copyTree(t, lower.root)
			o := overlayOn(t, test.options, lower.root)
			test.change(tree{t, o.merged})
			want := describe(t, o.merged, quiet)
			layer := layerOf(t, OverlayLayer{Upper: copyTree(t, o.upper), Lower: o.lower})
			names := entries(t, layer)
			for _, name := range test.want {
				if !slices.Contains(names, name) {
					t.Errorf("%q is missing in %q", name, names)
				}
			}
			for _, name := range test.never {
				if slices.Contains(names, name) {
					t.Errorf("%q is in %q", name, names)
				}
			}
			same(t, "overlay layer", want, describe(t, onto(t, base, layer), quiet))
			layer = layerOf(t, TreeLayer{Root: copyTree(t, o.merged), Base: base})
			root := onto(t, base, layer)
			same(t, "tree layer", want, describe(t, root, quiet))
			if test.name == "sparse" {
				isSparse(t, tree{t, root}.at("s"))
			}
		})
	}
}

func isSparse(t *testing.T, path string) {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Lstat(path, &st))
	if st.Blocks*512 > st.Size/8 {
		t.Errorf("%s: %d bytes of %d are on the disk", path, st.Blocks*512, st.Size)
	}
}

// A name that a layer has another meaning for is an error before anything is
// written.
func TestLayerRefusesAWhiteoutsName(t *testing.T) {
	f := tree{t, t.TempDir()}
	f.file("a", "1")
	f.file(".wh.x", "1")
	var out bytes.Buffer
	err := OverlayLayer{Upper: f.root}.WriteLayer(context.Background(), &out)
	if !errors.Is(err, errdefs.ErrFailedPrecondition) || out.Len() > 0 {
		t.Fatalf("%v, %d bytes written", err, out.Len())
	}
}

// user.overlay.* is anybody's to set in a container, and means nothing.
func TestLayerIgnoresUserOverlay(t *testing.T) {
	lower, upper := tree{t, t.TempDir()}, tree{t, t.TempDir()}
	lower.dir("d")
	lower.file("d/f", "1")
	upper.dir("d")
	upper.xattr("d", "user.overlay.opaque", "y")
	upper.xattr("d", "trusted.overlay.origin", "x")
	layer := layerOf(t, OverlayLayer{Upper: upper.root, Lower: []string{lower.root}})
	if names := entries(t, layer); !slices.Equal(names, []string{"./", "d/"}) {
		t.Error(names)
	}
	if bytes.Contains(layer, []byte("overlay")) {
		t.Error("the layer has overlayfs's attributes")
	}
}

func TestLayerEndsWithItsContext(t *testing.T) {
	f := tree{t, t.TempDir()}
	f.file("a", "1")
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	for _, l := range []interface {
		WriteLayer(context.Context, io.Writer) error
	}{OverlayLayer{Upper: f.root}, TreeLayer{Root: f.root, Base: t.TempDir()}} {
		if err := l.WriteLayer(ctx, io.Discard); !errors.Is(err, context.Canceled) {
			t.Errorf("%T: %v", l, err)
		}
	}
}

package rootfs

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"golang.org/x/sys/unix"
)

// chaos does random things to a tree. What fails is passed over: whether a path
// is there and of the right kind is left to chance.
//
// It runs as root, and makes links that lead out of the tree: so it goes through
// an os.Root where that can do the thing, never through a link it has made, opens
// nothing but regular files, and its devices are of a major number that no driver
// has.
type chaos struct {
	*rand.Rand
	root *os.Root
}

func newChaos(t *testing.T, rng *rand.Rand, dir string) chaos {
	root, err := os.OpenRoot(dir)
	must(t, err)
	t.Cleanup(func() { root.Close() })
	return chaos{rng, root}
}

func (c chaos) name() string {
	names := []string{"a", "b", "c", "d", "etc", "ф", "bytes\xff\xfe", "with space", "new\nline", strings.Repeat("long", 50), "-dash"}
	return names[c.IntN(len(names))]
}

func (c chaos) isFolder(path string) bool {
	st, err := c.root.Lstat(path)
	return err == nil && st.IsDir()
}

// path is one that is there, and of which no part but the last is a link.
func (c chaos) path() string {
	path := "."
	for depth := c.IntN(4); depth >= 0 && c.isFolder(path); depth-- {
		entries, err := fs.ReadDir(c.root.FS(), filepath.ToSlash(path))
		if err != nil || len(entries) == 0 || c.IntN(4) == 0 {
			break
		}
		path = filepath.Join(path, entries[c.IntN(len(entries))].Name())
	}
	return path
}

// fresh is one that may be there, in a folder that is.
func (c chaos) fresh() string {
	dir := c.path()
	if !c.isFolder(dir) {
		dir = filepath.Dir(dir)
	}
	return filepath.Join(dir, c.name())
}

func (c chaos) data() []byte {
	data := make([]byte, c.IntN(3)*c.IntN(20000))
	for i := range data {
		data[i] = byte(c.Uint32())
	}
	return data
}

// write makes or overwrites a regular file, and opens nothing else.
func (c chaos) write(path string) {
	st, err := c.root.Lstat(path)
	if err == nil && !st.Mode().IsRegular() {
		return
	}
	c.root.WriteFile(path, c.data(), 0o644)
}

// raw is the path for calls that os.Root has not. They follow no link: path has
// none but the last part, and the calls leave that alone.
func (c chaos) raw(path string) string { return filepath.Join(c.root.Name(), path) }

func (c chaos) step() {
	path := c.path()
	inside := path != "."
	switch c.IntN(19) {
	case 0, 1, 2:
		c.write(c.fresh())
	case 3, 4:
		c.root.Mkdir(c.fresh(), 0o755)
	case 5:
		if inside {
			c.root.Remove(path)
		}
	case 6:
		if inside {
			c.root.RemoveAll(path)
		}
	case 7:
		if inside { // a folder of the lower layer: EXDEV without redirects
			c.root.Rename(path, c.fresh())
		}
	case 8:
		c.root.Link(path, c.fresh())
	case 9:
		c.root.Symlink([]string{"/nonexistent/passwd", "../../../nonexistent", "a", "nowhere\xff"}[c.IntN(4)], c.fresh())
	case 10:
		unix.Fchmodat(unix.AT_FDCWD, c.raw(path), uint32(c.IntN(0o10000)), unix.AT_SYMLINK_NOFOLLOW)
	case 11:
		c.root.Lchown(path, c.IntN(3)*100000, c.IntN(70000))
	case 12:
		unix.Lsetxattr(c.raw(path), []string{"user.a", "user.b", "user.empty"}[c.IntN(3)], nil, 0)
		unix.Lsetxattr(c.raw(path), "user.a", []byte{0, byte(c.Uint32()), '=', '\n'}, 0)
	case 13:
		unix.Lremovexattr(c.raw(path), "user.a")
	case 14:
		unix.Lsetxattr(c.raw(path), "security.capability", []byte(netBind), 0)
	case 15:
		kinds := []uint32{unix.S_IFIFO, unix.S_IFSOCK, unix.S_IFCHR, unix.S_IFBLK}
		unix.Mknod(c.raw(c.fresh()), kinds[c.IntN(4)]|0o640, int(unix.Mkdev(unusedMajor, uint32(c.IntN(70000)))))
	case 16:
		ts := unix.NsecToTimespec(c.Int64N(int64(4e18)) - int64(1e18))
		unix.UtimesNanoAt(unix.AT_FDCWD, c.raw(path), []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW)
	case 17:
		if st, err := c.root.Lstat(path); err == nil && st.Mode().IsRegular() {
			if f, err := c.root.OpenFile(path, os.O_WRONLY, 0); err == nil {
				f.Truncate(int64(c.IntN(100000)))
				f.Close()
			}
		}
	case 18: // the same path, another kind
		if inside {
			wasFolder := c.isFolder(path)
			c.root.RemoveAll(path)
			if wasFolder {
				c.write(path)
			} else {
				c.root.Mkdir(path, 0o711)
			}
		}
	}
}

// round puts times to the whole second on the files, as they are in images.
func round(t *testing.T, root string) {
	must(t, filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		tree{t, root}.touch(strings.TrimPrefix(path, root), time.Unix(1700000000, 0))
		return nil
	}))
}

func withoutSockets(t *testing.T, root string) {
	must(t, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type() == fs.ModeSocket {
			err = os.Remove(path)
		}
		return err
	}))
}

// asContainerd leaves out what containerd does not restore: the attributes of the
// root, times before 1970, extended attributes that a folder has lost.
func asContainerd(tree map[string]string) map[string]string {
	loose := map[string]string{}
	for path, line := range tree {
		line = regexp.MustCompile(`time -\d+`).ReplaceAllString(line, "time 0")
		if strings.HasPrefix(line, "mode 4") {
			line = regexp.MustCompile(` (user|security)\..*`).ReplaceAllString(line, "")
		}
		if path != "." {
			loose[path] = line
		}
	}
	return loose
}

// Whatever a container does, its layer, applied to what it was started on, gives
// what it saw.
func TestLayersRestoreAnyTree(t *testing.T) {
	for seed := range uint64(16) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 1))
			options := ""
			if seed%3 == 2 {
				options = ",redirect_dir=on,metacopy=on"
			}
			bottom := t.TempDir()
			c := newChaos(t, rng, bottom)
			for range 150 {
				c.step()
			}
			// The middle is the upper of a mount, so it has whiteouts and
			// opaque folders of its own. (No redirects: image layers have none.)
			middle := overlayOn(t, "", bottom)
			c = newChaos(t, rng, middle.merged)
			for range 100 {
				c.step()
			}
			withoutSockets(t, middle.merged)
			round(t, middle.merged)
			base := copyTree(t, middle.merged)

			o := overlayOn(t, options, middle.upper, bottom)
			c = newChaos(t, rng, o.merged)
			for range 150 {
				c.step()
			}
			want := describe(t, o.merged, quiet)

			upper := copyTree(t, o.upper)
			same(t, "copy of the upper folder", describe(t, o.upper, nothing), describe(t, upper, nothing))
			layer := layerOf(t, OverlayLayer{Upper: upper, Lower: o.lower})
			same(t, "overlay layer", want, describe(t, onto(t, base, layer), quiet))

			root := copyTree(t, o.merged)
			same(t, "tree layer", want, describe(t, onto(t, base, layerOf(t, TreeLayer{Root: root, Base: base})), quiet))

			// The format of Podman: a tar, then deletions.
			var files, joined bytes.Buffer
			deleted, err := SplitDeleted(bytes.NewReader(layer), &files)
			if err != nil && strings.Contains(err.Error(), "UTF-8") {
				return
			}
			must(t, err)
			must(t, JoinDeleted(bytes.NewReader(files.Bytes()), deleted, &joined))
			same(t, "split and joined", want, describe(t, onto(t, base, joined.Bytes()), quiet))

			// And as containerd unpacks it, but for what it has no way to do.
			theirs := copyTree(t, base)
			_, err = archive.Apply(context.Background(), theirs, bytes.NewReader(layer))
			must(t, err)
			have := describe(t, theirs, quiet)
			same(t, "unpacked by containerd", asContainerd(want), asContainerd(have))
		})
	}
}

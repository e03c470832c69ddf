package rootfs

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/capture"
)

var (
	_ capture.Layer = OverlayLayer{}
	_ capture.Layer = TreeLayer{}
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestMain(m *testing.M) {
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "these tests mount, make devices and change owners: run them as root (sudo go test)")
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// overlay is a mounted overlayfs.
type overlay struct {
	upper, merged string
	lower         []string // topmost first
}

// overlayOn makes an overlayfs over lower.
func overlayOn(t testing.TB, options string, lower ...string) overlay {
	t.Helper()
	o := overlay{upper: t.TempDir(), merged: t.TempDir(), lower: lower}
	data := fmt.Sprintf("index=off%s,lowerdir=%s,upperdir=%s,workdir=%s", options, strings.Join(lower, ":"), o.upper, t.TempDir())
	if err := unix.Mount("overlay", o.merged, "overlay", unix.MS_NODEV, data); err != nil {
		t.Fatalf("mount overlayfs in %s (%v): set TMPDIR to a folder on ext4, xfs or btrfs, and modprobe overlay", os.TempDir(), err)
	}
	t.Cleanup(func() { must(t, unix.Unmount(o.merged, unix.MNT_DETACH)) })
	return o
}

// quiet are the extended attributes that a comparison passes over.
func quiet(name string) bool {
	return strings.HasPrefix(name, "trusted.") || name == "security.selinux"
}

func nothing(string) bool { return false }

// describe tells all of a tree that a layer carries: a line for each path. skip
// names extended attributes to be left out.
func describe(t testing.TB, root string, skip func(string) bool) map[string]string {
	t.Helper()
	all := map[string]string{}
	first := map[inode]string{}
	must(t, filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		if kind(&st) == unix.S_IFSOCK && skip("trusted.") {
			return nil // a layer has none
		}
		line := fmt.Sprintf("mode %o owner %d:%d time %d", st.Mode, st.Uid, st.Gid, st.Mtim.Nano())
		switch kind(&st) {
		case unix.S_IFREG:
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" size %d sha256 %x", st.Size, sha256.Sum256(data))
		case unix.S_IFLNK:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			line += " -> " + target
		case unix.S_IFCHR, unix.S_IFBLK:
			line += fmt.Sprintf(" device %x", st.Rdev)
		}
		if !isFolder(&st) {
			if _, ok := first[inodeOf(&st)]; !ok {
				first[inodeOf(&st)] = rel
			}
			line += " is " + first[inodeOf(&st)]
		}
		x := xattrsAt(path)
		names, err := x.names()
		if err != nil {
			return err
		}
		slices.Sort(names)
		for _, name := range names {
			if skip(name) {
				continue
			}
			value, _, err := x.value(name)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %s=%q", name, value)
		}
		all[rel] = line
		return nil
	}))
	return all
}

// same compares two descriptions.
func same(t testing.TB, what string, want, have map[string]string) {
	t.Helper()
	paths := maps.Clone(want)
	maps.Copy(paths, have)
	n := 0
	for _, p := range slices.Sorted(maps.Keys(paths)) {
		if want[p] != have[p] {
			if n++; n < 8 {
				t.Errorf("%s: %q\nwant %q\nhave %q", what, p, want[p], have[p])
			}
		}
	}
	if n > 0 {
		t.Fatalf("%s: %d of %d files are different", what, n, len(paths))
	}
}

// layerOf writes a layer twice.
func layerOf(t testing.TB, l capture.Layer) []byte {
	t.Helper()
	var first, second bytes.Buffer
	must(t, l.WriteLayer(context.Background(), &first))
	must(t, l.WriteLayer(context.Background(), &second))
	if !bytes.Equal(first.Bytes(), second.Bytes()) {
		t.Fatal("written twice, the layer is different")
	}
	return first.Bytes()
}

// copyTree is an exact copy in a new folder.
func copyTree(t testing.TB, src string) string {
	t.Helper()
	dst := filepath.Join(t.TempDir(), "copy")
	_, err := Copy(context.Background(), dst, src, nil)
	must(t, err)
	return dst
}

// onto applies a layer to a copy of a tree.
func onto(t testing.TB, base string, layer []byte) string {
	t.Helper()
	root := copyTree(t, base)
	_, err := Apply(context.Background(), root, bytes.NewReader(layer))
	must(t, err)
	return root
}

// tree makes files under a root. A method fails the test.
type tree struct {
	t    testing.TB
	root string
}

// unusedMajor is a major number for local use: no driver has it, here or
// elsewhere, should anything open such a device.
const unusedMajor = 60

var clock = time.Date(2024, 2, 29, 12, 0, 0, 123456789, time.UTC)

func (f tree) at(path string) string { return filepath.Join(f.root, path) }

func (f tree) file(path, content string) {
	f.t.Helper()
	must(f.t, os.WriteFile(f.at(path), []byte(content), 0o644))
}

func (f tree) dir(path string) {
	f.t.Helper()
	must(f.t, os.MkdirAll(f.at(path), 0o755))
}

func (f tree) remove(path string) {
	f.t.Helper()
	must(f.t, os.RemoveAll(f.at(path)))
}

func (f tree) rename(from, to string) {
	f.t.Helper()
	must(f.t, os.Rename(f.at(from), f.at(to)))
}

func (f tree) link(from, to string) {
	f.t.Helper()
	must(f.t, os.Link(f.at(from), f.at(to)))
}

func (f tree) symlink(target, path string) {
	f.t.Helper()
	must(f.t, os.Symlink(target, f.at(path)))
}

func (f tree) xattr(path, name, value string) {
	f.t.Helper()
	must(f.t, unix.Lsetxattr(f.at(path), name, []byte(value), 0))
}

func (f tree) node(path string, mode uint32, major, minor uint32) {
	f.t.Helper()
	must(f.t, unix.Mknod(f.at(path), mode, int(unix.Mkdev(major, minor))))
}

// touch sets the time of a file, not of what it links to.
func (f tree) touch(path string, at time.Time) {
	f.t.Helper()
	ts := timespec(at)
	must(f.t, unix.UtimesNanoAt(unix.AT_FDCWD, f.at(path), []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW))
}

// sparse makes a file with a hole before and after its content.
func (f tree) sparse(path string, size int64) {
	f.t.Helper()
	file, err := os.Create(f.at(path))
	must(f.t, err)
	_, err = file.WriteAt([]byte("in the middle"), size/2)
	must(f.t, err)
	must(f.t, file.Truncate(size))
	must(f.t, file.Close())
}

// netBind is CAP_NET_BIND_SERVICE, permitted and effective, as in a file.
const netBind = "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

package rootfs

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func TestCopyIsExact(t *testing.T) {
	src := tree{t, t.TempDir()}
	src.dir("d/sub")
	src.file("d/big", strings.Repeat("0123456789", 100_000))
	src.sparse("hole", 64<<20)
	src.node("whiteout", unix.S_IFCHR, 0, 0)
	src.node("fifo", unix.S_IFIFO|0o600, 0, 0)
	src.node("socket", unix.S_IFSOCK|0o600, 0, 0)
	src.symlink("/nonexistent", "link")
	src.xattr("d", "trusted.overlay.opaque", "y")
	src.xattr("link", "trusted.overlay.origin", "x")
	src.xattr("d/big", "security.capability", netBind)
	src.xattr("d/big", "user.empty", "")
	src.link("d/big", "d/sub/hard")
	src.link("fifo", "d/fifo")
	src.link("link", "d/link")
	src.file("setuid", "x")
	must(t, os.Chown(src.at("setuid"), 1000, 2000))
	must(t, unix.Chmod(src.at("setuid"), 0o6711))
	for i := range 2000 { // more than one worker takes
		src.file("d/sub/"+strconv.Itoa(i), strconv.Itoa(i))
	}
	must(t, unix.Chmod(src.at("d/sub"), 0o2500))
	for _, path := range []string{"d/sub/7", "link", "fifo", "d/sub", "d", "."} {
		src.touch(path, clock)
	}

	dst := filepath.Join(t.TempDir(), "copy")
	var told atomic.Int64
	n, err := Copy(context.Background(), dst, src.root, func(n int64) { told.Add(n) })
	must(t, err)
	if n != told.Load() || n < 1_000_000 || n > 1_100_000 {
		t.Errorf("%d bytes copied, %d told", n, told.Load())
	}
	for _, path := range []string{"d/sub/7", "link", "."} {
		var st unix.Stat_t
		must(t, unix.Lstat(filepath.Join(dst, path), &st))
		if st.Atim != timespec(clock) {
			t.Errorf("%s: time of access %d", path, st.Atim.Nano())
		}
		must(t, unix.Lstat(src.at(path), &st))
		if st.Atim != timespec(clock) && path != "link" { // which has no O_NOATIME
			t.Errorf("%s: time of access of what was copied: %d", path, st.Atim.Nano())
		}
	}
	isSparse(t, filepath.Join(dst, "hole"))
	same(t, "copy", describe(t, src.root, nothing), describe(t, dst, nothing))
}

func TestCopyRefuses(t *testing.T) {
	src := tree{t, t.TempDir()}
	src.dir("d")
	for _, test := range []struct {
		name, dst, src string
		want           error
	}{
		{"what is there", t.TempDir(), src.root, errdefs.ErrAlreadyExists},
		{"itself", src.at("d/copy"), src.root, errdefs.ErrInvalidArgument},
		{"nothing", filepath.Join(t.TempDir(), "copy"), src.at("none"), os.ErrNotExist},
		{"a place that is not", filepath.Join(t.TempDir(), "none", "copy"), src.root, os.ErrNotExist},
	} {
		_, err := os.Lstat(test.dst)
		was := err == nil
		if _, err := Copy(context.Background(), test.dst, test.src, nil); !errors.Is(err, test.want) {
			t.Errorf("%s: %v", test.name, err)
		}
		if _, err := os.Lstat(test.dst); (err == nil) != was {
			t.Errorf("%s: the destination: %v", test.name, err)
		}
	}
}

// A copy that is cut short in the middle of a file leaves nothing.
func TestCopyEndsWithItsContext(t *testing.T) {
	src := tree{t, t.TempDir()}
	src.file("big", strings.Repeat("x", 1<<20))
	for i := range 1000 {
		src.file(strconv.Itoa(i), "x")
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	why := errors.New("the user pressed Ctrl-C")
	dst := filepath.Join(t.TempDir(), "copy")
	if _, err := Copy(ctx, dst, src.root, func(int64) { cancel(why) }); !errors.Is(err, why) {
		t.Errorf("%v", err)
	}
	if _, err := os.Lstat(dst); !errors.Is(err, os.ErrNotExist) {
		t.Error("the copy is there")
	}
}

func TestCopyLeavesNoDescriptors(t *testing.T) {
	count := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		must(t, err)
		return len(entries)
	}
	src := tree{t, t.TempDir()}
	src.dir("a/b/c/d")
	src.node("a/b/fifo", unix.S_IFIFO|0o600, 0, 0)
	before := count()
	copyTree(t, src.root)
	layerOf(t, OverlayLayer{Upper: src.root, Lower: []string{src.root}})
	onto(t, src.root, layerOf(t, TreeLayer{Root: src.root, Base: t.TempDir()}))
	if after := count(); after > before {
		t.Errorf("%d descriptors, before %d", after, before)
	}
}

package integration

import (
	"bytes"
	"crypto/rand"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/rootfs"
)

// TestReflink copies a writable layer on a file system that can share blocks: the
// copy takes none.
func TestReflink(t *testing.T) {
	dir := t.TempDir()
	disk, mounted := filepath.Join(dir, "disk"), filepath.Join(dir, "mnt")
	must(t, os.WriteFile(disk, nil, 0o600))
	must(t, os.Truncate(disk, 1<<30))
	for _, command := range [][]string{{"mkfs.btrfs", "--quiet", disk}, {"mkdir", mounted}, {"mount", "-o", "loop", disk, mounted}} {
		if out, err := exec.Command(command[0], command[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%q: %v: %s (mkfs.btrfs is had by contrib/setup.sh and eval \"$(contrib/setup.sh --env)\")", command, err, out)
		}
	}
	t.Cleanup(func() { must(t, unix.Unmount(mounted, 0)) })
	const size = 64 << 20
	data := make([]byte, size)
	rand.Read(data)
	upper, copied := filepath.Join(mounted, "upper"), filepath.Join(mounted, "copy")
	must(t, os.Mkdir(upper, 0o755))
	must(t, os.WriteFile(filepath.Join(upper, "file"), data, 0o644))
	used := func() int64 {
		unix.Sync()
		var st unix.Statfs_t
		must(t, unix.Statfs(mounted, &st))
		return int64(st.Blocks-st.Bfree) * st.Bsize
	}
	before := used()
	n, err := rootfs.Copy(t.Context(), copied, upper, nil)
	must(t, err)
	if n != size {
		t.Errorf("copied %d bytes", n)
	}
	if more := used() - before; more > size/4 {
		t.Errorf("the copy takes %d bytes", more)
	}
	// It does not change with what it is a copy of.
	must(t, os.WriteFile(filepath.Join(upper, "file"), []byte("changed"), 0o644))
	if got, err := os.ReadFile(filepath.Join(copied, "file")); err != nil || !bytes.Equal(got, data) {
		t.Errorf("the copy is not what was there: %v", err)
	}
}

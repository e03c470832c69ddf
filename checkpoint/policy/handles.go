package policy

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fh"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fsnotify"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/mnt"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/layout"
)

// checkHandles looks at inotify watches that an image names by a file handle. CRIU
// opens it as root, on any mount of that file system: on a volume's it finds each
// file of the host's disk, and the container would see what happens to it.
func (c *checker) checkHandles(rootfs string) error {
	sources := map[uint32][]string{} // folders of this host, by the number of their file system
	for _, list := range c.mounts {
		for _, m := range list {
			switch w, listed := c.wanted[m.at]; {
			case m.at == "/":
				if m.GetFstype() != uint32(mnt.Fstype_OVERLAYFS) {
					sources[m.GetRootDev()] = append(sources[m.GetRootDev()], rootfs)
				}
			case listed && isBind(w.Mount):
				sources[m.GetRootDev()] = append(sources[m.GetRootDev()], w.Source)
			}
		}
	}
	return c.each(layout.Files, "FILES", func(msg []byte) error {
		var e fdinfo.FileEntry
		if err := c.decode(msg, &e); err != nil {
			return err
		}
		for _, wd := range e.GetIfy().GetWd() {
			if wd.GetFHandle().Path == nil {
				if err := c.checkHandle(e.GetId(), wd, sources[wd.GetSDev()]); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

func (c *checker) checkHandle(id uint32, wd *fsnotify.InotifyWdEntry, sources []string) error {
	if len(sources) == 0 {
		return nil // a file system of the container's own, or one that CRIU will not find
	}
	for _, source := range sources {
		if err := c.budget.step(); err != nil {
			return err
		}
		found, err := openHandle(source, wd.GetFHandle())
		real, err2 := filepath.EvalSymlinks(source)
		if err == nil && err2 == nil && isBelow(found, real) {
			return nil
		}
	}
	c.refuse("%s: watches a file by a handle (inode %d) that is in none of the spec's mounts", opened{c, id}, wd.GetIIno())
	return nil
}

// openHandle returns the path of the file with that handle on the file system of a
// folder.
func openHandle(dir string, h *fh.FhEntry) (string, error) {
	var b []byte
	for _, word := range h.GetHandle() {
		b = binary.NativeEndian.AppendUint64(b, word)
	}
	if n := int(h.GetBytes()); n < len(b) {
		b = b[:n]
	}
	mount, err := os.Open(dir)
	if err != nil {
		return "", err
	}
	defer mount.Close()
	fd, err := unix.OpenByHandleAt(int(mount.Fd()), unix.NewFileHandle(int32(h.GetType()), b), unix.O_PATH|unix.O_CLOEXEC)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	return os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
}

package rootfs

import (
	"errors"
	"os"
	"path"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

// folder is an open folder of a tree. What it holds is named relative to it, so
// no step of a walk depends on the path that led to it, and follows no link.
type folder struct {
	file *os.File
	fd   int
	path string // from the root of the tree, for messages; "" is the root
}

// inode is a file, whatever its names.
type inode struct{ dev, ino uint64 }

func inodeOf(st *unix.Stat_t) inode { return inode{st.Dev, st.Ino} }

func kind(st *unix.Stat_t) uint32 { return st.Mode & unix.S_IFMT }

func isFolder(st *unix.Stat_t) bool { return kind(st) == unix.S_IFDIR }

// openRoot opens the root of a tree. The path itself is the caller's, and may
// be a link.
func openRoot(root string) (*folder, error) {
	f, err := os.OpenFile(root, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOATIME, 0)
	if err != nil {
		return nil, err
	}
	return &folder{file: f, fd: int(f.Fd())}, nil
}

func newFolder(fd int, path string) *folder {
	return &folder{file: os.NewFile(uintptr(fd), path), fd: fd, path: path}
}

func (d *folder) close() { d.file.Close() }

// at is the path of an entry from the root of the tree.
func (d *folder) at(name string) string { return path.Join(d.path, name) }

// fail says which file an error is about.
func (d *folder) fail(op, name string, err error) error {
	if err == nil {
		return nil
	}
	return &os.PathError{Op: op, Path: "/" + d.at(name), Err: err}
}

// proc names an entry for the system calls that have no form relative to a
// folder. They have to be those that follow no link.
func (d *folder) proc(name string) string {
	return "/proc/self/fd/" + strconv.Itoa(d.fd) + "/" + name
}

func (d *folder) open(name string) (*folder, error) {
	fd, err := unix.Openat(d.fd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_NOATIME|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, d.fail("open", name, err)
	}
	return newFolder(fd, d.at(name)), nil
}

// openFile opens a regular file for reading. It leaves no trace: the time of
// access is part of what is saved.
func (d *folder) openFile(name string) (int, error) {
	fd, err := unix.Openat(d.fd, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOATIME|unix.O_CLOEXEC, 0)
	return fd, d.fail("open", name, err)
}

func (d *folder) stat(name string) (st unix.Stat_t, err error) {
	return st, d.fail("stat", name, unix.Fstatat(d.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW))
}

// has stats an entry that may not be there.
func (d *folder) has(name string) (st unix.Stat_t, ok bool, err error) {
	st, err = d.stat(name)
	if errors.Is(err, unix.ENOENT) {
		return st, false, nil
	}
	return st, err == nil, err
}

// self stats the folder.
func (d *folder) self() (st unix.Stat_t, err error) {
	return st, d.fail("stat", "", unix.Fstat(d.fd, &st))
}

func (d *folder) readlink(name string) (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(d.fd, name, buf)
	if err != nil {
		return "", d.fail("readlink", name, err)
	}
	return string(buf[:n]), nil
}

// names lists the folder, sorted by bytes.
func (d *folder) names() ([]string, error) {
	if _, err := d.file.Seek(0, 0); err != nil { // it may be listed again
		return nil, d.fail("list", "", err)
	}
	names, err := d.file.Readdirnames(-1)
	if err != nil {
		return nil, d.fail("list", "", err)
	}
	slices.Sort(names)
	return names, nil
}

// remove removes an entry and all below it, following no link. It is no error
// if there is none.
func (d *folder) remove(name string) error {
	err := unix.Unlinkat(d.fd, name, 0)
	switch err {
	case nil, unix.ENOENT:
		return nil
	case unix.EISDIR, unix.EPERM: // what Linux and POSIX say of a folder
	default:
		return d.fail("remove", name, err)
	}
	root, err := os.OpenRoot(d.proc("."))
	if err != nil {
		return d.fail("remove", name, err)
	}
	defer root.Close()
	if err := root.RemoveAll(name); err != nil {
		var pe *os.PathError
		if errors.As(err, &pe) {
			err = pe.Err
		}
		return d.fail("remove", name, err)
	}
	return nil
}

// setTimes sets the times of an entry, of the folder itself if it is ".".
func (d *folder) setTimes(name string, atime, mtime unix.Timespec) error {
	return d.fail("set the times of", name,
		unix.UtimesNanoAt(d.fd, name, []unix.Timespec{atime, mtime}, unix.AT_SYMLINK_NOFOLLOW))
}

package rootfs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/fault"
)

// Copy makes an exact copy of the tree src as dst, and returns how many bytes of
// content it has, holes not counted. It is exact in what overlayfs and the
// container can see: kinds of files (overlayfs's whiteouts are devices), hard
// links, holes, owners, modes, times, all extended attributes. Nothing may
// change in src meanwhile: the container is frozen.
//
// dst must not exist (errdefs.ErrAlreadyExists) but its folder must. When Copy
// fails or ctx ends, dst is removed. done, if not nil, is told the number of
// bytes copied since it was told last, from several goroutines at once.
func Copy(ctx context.Context, dst, src string, done func(bytes int64)) (_ int64, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("copy %s to %s: %w", src, dst, err)
		}
	}()
	from, err := openRoot(src)
	if err != nil {
		return 0, err
	}
	if err := os.Mkdir(dst, 0o700); errors.Is(err, os.ErrExist) {
		from.close()
		return 0, fault.New(errdefs.ErrAlreadyExists, "there is something of this name; give a new one, or remove it")
	} else if err != nil {
		from.close()
		return 0, err
	}
	defer func() {
		if err != nil {
			os.RemoveAll(dst)
		}
	}()
	to, err := openRoot(dst)
	if err != nil {
		from.close()
		return 0, err
	}
	st, err := to.self()
	if err != nil {
		from.close()
		to.close()
		return 0, err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	c := &copier{workers: g, dst: filepath.Clean(dst), self: inodeOf(&st), links: map[inode]*link{}, done: done}
	c.reflink.Store(true)
	g.Go(func() error { return c.folder(ctx, from, to) })
	if err := g.Wait(); err != nil {
		return 0, err
	}
	return c.bytes.Load(), nil
}

// batch is how many files of one folder a worker takes at once. The files of a
// smaller folder are not worth being shared.
const batch = 512

// copier is one run of Copy. Its workers take folders and batches of files; one
// that finds no free worker does the work itself, so that the folders held open
// are those on the way down, and no queue grows.
type copier struct {
	workers *errgroup.Group
	dst     string
	self    inode // of dst, which may not be within src
	reflink atomic.Bool
	bytes   atomic.Int64
	done    func(int64)

	mu    sync.Mutex
	links map[inode]*link // files with several names
}

// link is a file of several names, from when the first of them was met.
type link struct {
	path string        // in dst
	made chan struct{} // closed when it is there, or has failed
	err  error
}

// folder copies a folder, and closes both.
func (c *copier) folder(ctx context.Context, from, to *folder) error {
	defer from.close()
	defer to.close()
	var (
		mu      sync.Mutex
		folders []string // in it
		batches sync.WaitGroup
	)
	for {
		names, err := from.file.Readdirnames(batch)
		if len(names) == 0 {
			if err == io.EOF || err == nil {
				break
			}
			batches.Wait()
			return from.fail("list", "", err)
		}
		batches.Add(1)
		work := func() error {
			defer batches.Done()
			for _, name := range names {
				if err := ended(ctx); err != nil {
					return err
				}
				isFolder, err := c.entry(ctx, from, to, name)
				if err != nil {
					return err
				}
				if isFolder {
					mu.Lock()
					folders = append(folders, name)
					mu.Unlock()
				}
			}
			return nil
		}
		if len(names) == batch && c.workers.TryGo(work) {
			continue
		}
		if err := work(); err != nil {
			batches.Wait()
			return err
		}
	}
	batches.Wait()
	if err := ended(ctx); err != nil {
		return err
	}
	// Nothing is made in it any more, what comes is made further down. A
	// default ACL or the setgid bit would have been inherited before.
	st, err := from.self()
	if err != nil {
		return err
	}
	if err := attributes(from.fd, to.fd, &st); err != nil {
		return to.fail("copy the attributes of", "", err)
	}
	if err := to.setTimes(".", st.Atim, st.Mtim); err != nil {
		return err
	}
	for _, name := range folders {
		subFrom, err := from.open(name)
		if err != nil {
			return err
		}
		subTo, err := to.open(name)
		if err != nil {
			subFrom.close()
			return err
		}
		if c.workers.TryGo(func() error { return c.folder(ctx, subFrom, subTo) }) {
			continue
		}
		if err := c.folder(ctx, subFrom, subTo); err != nil {
			return err
		}
	}
	return nil
}

// entry copies what is not a folder, and only makes what is one.
func (c *copier) entry(ctx context.Context, from, to *folder, name string) (isFolder bool, err error) {
	st, err := from.stat(name)
	if err != nil {
		return false, err
	}
	if kind(&st) == unix.S_IFDIR {
		if inodeOf(&st) == c.self {
			return false, fault.Invalid("the copy would be within what is copied; give a folder elsewhere")
		}
		return true, to.fail("mkdir", name, unix.Mkdirat(to.fd, name, 0o700))
	}
	made := func(error) {}
	if st.Nlink > 1 {
		c.mu.Lock()
		first := c.links[inodeOf(&st)]
		if first == nil {
			first = &link{path: to.at(name), made: make(chan struct{})}
			c.links[inodeOf(&st)] = first
			var once sync.Once
			made = func(err error) { once.Do(func() { first.err = err; close(first.made) }) }
			c.mu.Unlock()
		} else {
			c.mu.Unlock()
			<-first.made // by a worker that waits for nobody
			if first.err != nil {
				return false, first.err
			}
			return false, c.link(first.path, to, name)
		}
	}
	defer func() { made(err) }()
	if kind(&st) == unix.S_IFREG {
		return false, c.file(ctx, from, to, name, &st, func() { made(nil) })
	}
	return false, special(from, to, name, &st)
}

// link gives a copied file another name.
func (c *copier) link(first string, to *folder, name string) error {
	return to.fail("link", name, unix.Linkat(unix.AT_FDCWD, filepath.Join(c.dst, first), to.fd, name, 0))
}

// file copies a regular file. made is called when there is something to link to.
func (c *copier) file(ctx context.Context, from, to *folder, name string, st *unix.Stat_t, made func()) error {
	src, err := from.openFile(name)
	if err != nil {
		return err
	}
	defer unix.Close(src)
	dst, err := unix.Openat(to.fd, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return to.fail("create", name, err)
	}
	defer unix.Close(dst)
	made()
	if st.Size > 0 {
		if err := c.content(ctx, dst, src, st); err != nil {
			return from.fail("copy", name, err)
		}
	}
	// After the content: a write takes away capabilities.
	if err := attributes(src, dst, st); err != nil {
		return to.fail("copy the attributes of", name, err)
	}
	return to.setTimes(name, st.Atim, st.Mtim)
}

// attributes copies owner, mode and extended attributes, in this order: a new
// owner takes away the setuid bit and capabilities.
func attributes(src, dst int, st *unix.Stat_t) error {
	if err := unix.Fchown(dst, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	if err := unix.Fchmod(dst, st.Mode&0o7777); err != nil {
		return err
	}
	return copyXattrs(xattrsOf(dst), xattrsOf(src))
}

// special copies a link, device, FIFO or socket.
func special(from, to *folder, name string, st *unix.Stat_t) error {
	if kind(st) == unix.S_IFLNK {
		target, err := from.readlink(name)
		if err != nil {
			return err
		}
		if err := unix.Symlinkat(target, to.fd, name); err != nil {
			return to.fail("symlink", name, err)
		}
	} else if err := unix.Mknodat(to.fd, name, kind(st)|0o600, int(st.Rdev)); err != nil {
		return to.fail("mknod", name, err)
	}
	if err := unix.Fchownat(to.fd, name, int(st.Uid), int(st.Gid), unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return to.fail("chown", name, err)
	}
	if kind(st) != unix.S_IFLNK { // whose mode means nothing
		if err := unix.Fchmodat(to.fd, name, st.Mode&0o7777, 0); err != nil {
			return to.fail("chmod", name, err)
		}
	}
	if err := copyXattrs(xattrsAt(to.proc(name)), xattrsAt(from.proc(name))); err != nil {
		return to.fail("copy the attributes of", name, err)
	}
	return to.setTimes(name, st.Atim, st.Mtim)
}

func copyXattrs(dst, src xattrs) error {
	names, err := src.names()
	if err != nil {
		return err
	}
	for _, name := range names {
		value, ok, err := src.value(name)
		if err != nil {
			return fmt.Errorf("read %s: %w", name, err)
		}
		if !ok {
			continue
		}
		if err := dst.set(name, value); err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
	}
	return nil
}

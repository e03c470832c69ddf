package rootfs

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/fault"
)

// Apply puts an OCI layer, uncompressed, onto the root filesystem in the folder
// root, and returns the bytes of content it has written, holes counted. It reads
// layer up to its end. After an error the root filesystem is not to
// be used; a layer that is at fault gives errdefs.ErrInvalidArgument.
//
// The layer is untrusted. Links on the way to a file lead nowhere but into root;
// other mounts in root are not entered. Refused are paths that are absolute or
// go up, overlayfs's whiteouts and attributes, files named twice, tars that programs
// read differently (package tarcheck), and more than 4 Mi entries (or half of the
// inodes that are free) or 1 TiB. Its owners, modes and devices are the container's
// matter, as those of any image are.
//
// Podman's crutils has it as CRApplyRootFsDiffTar, for a tar without whiteouts.
// containerd's archive.Apply would lose what a copy of a container has: the
// attributes of the root, holes, attributes that were removed from a folder of
// the image.
func Apply(ctx context.Context, root string, layer io.Reader) (int64, error) {
	n, err := apply(ctx, root, layer, defaultLimits)
	if err != nil {
		return n, fmt.Errorf("apply a layer to %s: %w", root, err)
	}
	return n, nil
}

func apply(ctx context.Context, root string, layer io.Reader, l limits) (int64, error) {
	r, err := openRoot(root)
	if err != nil {
		return 0, err
	}
	defer r.close()
	var st unix.Statfs_t
	if err := unix.Fstatfs(r.fd, &st); err != nil {
		return 0, r.fail("statfs", "", err)
	}
	if st.Files > 0 { // else the file system has no fixed number
		l.entries = int(min(uint64(l.entries), st.Ffree/2))
	}
	a := &applier{root: r, guard: newGuard(layer, l), buf: make([]byte, 256<<10)}
	defer a.forget()
	for {
		if err := ended(ctx); err != nil {
			return a.written, err
		}
		entry, err := a.guard.next()
		if err == io.EOF {
			break
		}
		if err == nil {
			err = a.entry(ctx, entry)
		}
		if err != nil {
			return a.written, err
		}
	}
	// Last, since what is done in a folder changes its times, and a default ACL
	// would be inherited.
	for _, entry := range a.folders {
		if err := a.finishFolder(entry); err != nil {
			return a.written, err
		}
	}
	return a.written, nil
}

type applier struct {
	root    *folder
	guard   *guard
	folders []item
	written int64
	buf     []byte

	// parent is the folder of the last entry, which is most often that of the
	// next one too.
	parent     *folder
	parentPath string
}

// forget has to be called when a folder may have gone.
func (a *applier) forget() {
	if a.parent != nil && a.parent != a.root {
		a.parent.close()
	}
	a.parent = nil
}

// resolve opens a folder of the root filesystem. Links in its path are followed as
// the container would.
func (a *applier) resolve(p string) (*folder, error) {
	if p == "" {
		p = "."
	}
	fd, err := unix.Openat2(a.root.fd, p, &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV,
	})
	if err != nil {
		return nil, a.root.fail("open", p, err)
	}
	return newFolder(fd, p), nil
}

// in returns the folder p, and makes it if a layer leaves it out.
func (a *applier) in(p string) (*folder, error) {
	if p == "" {
		return a.root, nil
	}
	if a.parent != nil && a.parentPath == p {
		return a.parent, nil
	}
	d, err := a.resolve(p)
	if errors.Is(err, unix.ENOENT) {
		dir, base := split(p)
		above, err := a.in(dir)
		if err != nil {
			return nil, err
		}
		if err := unix.Mkdirat(above.fd, base, 0o755); err != nil {
			return nil, above.fail("mkdir", base, err)
		}
		if err := unix.Fchmodat(above.fd, base, 0o755, 0); err != nil { // umask
			return nil, above.fail("chmod", base, err)
		}
		if d, err = above.open(base); err != nil {
			return nil, err
		}
	} else if err != nil {
		return nil, err
	}
	a.forget()
	a.parent, a.parentPath = d, p
	return d, nil
}

func split(p string) (dir, base string) {
	dir, base = path.Split(p)
	return strings.TrimSuffix(dir, "/"), base
}

func (a *applier) entry(ctx context.Context, e item) error {
	if e.path == "" {
		a.folders = append(a.folders, e)
		return nil
	}
	dir, base := split(e.path)
	d, err := a.in(dir)
	if err != nil {
		return err
	}
	if deleted, ok := e.whiteout(); ok {
		name := path.Base(deleted)
		isFolder, ours := a.guard.seen[deleted]
		switch {
		case !ours:
			return a.remove(d, name)
		case isFolder: // which has replaced one
			return descend(d, name, func(sub *folder) error { return a.empty(ctx, sub, deleted) })
		}
		return nil
	}
	if folder, ok := e.opaque(); ok {
		return a.empty(ctx, d, folder)
	}
	st, there, err := d.has(base)
	if err != nil {
		return err
	}
	if there && !(isFolder(&st) && e.Typeflag == tar.TypeDir) {
		if err := a.remove(d, base); err != nil {
			return err
		}
		// A folder that was removed may have been d's own name, by a link.
		if d, err = a.in(dir); err != nil {
			return err
		}
		there = false
	}
	switch e.Typeflag {
	case tar.TypeDir:
		if !there {
			err = unix.Mkdirat(d.fd, base, 0o700)
		}
		a.folders = append(a.folders, e)
		return d.fail("mkdir", base, err)
	case tar.TypeReg:
		return a.file(ctx, d, base, e)
	case tar.TypeLink:
		return a.link(d, base, e)
	case tar.TypeSymlink:
		err = unix.Symlinkat(e.Linkname, d.fd, base)
	default:
		mode := map[byte]uint32{tar.TypeChar: unix.S_IFCHR, tar.TypeBlock: unix.S_IFBLK, tar.TypeFifo: unix.S_IFIFO}[e.Typeflag]
		err = unix.Mknodat(d.fd, base, mode|0o600, int(unix.Mkdev(uint32(e.Devmajor), uint32(e.Devminor))))
	}
	if err != nil {
		return d.fail("create", base, err)
	}
	if err := unix.Fchownat(d.fd, base, e.Uid, e.Gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return d.fail("chown", base, err)
	}
	if e.Typeflag != tar.TypeSymlink {
		if err := unix.Fchmodat(d.fd, base, uint32(e.Mode&0o7777), 0); err != nil {
			return d.fail("chmod", base, err)
		}
	}
	if err := setXattrs(xattrsAt(d.proc(base)), e); err != nil {
		return d.fail("set the attributes of", base, err)
	}
	return d.setTimes(base, timespec(e.ModTime), timespec(e.ModTime))
}

func (a *applier) remove(d *folder, name string) error {
	st, ok, err := d.has(name)
	if err != nil || !ok {
		return err
	}
	if err := d.remove(name); err != nil {
		return err
	}
	if isFolder(&st) || kind(&st) == unix.S_IFLNK {
		a.forget() // d may be gone with it
	}
	return nil
}

// empty removes what a folder has from below the layer. A marker may come after
// entries of the layer, to which it does not apply.
func (a *applier) empty(ctx context.Context, d *folder, p string) error {
	if err := ended(ctx); err != nil {
		return err
	}
	names, err := d.names()
	if err != nil {
		return err
	}
	for _, name := range names {
		child := path.Join(p, name)
		isFolder, ours := a.guard.seen[child]
		switch {
		case !ours:
			err = d.remove(name)
		case isFolder:
			err = descend(d, name, func(sub *folder) error { return a.empty(ctx, sub, child) })
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (a *applier) link(d *folder, base string, e item) error {
	dir, name := split(e.Linkname)
	target := a.root
	if dir != "" {
		var err error
		if target, err = a.resolve(dir); err != nil {
			return fault.Invalid("entry %q: a hard link to %q: %v", e.path, e.Linkname, err)
		}
		defer target.close()
	}
	// Without AT_SYMLINK_FOLLOW: a link's other name is a link.
	if err := unix.Linkat(target.fd, name, d.fd, base, 0); err != nil {
		return fault.Invalid("entry %q: a hard link to %q: %v", e.path, e.Linkname, err)
	}
	return nil
}

func (a *applier) file(ctx context.Context, d *folder, base string, e item) error {
	fd, err := unix.Openat(d.fd, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return d.fail("create", base, err)
	}
	defer unix.Close(fd)
	if err := a.content(ctx, fd, e.Size); err != nil {
		return d.fail("write", base, readError("", err))
	}
	if err := a.attributes(fd, e); err != nil {
		return d.fail("set the attributes of", base, err)
	}
	return d.setTimes(base, timespec(e.ModTime), timespec(e.ModTime))
}

// attributes sets owner, mode and extended attributes, in this order: a new owner
// takes away the setuid bit and capabilities.
func (a *applier) attributes(fd int, e item) error {
	if err := unix.Fchown(fd, e.Uid, e.Gid); err != nil {
		return err
	}
	if err := unix.Fchmod(fd, uint32(e.Mode&0o7777)); err != nil {
		return err
	}
	return setXattrs(xattrsOf(fd), e)
}

// block is the smallest hole worth making.
const block = 4096

var zeros [block]byte

// content writes a file, and leaves holes where it is zero.
func (a *applier) content(ctx context.Context, fd int, size int64) error {
	for at := int64(0); at < size; {
		if err := ended(ctx); err != nil {
			return err
		}
		n := int(min(size-at, int64(len(a.buf))))
		if _, err := io.ReadFull(a.guard.tr, a.buf[:n]); err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
		for start := 0; start < n; {
			end := start
			for end < n && !bytes.Equal(a.buf[end:min(end+block, n)], zeros[:min(block, n-end)]) {
				end = min(end+block, n)
			}
			if err := writeAt(fd, a.buf[start:end], at+int64(start)); err != nil {
				return err
			}
			for start = end; start < n && bytes.Equal(a.buf[start:min(start+block, n)], zeros[:min(block, n-start)]); {
				start = min(start+block, n)
			}
		}
		at += int64(n)
		a.written += int64(n)
	}
	if size == 0 {
		return nil
	}
	return unix.Ftruncate(fd, size)
}

// finishFolder gives a folder its attributes, if it is still one.
func (a *applier) finishFolder(e item) error {
	d := a.root
	if e.path != "" {
		dir, base := split(e.path)
		in, err := a.resolve(dir)
		if err == nil {
			defer in.close()
			d, err = in.open(base)
		}
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
			return nil
		} else if err != nil {
			return err
		}
		defer d.close()
	}
	if err := a.attributes(d.fd, e); err != nil {
		return d.fail("set the attributes of", "", err)
	}
	return d.setTimes(".", timespec(e.ModTime), timespec(e.ModTime))
}

// setXattrs sets the attributes of an entry, but those of the host's policy.
func setXattrs(x xattrs, e item) error {
	if e.PAXRecords[completeRecord] == completeValue {
		names, err := x.names()
		if err != nil {
			return err
		}
		for _, name := range names {
			if _, ok := e.PAXRecords[xattrRecord+name]; !ok && carries(name) {
				if err := x.remove(name); err != nil && !errors.Is(err, unix.ENODATA) {
					return fmt.Errorf("remove %s: %w", name, err)
				}
			}
		}
	}
	var names []string
	for record := range e.PAXRecords {
		if name, ok := strings.CutPrefix(record, xattrRecord); ok && carries(name) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	for _, name := range names {
		if err := x.set(name, []byte(e.PAXRecords[xattrRecord+name])); err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
	}
	return nil
}

func timespec(t time.Time) unix.Timespec {
	return unix.Timespec{Sec: t.Unix(), Nsec: int64(t.Nanosecond())}
}

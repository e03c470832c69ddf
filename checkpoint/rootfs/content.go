package rootfs

import (
	"context"
	"errors"
	"sync"

	"golang.org/x/sys/unix"
)

// smallFile is what is read and written at once: for less than that the kernel's
// own ways of copying are slower.
const smallFile = 128 << 10

// piece is how much is copied between two looks at the context.
const piece = 16 << 20

var buffers = sync.Pool{New: func() any { b := make([]byte, smallFile); return &b }}

// content copies st.Size bytes, and keeps the holes.
func (c *copier) content(ctx context.Context, dst, src int, st *unix.Stat_t) error {
	if c.reflink.Load() {
		err := unix.IoctlFileClone(dst, src)
		switch err {
		case nil:
			c.progress(min(st.Size, st.Blocks*512))
			return nil
		case unix.EOPNOTSUPP, unix.EXDEV, unix.ENOTTY, unix.ENOSYS:
			c.reflink.Store(false) // nor will the next file
		default: // this file's own matter, such as a swap file
		}
	}
	if st.Blocks*512 >= st.Size {
		return c.data(ctx, dst, src, 0, st.Size)
	}
	for at := int64(0); at < st.Size; {
		start, err := unix.Seek(src, at, unix.SEEK_DATA)
		switch {
		case errors.Is(err, unix.ENXIO): // a hole up to the end
			return unix.Ftruncate(dst, st.Size)
		case errors.Is(err, unix.EINVAL): // a file system that cannot tell
			return c.data(ctx, dst, src, at, st.Size)
		case err != nil:
			return err
		}
		end, err := unix.Seek(src, start, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		if end = min(end, st.Size); end <= start {
			return unix.Ftruncate(dst, st.Size)
		}
		if err := c.data(ctx, dst, src, start, end); err != nil {
			return err
		}
		at = end
	}
	return unix.Ftruncate(dst, st.Size)
}

var errChanged = errors.New("the file changes while it is copied; freeze the container first")

// data copies the bytes from start to end, to the same place.
func (c *copier) data(ctx context.Context, dst, src int, start, end int64) error {
	for end-start > smallFile {
		if err := ended(ctx); err != nil {
			return err
		}
		in, out := start, start
		n, err := unix.CopyFileRange(src, &in, dst, &out, int(min(end-start, piece)), 0)
		if err == unix.EINTR {
			continue
		}
		if err == unix.ENOSPC || err == unix.EDQUOT || err == unix.EIO {
			return err
		}
		if err != nil || n == 0 { // not between these file systems
			break
		}
		start += int64(n)
		c.progress(int64(n))
	}
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	for start < end {
		if err := ended(ctx); err != nil {
			return err
		}
		n, err := unix.Pread(src, (*buf)[:min(end-start, smallFile)], start)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		if n == 0 {
			return errChanged
		}
		if err := writeAt(dst, (*buf)[:n], start); err != nil {
			return err
		}
		start += int64(n)
		c.progress(int64(n))
	}
	return nil
}

func (c *copier) progress(n int64) {
	c.bytes.Add(n)
	if c.done != nil {
		c.done(n)
	}
}

func writeAt(fd int, b []byte, at int64) error {
	for len(b) > 0 {
		n, err := unix.Pwrite(fd, b, at)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		b, at = b[n:], at+int64(n)
	}
	return nil
}

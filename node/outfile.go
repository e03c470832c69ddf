package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// Output is where a file goes.
type Output struct {
	// Path is a file; see WriteFile.
	Path string
	// Writer, if not nil, takes what would be in the file. Path then is what errors
	// call it.
	Writer io.Writer
}

// isSet tells whether it is anywhere.
func (o Output) isSet() bool { return o.Path != "" || o.Writer != nil }

// Write has write write it.
func (o Output) Write(ctx context.Context, write func(io.Writer) error) error {
	if o.Writer != nil {
		return write(o.Writer)
	}
	return WriteFile(ctx, o.Path, write)
}

// WriteFile has write write a file, for its owner alone from the first byte on. A regular file
// is there when all of it is: what had the name stays until then, and behind a link
// it is the link's target that is replaced. To a device, a FIFO or a socket, which
// must not be replaced, it writes.
func WriteFile(ctx context.Context, path string, write func(io.Writer) error) (err error) {
	// The kernel follows links here, and refuses those that another user has made in
	// a folder like /tmp.
	info, err := os.Stat(path)
	switch {
	case err == nil && info.IsDir():
		return &fs.PathError{Op: "write", Path: path, Err: unix.EISDIR}
	case err == nil && !info.Mode().IsRegular(), err == nil && inProc(path):
		return writeNode(ctx, path, write)
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return err
	}
	target, err := followLinks(path)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(target), ".stasis-*") // 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	err = write(f)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	return os.Rename(f.Name(), target)
}

// inProc tells whether a path is one of /proc's links to open files, such as that
// behind /dev/fd/5: whoever has the file open wants it written, and not replaced.
func inProc(path string) bool {
	for range maxLinks {
		var st unix.Statfs_t
		if unix.Statfs(filepath.Dir(path), &st) == nil && st.Type == unix.PROC_SUPER_MAGIC {
			return true
		}
		to, err := os.Readlink(path)
		if err != nil {
			return false
		}
		path = beside(path, to)
	}
	return false
}

// maxLinks is as many as the kernel follows.
const maxLinks = 40

// followLinks returns what a path leads to in the end, which need not exist.
func followLinks(path string) (string, error) {
	for range maxLinks {
		to, err := os.Readlink(path)
		switch {
		case errors.Is(err, unix.EINVAL), errors.Is(err, fs.ErrNotExist): // no link
			return path, nil
		case err != nil:
			return "", err
		}
		path = beside(path, to)
	}
	return "", &fs.PathError{Op: "write", Path: path, Err: unix.ELOOP}
}

// beside is what a link at path leads to. It is not cleaned: with ".." in it that
// could be another file.
func beside(path, to string) string {
	if filepath.IsAbs(to) {
		return to
	}
	if dir, _ := filepath.Split(path); dir != "" {
		return dir + to
	}
	return to
}

// writeNode writes to a device, a FIFO or an open file.
func writeNode(ctx context.Context, path string, write func(io.Writer) error) error {
	f, err := openNode(ctx, path)
	if err != nil {
		return err
	}
	// One that nobody reads would keep us after a signal. Not all nodes can do it.
	stop := context.AfterFunc(ctx, func() { _ = f.SetWriteDeadline(time.Unix(1, 0)) })
	defer stop()
	err = write(f)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if ctx.Err() != nil && errors.Is(err, os.ErrDeadlineExceeded) {
		return context.Cause(ctx)
	}
	return err
}

// openNode opens a node for writing. A FIFO waits for its reader as long as ctx does.
func openNode(ctx context.Context, path string) (*os.File, error) {
	for {
		f, err := os.OpenFile(path, os.O_WRONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
		if !errors.Is(err, unix.ENXIO) {
			return f, err
		}
		if info, serr := os.Stat(path); serr != nil || info.Mode()&fs.ModeNamedPipe == 0 {
			return nil, fmt.Errorf("%w: nothing can be written there", err)
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

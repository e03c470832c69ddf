package capture

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/fault"
)

// FileLayer is the path of a file that holds a Layer.
type FileLayer string

// WriteLayer copies the file.
func (l FileLayer) WriteLayer(ctx context.Context, w io.Writer) error {
	f, err := os.Open(string(l))
	if err != nil {
		return fmt.Errorf("read the writable layer: %w", err)
	}
	defer f.Close()
	if _, err := io.Copy(w, NewReader(ctx, f)); err != nil {
		return fmt.Errorf("copy the writable layer: %w", err)
	}
	return nil
}

// NewReader returns a reader of r that ends with ctx, whose cause is then its error.
func NewReader(ctx context.Context, r io.Reader) io.Reader { return &reader{ctx, r} }

type reader struct {
	ctx context.Context
	r   io.Reader
}

func (r *reader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, context.Cause(r.ctx)
	}
	return r.r.Read(p)
}

// OpenPlain opens a regular file of a checkpoint for reading. Its last part is not
// followed if it is a link, and nothing waits for a FIFO's other end: both are
// errors that match errdefs.ErrInvalidArgument, as is everything else.
func OpenPlain(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ELOOP) {
		return nil, fault.Invalid("%q: a symbolic link; a checkpoint has only regular files", filepath.Base(path))
	}
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fault.Invalid("%q: not a regular file", filepath.Base(path))
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// Sync returns when a file, or the names in a folder, are on the disk.
func Sync(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// ReadPart reads the first n bytes of a regular file, or the last.
func ReadPart(path string, n int64, last bool) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, errors.New("not a regular file")
	}
	var from int64
	if last {
		from = max(info.Size()-n, 0)
	}
	return io.ReadAll(io.NewSectionReader(f, from, n))
}

package capture

import (
	"context"
	"fmt"
	"io"
	"os"
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
	if _, err := io.Copy(w, &reader{ctx, f}); err != nil {
		return fmt.Errorf("copy the writable layer: %w", err)
	}
	return nil
}

// reader ends with a context.
type reader struct {
	ctx context.Context
	io.Reader
}

func (r *reader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, context.Cause(r.ctx)
	}
	return r.Reader.Read(p)
}

package node

import (
	"context"
	"io"
	"os"
)

// openInput opens a file to read a checkpoint from. One that can make us wait, such as
// a FIFO, does so only as long as ctx.
func openInput(ctx context.Context, path string) (io.ReadCloser, error) {
	info, err := os.Stat(path)
	if err != nil || info.Mode().IsRegular() {
		return os.Open(path)
	}
	type opened struct {
		f   *os.File
		err error
	}
	result := make(chan opened, 1)
	go func() {
		f, err := os.Open(path)
		result <- opened{f, err}
	}()
	select {
	case r := <-result:
		if r.err != nil {
			return nil, r.err
		}
		return interruptible(ctx, r.f), nil
	case <-ctx.Done():
		return nil, context.Cause(ctx) // and the other waits until we end
	}
}

// interruptible returns a reader of r that ends with ctx, also while it waits for r.
func interruptible(ctx context.Context, r io.ReadCloser) io.ReadCloser {
	pr, pw := io.Pipe()
	go func() {
		_, err := io.CopyBuffer(pw, r, make([]byte, 256<<10))
		r.Close()
		pw.CloseWithError(err)
	}()
	stop := context.AfterFunc(ctx, func() { pw.CloseWithError(context.Cause(ctx)) })
	return &interrupted{pr, stop}
}

type interrupted struct {
	*io.PipeReader
	stop func() bool
}

func (i *interrupted) Close() error {
	i.stop()
	return i.PipeReader.Close()
}

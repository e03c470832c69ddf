package process

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"time"

	"golang.org/x/sys/unix"
)

// loggerTermTimeout is how long a logging binary has to write what is left
// after SIGTERM, as in upstream's shim.
const loggerTermTimeout = 12 * time.Second

// logger is a logging binary (binary://, containerd's pkg "core/runtime/v2/logging"):
// a process that gets the container's stdout and stderr as descriptors 3 and 4,
// and reports on descriptor 5 that it is ready. It is a runc.IO.
type logger struct {
	child    *Child
	cmd      *exec.Cmd
	out, err pipe
}

type pipe struct{ r, w *os.File }

func newPipe() (pipe, error) {
	r, w, err := os.Pipe()
	return pipe{r, w}, err
}

func (p pipe) Close() {
	if p.r != nil {
		p.r.Close()
		p.w.Close()
	}
}

// startLogger starts the binary a URI names and waits until it is ready: it
// closes descriptor 5, and with strict (binary-v2) writes a byte first.
func startLogger(ctx context.Context, uri *url.URL, strict bool, cfg IOConfig) (_ *logger, err error) {
	l := &logger{}
	ready, err := newPipe()
	if err != nil {
		return nil, err
	}
	defer ready.Close()
	defer func() {
		if err != nil {
			err = fmt.Errorf("logging binary %s: %w", uri.Path, err)
			l.Close()
		}
	}()
	if l.out, err = newPipe(); err != nil {
		return nil, err
	}
	if l.err, err = newPipe(); err != nil {
		return nil, err
	}
	var args []string
	for key, values := range uri.Query() {
		args = append(args, key)
		if len(values) > 0 {
			args = append(args, values[0])
		}
	}
	l.cmd = exec.Command(uri.Path, args...)
	l.cmd.Env = []string{"CONTAINER_ID=" + cfg.ID, "CONTAINER_NAMESPACE=" + cfg.Namespace}
	l.cmd.ExtraFiles = []*os.File{l.out.r, l.err.r, ready.w}
	if l.child, err = cfg.Reaper.Command(l.cmd); err != nil {
		return nil, err
	}
	ready.w.Close()
	// The binary has descriptors of its own. The writing ends stay with the
	// shim, so that it sees the end of the output only at Close.
	l.out.r.Close()
	l.err.r.Close()
	stop := context.AfterFunc(ctx, func() { ready.r.SetReadDeadline(time.Now()) })
	defer stop()
	n, err := ready.r.Read(make([]byte, 1))
	switch {
	case err != nil && !errors.Is(err, io.EOF):
		return nil, fmt.Errorf("did not become ready: %w", err)
	case strict && n == 0:
		return nil, errors.New("did not call ready (it may have crashed or exited)")
	}
	return l, nil
}

// logger returns the logging binary of a process with a terminal, nil if it has
// none.
func (p *IO) logger() *logger {
	for _, c := range p.closers {
		if l, ok := c.(*logger); ok {
			return l
		}
	}
	return nil
}

func (l *logger) Stdin() io.WriteCloser { return nil }
func (l *logger) Stdout() io.ReadCloser { return nil }
func (l *logger) Stderr() io.ReadCloser { return nil }

// Set implements runc.IO.
func (l *logger) Set(cmd *exec.Cmd) {
	cmd.Stdout, cmd.Stderr = l.out.w, l.err.w
}

// Close ends the binary, giving it time to write what is left.
func (l *logger) Close() error {
	l.out.Close()
	l.err.Close()
	if l.child == nil {
		return nil
	}
	_ = l.child.Signal(unix.SIGTERM)
	select {
	case <-l.child.Done():
	case <-time.After(loggerTermTimeout):
		_ = l.child.Signal(unix.SIGKILL)
		<-l.child.Done()
	}
	_ = l.cmd.Wait()
	return nil
}

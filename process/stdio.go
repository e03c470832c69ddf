package process

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/console"
	"github.com/containerd/fifo"
	runc "github.com/containerd/go-runc"
	"golang.org/x/sys/unix"
)

// Stdio is what a client asked a process's standard streams to be: paths of
// FIFOs or files, or a URI (fifo://, file://, binary://, binary-v2://); an
// empty one is not connected.
type Stdio struct {
	Stdin, Stdout, Stderr string
	Terminal              bool
}

// drainTimeout bounds the wait for the last output of a process that is gone:
// another one may have inherited its pipes and hold them open for ever.
const drainTimeout = 10 * time.Second

// attachTimeout bounds the wait for the client to open the other end of the
// output, as in upstream's shim.
const attachTimeout = 30 * time.Second

// IO connects one process to its Stdio. It is opened before the runtime starts
// the process, attached after, and closed once.
type IO struct {
	stdio  Stdio
	pipes  runc.IO      // what the runtime gives the process; nil with a terminal
	socket *runc.Socket // where the runtime sends the terminal; nil without

	copies sync.WaitGroup // the copiers of output; stdin's ends by itself

	mu      sync.Mutex
	console console.Console // set by Attach, nil without a terminal
	in      *os.File        // the stdin FIFO, read by a copier
	stdin   io.Closer       // holds the stdin FIFO open until CloseStdin
	closers []io.Closer     // closed by Close, last first
	closed  bool
}

// IOConfig is what OpenIO needs to know of the process.
type IOConfig struct {
	ID, Namespace string // for the environment of a logging binary
	UID, GID      int    // owner of the pipes
	Reaper        *Reaper
	// Pipes are streams (stdin, stdout, stderr) that get a pipe, which leads
	// nowhere, even if they are not asked for. A restored process gets what
	// the runtime has in place of a pipe that it had, and would have a file of
	// the host's open in /dev/null, with which CRIU cannot dump it again.
	Pipes [3]bool
}

// OpenIO makes what the runtime has to be given: pipes, a logging binary's
// pipes, or a socket for the terminal.
func OpenIO(ctx context.Context, stdio Stdio, cfg IOConfig) (_ *IO, err error) {
	p := &IO{stdio: stdio}
	defer func() {
		if err != nil {
			p.Close()
		}
	}()
	if stdio.Terminal {
		if p.socket, err = runc.NewTempConsoleSocket(); err != nil {
			return nil, fmt.Errorf("make the console socket: %w", err)
		}
	}
	scheme, uri, err := outputScheme(stdio.Stdout)
	if err != nil {
		return nil, err
	}
	switch {
	case scheme == "binary" || scheme == "binary-v2":
		logger, err := startLogger(ctx, uri, scheme == "binary-v2", cfg)
		if err != nil {
			return nil, err
		}
		p.closers = append(p.closers, logger)
		if stdio.Terminal {
			p.stdio.Stdout = "" // the logger, see Attach
		} else {
			p.pipes = logger
		}
		return p, nil
	case scheme == "file":
		if err := makeLogFile(uri.Path); err != nil {
			return nil, err
		}
		p.stdio.Stdout, p.stdio.Stderr = uri.Path, uri.Path
	case scheme == "fifo" && uri != nil:
		p.stdio.Stdout = uri.Path
	}
	if stdio.Terminal {
		return p, nil
	}
	if stdio.Stdin == "" && stdio.Stdout == "" && stdio.Stderr == "" && cfg.Pipes == [3]bool{} {
		p.pipes, err = runc.NewNullIO()
	} else {
		p.pipes, err = runc.NewPipeIO(cfg.UID, cfg.GID, func(o *runc.IOOption) {
			o.OpenStdin = cfg.Pipes[0] || stdio.Stdin != ""
			o.OpenStdout = cfg.Pipes[1] || p.stdio.Stdout != ""
			o.OpenStderr = cfg.Pipes[2] || p.stdio.Stderr != ""
		})
	}
	if err != nil {
		return nil, fmt.Errorf("make the process's pipes: %w", err)
	}
	p.closers = append(p.closers, p.pipes)
	return p, nil
}

// outputScheme tells how stdout is named; a plain path is a FIFO (or file) and
// has no URI.
func outputScheme(stdout string) (string, *url.URL, error) {
	uri, err := url.Parse(stdout)
	if err != nil {
		return "", nil, fmt.Errorf("stdout %q is not a URI: %w", stdout, err)
	}
	switch uri.Scheme {
	case "":
		return "fifo", nil, nil
	case "fifo", "file", "binary", "binary-v2":
		return uri.Scheme, uri, nil
	}
	return "", nil, fmt.Errorf("stdout %q: unknown scheme %q", stdout, uri.Scheme)
}

func makeLogFile(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	return f.Close()
}

// Pipes is what the runtime is to use as the process's streams; nil with a
// terminal.
func (p *IO) Pipes() runc.IO { return p.pipes }

// ConsoleSocket is where the runtime is to send the terminal; nil without.
func (p *IO) ConsoleSocket() runc.ConsoleSocket {
	if p.socket == nil {
		return nil // not a nil *Socket in an interface
	}
	return p.socket
}

// Attach starts the copying between the process and its Stdio. The runtime has
// started the process and, with a terminal, sent it.
func (p *IO) Attach(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, attachTimeout)
	defer cancel()
	if p.stdio.Stdin != "" {
		if err := p.attachStdin(); err != nil {
			return err
		}
	}
	if p.socket != nil {
		return p.attachConsole(ctx)
	}
	if in := p.pipes.Stdin(); in != nil && p.stdio.Stdin == "" {
		in.Close()
	}
	outputs := map[string]*output{} // stdout and stderr may be one file
	for _, stream := range []struct {
		path string
		from io.ReadCloser
	}{{p.stdio.Stdout, p.pipes.Stdout()}, {p.stdio.Stderr, p.pipes.Stderr()}} {
		if stream.from == nil {
			continue
		}
		if stream.path == "" {
			p.copies.Go(func() { copyBuffer(discard{}, stream.from) })
			continue
		}
		out := outputs[stream.path]
		if out == nil {
			var err error
			if out, err = openOutput(ctx, stream.path); err != nil {
				return err
			}
			outputs[stream.path] = out
			p.closers = append(p.closers, out)
			// Until both streams have their copier: the first one's may be
			// at its end already.
			defer out.hold().release()
		}
		p.copyOutput(out, stream.from)
	}
	return nil
}

// attachStdin opens the stdin FIFO for reading, and for writing as well: until
// CloseStdin, a client that goes away (a detach, a restart) is no end of file.
func (p *IO) attachStdin() error {
	in, err := os.OpenFile(p.stdio.Stdin, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("open stdin: %w", err)
	}
	hold, err := os.OpenFile(p.stdio.Stdin, os.O_WRONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		in.Close()
		return fmt.Errorf("open stdin: %w", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.in, p.stdin = in, hold
	p.closers = append(p.closers, hold, in)
	if p.pipes != nil && p.pipes.Stdin() != nil {
		go func() {
			copyBuffer(p.pipes.Stdin(), in)
			p.pipes.Stdin().Close()
			in.Close()
		}()
	}
	return nil
}

// output is the client's end of stdout or stderr, shared by both if they are
// one file; the last who holds it closes it.
type output struct {
	*os.File
	users int
	mu    sync.Mutex
}

// openOutput waits for a FIFO's reader: all that a short-lived process writes
// before the client has opened its end would be lost when ours is closed.
func openOutput(ctx context.Context, path string) (*output, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("open output: %w", err)
	}
	flags := os.O_WRONLY | os.O_APPEND
	if st.Mode()&os.ModeNamedPipe != 0 {
		writer, err := fifo.OpenFifo(ctx, path, unix.O_WRONLY, 0)
		if err != nil {
			return nil, fmt.Errorf("wait for a reader of output %s: %w", path, err)
		}
		defer writer.Close()
		// Open for both, a FIFO does not break when the reader goes away
		// (containerd restarts, a client detaches).
		flags = os.O_RDWR
	}
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		return nil, fmt.Errorf("open output: %w", err)
	}
	return &output{File: f}, nil
}

func (o *output) hold() *output {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.users++
	return o
}

func (o *output) release() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.users--; o.users == 0 {
		o.Close()
	}
}

func (p *IO) copyOutput(to *output, from io.Reader) {
	to.hold()
	p.copies.Go(func() {
		defer to.release()
		copyBuffer(to, from)
	})
}

// CloseStdin lets the process see the end of its input once the client has
// closed its side too.
func (p *IO) CloseStdin() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stdin == nil {
		return nil
	}
	err := p.stdin.Close()
	p.stdin = nil
	return err
}

// Drain waits until the output of a process that has exited has been passed on.
func (p *IO) Drain(ctx context.Context) error {
	drained := make(chan struct{})
	go func() {
		p.copies.Wait()
		close(drained)
	}()
	timeout := time.NewTimer(drainTimeout)
	defer timeout.Stop()
	select {
	case <-drained:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-timeout.C:
		return errors.New("its output is still held open by another process")
	}
}

// Close releases everything. Output that was not drained is lost.
func (p *IO) Close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return
	}
	p.closed = true
	if p.socket != nil {
		p.socket.Close()
	}
	p.hangup()
	if p.console != nil {
		p.console.Close()
	}
	for i := len(p.closers) - 1; i >= 0; i-- {
		p.closers[i].Close()
	}
}

var buffers = sync.Pool{New: func() any { b := make([]byte, 16<<10); return &b }}

// copyBuffer is io.Copy with a pooled buffer, which it has only while there is
// something to copy: most streams are silent most of the time.
func copyBuffer(to io.Writer, from io.Reader) {
	read := readerOf(from)
	for {
		b, n, err := read()
		if n > 0 {
			if _, werr := to.Write((*b)[:n]); werr != nil {
				err = werr
			}
		}
		if b != nil {
			buffers.Put(b)
		}
		if err != nil {
			return
		}
	}
}

// readerOf returns a function that reads into one of buffers. If it can, it
// takes that only when there is something to read.
func readerOf(from io.Reader) func() (b *[]byte, n int, err error) {
	var conn syscall.RawConn
	if file, ok := from.(syscall.Conn); ok {
		conn, _ = file.SyscallConn()
	}
	if conn == nil {
		return func() (*[]byte, int, error) {
			b := buffers.Get().(*[]byte)
			n, err := from.Read(*b)
			return b, n, err
		}
	}
	return func() (b *[]byte, n int, err error) {
		waited := conn.Read(func(fd uintptr) (done bool) {
			b = buffers.Get().(*[]byte)
			for {
				n, err = unix.Read(int(fd), *b)
				if err != unix.EINTR {
					break
				}
			}
			if err == unix.EAGAIN {
				buffers.Put(b)
				b = nil
				return false
			}
			return true
		})
		switch {
		case waited != nil: // closed
			return b, 0, waited
		case err != nil:
			return b, 0, err
		case n == 0:
			return b, 0, io.EOF
		}
		return b, n, nil
	}
}

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/stasis-run/stasis/node"
)

// output is our stdout. It keeps the first error, so that no command can take what it
// could not say for said: run looks at it in the end. After an error it writes no
// more.
type output struct {
	w io.Writer
	// cancel is called with the first error: the command need not go on.
	cancel func(error)
	// broken is closed then.
	broken chan struct{}

	mu  sync.Mutex
	err error
}

func newOutput(w io.Writer, cancel func(error)) *output {
	return &output{w: w, cancel: cancel, broken: make(chan struct{})}
}

// Write implements io.Writer.
func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.err != nil {
		return 0, o.err
	}
	n, err := o.w.Write(p)
	if err != nil {
		o.err = &outputError{err}
		close(o.broken)
		o.cancel(o.err)
		return n, o.err
	}
	return n, nil
}

// failed returns the first error.
func (o *output) failed() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.err
}

// outputError is an error of writing to stdout.
type outputError struct{ err error }

func (e *outputError) Error() string { return fmt.Sprintf("write to stdout: %v", e.err) }
func (e *outputError) Unwrap() error { return e.err }

// hungUp tells that whoever read our output has ended, as head does.
func hungUp(err error) bool {
	var o *outputError
	return errors.As(err, &o) && errors.Is(err, unix.EPIPE)
}

// isStdout tells whether a path that a user gave means our stdout.
func isStdout(path string) bool {
	switch path {
	case "-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1":
		return true
	}
	return false
}

// outputTo is where a command writes the file that a user named. A terminal is refused.
func (a *app) outputTo(path string) node.Output {
	o := node.Output{Path: path}
	if isStdout(path) {
		o.Writer = a.out
		if f, ok := a.out.w.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
			o.Writer = noTerminal{}
		}
	}
	return o
}

// noTerminal is a terminal that is not written to.
type noTerminal struct{}

func (noTerminal) Write([]byte) (int, error) {
	return 0, errors.New("this would write an archive to the terminal: redirect it, or name a file")
}

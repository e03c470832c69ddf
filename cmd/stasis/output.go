package main

import (
	"errors"
	"fmt"
	"io"
	"sync"

	"golang.org/x/sys/unix"
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

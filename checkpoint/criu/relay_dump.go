package criu

import (
	"context"
	"sync"
	"time"

	"github.com/containerd/log"
)

// dumpRelay is the relay of one dump. Before CRIU looks at the container it says pre-dump
// and waits for an answer: that is when the container is frozen. Until then the runtime
// and CRIU have started, and CRIU has found out what the kernel can do, which takes it
// more time than many a dump where /run is no tmpfs. Left to CRIU, freezing would take a
// tenth of a second, as that is how often it looks whether all stand still.
//
// When CRIU has answered the request, it has left the processes. They run on then: the
// runtime need not have ended.
type dumpRelay struct {
	r   *DumpRequest
	ctx context.Context
	// written is called when CRIU has left the processes, before they run on.
	written func()

	mu     sync.Mutex
	window window
	failed error         // why it could not be frozen
	cancel func()        // of While
	while  chan error    // of While, which has begun; nil: it has not
	thaw   chan struct{} // closed when the container runs on, or is not to yet; nil: CRIU is at work
}

// window is for how long a container stood still.
type window struct {
	begun time.Time // it was told to freeze; zero: that is not known
	ended time.Time // it was told to run on; zero: it does not yet
}

func (d *dumpRelay) heard(m criuMessage, _ int) error {
	switch {
	case m.script == "pre-dump":
		return d.freeze()
	case m.script == "" && m.kind == messageDump && m.success:
		d.dumped()
	}
	return nil
}

func (d *dumpRelay) ended(int) {}

// freeze freezes the container, and begins with what has to see it stand still.
func (d *dumpRelay) freeze() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.window.begun.IsZero() {
		d.window.begun = time.Now()
		d.failed = d.r.freeze(d.ctx)
	}
	if d.failed == nil && d.while == nil && d.r.While != nil {
		ctx, cancel := context.WithCancel(d.ctx)
		done := make(chan error, 1)
		go func() { done <- d.r.While(ctx) }()
		d.while, d.cancel = done, cancel
	}
	return d.failed
}

// dumped lets the container run on: at once, or when what goes on beside CRIU has ended.
func (d *dumpRelay) dumped() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.written()
	if d.r.Exit || d.window.begun.IsZero() || d.thaw != nil {
		return
	}
	d.thaw = make(chan struct{})
	thaw := func() {
		d.r.thaw(d.ctx)
		d.window.ended = time.Now()
		close(d.thaw)
	}
	if d.while == nil {
		thaw()
		return
	}
	go func(while chan error) {
		err := <-while
		while <- err // for end
		d.mu.Lock()
		defer d.mu.Unlock()
		if err == nil {
			thaw()
		} else {
			close(d.thaw)
		}
	}(d.while)
}

// end waits for what goes on beside CRIU, when the runtime has returned err. It returns the
// dump's error.
func (d *dumpRelay) end(err error) (window, error) {
	d.mu.Lock()
	while, thaw, failed := d.while, d.thaw, d.failed
	d.mu.Unlock()
	if err != nil && d.cancel != nil {
		d.cancel()
	}
	if while != nil {
		werr := <-while
		while <- werr
		d.cancel()
		if err == nil && werr != nil {
			err = &ownError{werr}
		}
	}
	if thaw != nil {
		<-thaw
	}
	switch {
	case failed != nil:
		err = &ownError{freezeError(failed)}
	case err == nil && d.window.begun.IsZero():
		// This CRIU is not the one that the runtime has called.
		if d.r.While != nil {
			err = &ownError{errNotTold}
		} else {
			log.G(d.ctx).WithField("container", d.r.Container.ID).Warn(errNotTold.Error())
		}
	}
	return d.window, err
}

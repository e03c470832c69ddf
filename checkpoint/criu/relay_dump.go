package criu

import (
	"context"
	"sync"
	"sync/atomic"
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
	at  moments
	// freezing ends with the CRIU that waits for it.
	freezing context.Context
	stop     context.CancelFunc
	criu     atomic.Int64 // that one's pid

	mu     sync.Mutex
	window window
	failed error         // why it could not be frozen, or what else fails then
	gaveUp bool          // freezing ended with CRIU or the request; the runtime's error says why
	cancel func()        // of While
	while  chan error    // of While, which has begun; nil: it has not
	thaw   chan struct{} // closed when the container runs on, or is not to yet; nil: CRIU is at work
}

// window is for how long a container stood still.
type window struct {
	begun time.Time // it was told to freeze; zero: that is not known
	ended time.Time // it was told to run on; zero: it does not yet
}

func newDumpRelay(ctx context.Context, r *DumpRequest, at moments) *dumpRelay {
	d := &dumpRelay{r: r, ctx: ctx, at: at}
	d.freezing, d.stop = context.WithCancel(ctx)
	return d
}

func (d *dumpRelay) heard(m criuMessage, criu int) error {
	switch {
	case m.script == "pre-dump":
		d.criu.Store(int64(criu))
		return d.freeze()
	case m.script == "" && m.kind == messageDump && m.success:
		d.dumped()
	}
	return nil
}

// ended gives up to freeze for a CRIU that does not wait any more. A runtime also starts
// one to ask for its version.
func (d *dumpRelay) ended(criu int) {
	if d.criu.Load() == int64(criu) {
		d.stop()
	}
}

// freeze freezes the container, and begins with what has to see it stand still.
func (d *dumpRelay) freeze() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.window.begun.IsZero() {
		d.window.begun = time.Now()
		if d.failed = d.r.freeze(d.freezing); d.failed != nil {
			d.failed, d.gaveUp = freezeError(d.failed), d.freezing.Err() != nil
		} else {
			d.failed = d.at.begun()
		}
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
	d.at.written()
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
	d.stop()
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
	case failed != nil && !d.gaveUp:
		err = &ownError{failed}
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

package rest

import (
	"context"
	"sync"

	"github.com/stasis-run/stasis/node"
)

// events passes what happens to containers on to whoever listens.
type events struct {
	over      chan struct{} // closed when no more will come
	mu        sync.Mutex
	closed    bool
	listeners map[chan node.Event]struct{}
}

// maxBehind is how many events a listener may be behind before it is given up.
const maxBehind = 1024

func newEvents() *events {
	return &events{over: make(chan struct{}), listeners: map[chan node.Event]struct{}{}}
}

// listen returns what happens from now on. It is closed when the listener is too slow, or
// no more will come.
func (e *events) listen() (_ <-chan node.Event, stop func()) {
	c := make(chan node.Event, maxBehind)
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		close(c)
		return c, func() {}
	}
	e.listeners[c] = struct{}{}
	return c, func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		delete(e.listeners, c)
	}
}

func (e *events) tell(event node.Event) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for c := range e.listeners {
		select {
		case c <- event:
		default:
			close(c)
			delete(e.listeners, c)
		}
	}
}

func (e *events) close() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.closed {
		close(e.over)
	}
	e.closed = true
	for c := range e.listeners {
		close(c)
		delete(e.listeners, c)
	}
}

// untilClosed is ctx until close is called.
func (e *events) untilClosed(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		defer cancel()
		select {
		case <-e.over:
		case <-ctx.Done():
		}
	}()
	return ctx, cancel
}

package processtest

import (
	"context"
	"testing"
)

// Point is where a test holds the code that it tests: the code calls Stop, which does
// not return until the test calls Release. It stops one caller; later ones pass.
type Point struct {
	t       testing.TB
	reached chan struct{}
	release chan error
	once    chan struct{}
}

// NewPoint returns a point that nobody has reached.
func NewPoint(t testing.TB) *Point {
	p := &Point{t: t, reached: make(chan struct{}), release: make(chan error, 1), once: make(chan struct{}, 1)}
	p.once <- struct{}{}
	return p
}

// Stop holds its first caller until Release, and returns what that was given. It ends
// early with ctx, as a command does that is killed, and with the test.
func (p *Point) Stop(ctx context.Context) error {
	select {
	case <-p.once:
	default:
		return nil
	}
	close(p.reached)
	select {
	case err := <-p.release:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-p.t.Context().Done():
		return p.t.Context().Err()
	}
}

// Wait returns when a caller is held.
func (p *Point) Wait() {
	p.t.Helper()
	select {
	case <-p.reached:
	case <-p.t.Context().Done():
		p.t.Fatal("the point was not reached")
	}
}

// Release lets the caller go on, or fail. It may be called before it is there.
func (p *Point) Release(err error) { p.release <- err }

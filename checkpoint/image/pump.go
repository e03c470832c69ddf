package image

import (
	"io"
	"sync/atomic"
)

// Chunks of a pump: large enough that a message for each costs little, and few
// enough to stay in the CPU's cache.
const (
	chunkSize = 1 << 20
	chunks    = 3
)

// pump is a writer that hands what it is given to another goroutine, so that
// bytes are made and used up at the same time, on two CPUs.
type pump struct {
	full, free chan []byte
	buf        []byte // being filled; its capacity is chunkSize
	done       chan struct{}
	failed     atomic.Pointer[error]
}

// newPump starts the goroutine that writes to w, with chunks of chunkSize. Close
// ends it.
func newPump(w io.Writer) *pump {
	p := &pump{
		full: make(chan []byte, chunks),
		free: make(chan []byte, chunks+1), // and buf
		buf:  make([]byte, 0, chunkSize),
		done: make(chan struct{}),
	}
	for range chunks {
		p.free <- make([]byte, 0, chunkSize)
	}
	go func() {
		defer close(p.done)
		for chunk := range p.full {
			if p.failed.Load() == nil {
				if _, err := w.Write(chunk); err != nil {
					p.failed.Store(&err)
				}
			}
			p.free <- chunk[:0]
		}
	}()
	return p
}

func (p *pump) Write(data []byte) (n int, err error) {
	for len(data) > 0 {
		if err := p.failed.Load(); err != nil {
			return n, *err
		}
		part := data[:min(len(data), chunkSize-len(p.buf))]
		p.buf = append(p.buf, part...)
		data = data[len(part):]
		n += len(part)
		if len(p.buf) == chunkSize {
			p.full <- p.buf
			p.buf = <-p.free
		}
	}
	return n, nil
}

// Close waits until all is written. It must be called once.
func (p *pump) Close() error {
	if len(p.buf) > 0 {
		p.full <- p.buf
	}
	close(p.full)
	<-p.done
	if err := p.failed.Load(); err != nil {
		return *err
	}
	return nil
}

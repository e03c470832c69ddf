package oci

import (
	"errors"
	"io"
	"sync"
	"sync/atomic"
)

// Chunks of a pump: large enough that a disk that is waited for, and a message for
// each, cost little.
const (
	chunkSize = 4 << 20
	chunks    = 6
)

// pump is a writer that hands what it is given to several others, each in a
// goroutine of its own, so that bytes are made and used up at the same time.
type pump struct {
	outs   []chan *chunk
	free   chan *chunk
	buf    *chunk // being filled
	done   sync.WaitGroup
	failed atomic.Pointer[error]
}

type chunk struct {
	data  []byte // its capacity is chunkSize
	users atomic.Int32
}

// newPump starts the goroutines, which write chunks of chunkSize. Close ends them.
func newPump(writers ...io.Writer) *pump {
	p := &pump{free: make(chan *chunk, chunks)}
	for range chunks {
		p.free <- &chunk{data: make([]byte, 0, chunkSize)}
	}
	p.buf = <-p.free
	for _, w := range writers {
		out := make(chan *chunk, chunks)
		p.outs = append(p.outs, out)
		p.done.Go(func() {
			for c := range out {
				if p.failed.Load() == nil {
					if _, err := w.Write(c.data); err != nil {
						p.failed.Store(&err)
					}
				}
				if c.users.Add(-1) == 0 {
					c.data = c.data[:0]
					p.free <- c
				}
			}
		})
	}
	return p
}

func (p *pump) Write(data []byte) (n int, err error) {
	for len(data) > 0 {
		part := data[:min(len(data), chunkSize-len(p.buf.data))]
		p.buf.data = append(p.buf.data, part...)
		data = data[len(part):]
		n += len(part)
		if err := p.pass(chunkSize); err != nil {
			return n, err
		}
	}
	return n, nil
}

// ReadFrom reads until r ends, into the chunks themselves.
func (p *pump) ReadFrom(r io.Reader) (n int64, err error) {
	for {
		have := len(p.buf.data)
		read, err := r.Read(p.buf.data[have:chunkSize])
		p.buf.data = p.buf.data[:have+read]
		n += int64(read)
		if perr := p.pass(chunkSize); perr != nil {
			return n, perr
		}
		if errors.Is(err, io.EOF) {
			return n, nil
		}
		if err != nil {
			return n, err
		}
	}
}

// pass hands over what is there if it is at least so much.
func (p *pump) pass(least int) error {
	if len(p.buf.data) < least {
		return nil
	}
	p.buf.users.Store(int32(len(p.outs)))
	for _, out := range p.outs {
		out <- p.buf
	}
	p.buf = <-p.free
	if err := p.failed.Load(); err != nil {
		return *err
	}
	return nil
}

// Close waits until all is written. It must be called once.
func (p *pump) Close() error {
	_ = p.pass(1)
	for _, out := range p.outs {
		close(out)
	}
	p.done.Wait()
	if err := p.failed.Load(); err != nil {
		return *err
	}
	return nil
}

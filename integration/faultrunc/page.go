package main

import (
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A page is how faultrunc asks for lines of CRIU's log; criulog.c has the other
// side of it.
type page struct{ lines *[pageLines]line }

const pageLines = 8

type line struct {
	state  atomic.Int32
	writer atomic.Int32 // pid in the writer's namespace
	length int32
	text   [500]byte
}

// The states of a line.
const (
	unused  = iota
	asked   // the test waits for the line
	reached // CRIU has written it, and waits
	passed  // CRIU goes on
)

// newPage makes a page as a new file: CRIU of an earlier call may still use its own.
func newPage(path string) (*page, error) {
	if err := os.RemoveAll(path); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size := unsafe.Sizeof([pageLines]line{})
	if err := f.Truncate(int64(size)); err != nil {
		return nil, err
	}
	data, err := unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	return &page{(*[pageLines]line)(unsafe.Pointer(&data[0]))}, nil
}

// ask asks for the next line that contains text.
func (p *page) ask(text string) *line {
	for i := range p.lines {
		if l := &p.lines[i]; l.state.Load() == unused {
			l.length = int32(copy(l.text[:], text))
			l.state.Store(asked)
			return l
		}
	}
	panic("faultrunc: too many lines")
}

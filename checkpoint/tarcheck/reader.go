package tarcheck

import (
	"errors"
	"io"

	"github.com/stasis-run/stasis/checkpoint/fault"
)

// MaxPadding is what may follow the end of a tar, in bytes. Programs fill up a block
// of theirs with zeros.
const MaxPadding = 1 << 20

// Entry is one entry of a tar, without its content.
type Entry struct {
	Name string
	Type byte  // as in archive/tar
	Size int64 // of the content, holes counted, in bytes
}

// Reader passes a tar through, up to the first header that is refused.
type Reader struct {
	r    io.Reader
	scan scanner
	err  error
}

// NewReader returns a reader of the tar r, which is not compressed. entry, if not
// nil, is called for each entry before its header is passed on; its error ends the
// reading.
func NewReader(r io.Reader, entry func(Entry) error) *Reader {
	return &Reader{r: r, scan: scanner{entry: entry}}
}

// Read returns no byte of a block that is refused.
func (r *Reader) Read(p []byte) (int, error) {
	if r.err != nil {
		return 0, r.err
	}
	n, err := r.r.Read(p)
	if serr := r.scan.write(p[:n]); serr != nil {
		r.err = serr
		return 0, serr
	}
	if errors.Is(err, io.EOF) {
		if serr := r.scan.end(); serr != nil {
			r.err = serr
			return n, serr
		}
	}
	return n, err
}

// Finish reads what is left behind the last entry: only zeros may be there, and
// not more than MaxPadding. Call it when archive/tar has returned io.EOF.
func (r *Reader) Finish() error {
	n, err := io.CopyN(io.Discard, r, MaxPadding+1)
	switch {
	case errors.Is(err, io.EOF):
		return nil
	case err != nil:
		return err
	}
	return fault.Invalid("the tar goes on after its end (%d bytes and more)", n)
}

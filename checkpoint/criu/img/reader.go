package img

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/checkpoint-restore/go-criu/v8/magic"
	"google.golang.org/protobuf/proto"

	"github.com/stasis-run/stasis/checkpoint/fault"
)

// magics are CRIU's names of kinds of images and their numbers.
var magics = sync.OnceValue(magic.LoadMagic)

// MaxMessage is in bytes, of one message that is decoded. The largest real ones list
// all descriptors of an epoll instance, at some 30 bytes each. Decoding can take many
// times as much memory.
const MaxMessage = 4 << 20

// mixedImages are the kinds whose messages have other bytes between them.
var mixedImages = map[string]bool{
	"GHOST_FILE": true, "PIPES_DATA": true, "FIFO_DATA": true, "SK_QUEUES": true, "TCP_STREAM": true,
	"BPFMAP_DATA": true, "IPCNS_SHM": true, "IPCNS_MSG": true, "IPCNS_SEM": true,
}

// Reader reads an image message by message. An image is a common magic number
// (which inventory.img lacks), the magic number of its kind, then for each
// message its length and the message itself; numbers are 32 bits, little
// endian (CRIU's image.c, protobuf.c).
//
// go-criu's own decoder is not used for this: it allocates whatever length it
// reads, and fails on values that CRIU has learnt since.
type Reader struct {
	kind string
	in   *bufio.Reader
	left int64 // bytes of the image not yet read
	buf  []byte
}

var errNoMagic = fault.Invalid("truncated, or no image of CRIU's")

// NewReader reads the head of an image of size bytes.
func NewReader(in io.Reader, size int64) (*Reader, error) {
	r := &Reader{in: bufio.NewReaderSize(in, 64<<10), left: size}
	number, err := r.number()
	if err != nil {
		return nil, errNoMagic
	}
	names := magics()
	if common := uint64(number); common == names.ByName["IMG_COMMON"] || common == names.ByName["IMG_SERVICE"] {
		if number, err = r.number(); err != nil {
			return nil, errNoMagic
		}
	}
	r.kind = names.ByValue[uint64(number)]
	return r, nil
}

// Kind is CRIU's name of what the image holds, such as "PSTREE", or "" if it is none
// that is known.
func (r *Reader) Kind() string { return r.kind }

func (r *Reader) number() (uint32, error) {
	var b [4]byte
	if _, err := io.ReadFull(r.in, b[:]); err != nil {
		return 0, err
	}
	r.left -= 4
	return binary.LittleEndian.Uint32(b[:]), nil
}

// length reads the length of the next message; io.EOF after the last.
func (r *Reader) length() (int, error) {
	if r.left <= 0 {
		return 0, io.EOF
	}
	n, err := r.number()
	if err != nil || int64(n) > r.left {
		return 0, fault.Invalid("truncated: a message of %d bytes where %d are left", n, max(r.left, 0))
	}
	return int(n), nil
}

// Next returns the next message, which is valid until the next call, or io.EOF.
func (r *Reader) Next() ([]byte, error) {
	n, err := r.length()
	if err != nil {
		return nil, err
	}
	if n > MaxMessage {
		return nil, fault.Invalid("a message of %d bytes, at most %d are allowed", n, MaxMessage)
	}
	if n > cap(r.buf) {
		r.buf = make([]byte, n)
	}
	msg := r.buf[:n]
	if _, err := io.ReadFull(r.in, msg); err != nil {
		return nil, fmt.Errorf("read a message of %d bytes: %w", n, err)
	}
	r.left -= int64(n)
	return msg, nil
}

// Skip passes over the next message.
func (r *Reader) Skip() error {
	n, err := r.length()
	if err != nil {
		return err
	}
	if _, err := r.in.Discard(n); err != nil {
		return fmt.Errorf("read a message of %d bytes: %w", n, err)
	}
	r.left -= int64(n)
	return nil
}

// Each calls fn with each message of an image of size bytes, which has to
// be of the given kind, such as "PSTREE". A message is valid until fn returns. An
// error of fn ends it and is returned.
func Each(r io.Reader, size int64, kind string, fn func(msg []byte) error) error {
	in, err := NewReader(r, size)
	if err != nil {
		return err
	}
	if in.kind != kind {
		return fault.Invalid("no image of kind %s", kind)
	}
	for {
		msg, err := in.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if err := fn(msg); err != nil {
			return err
		}
	}
}

// Rewrite calls edit with each message of an image that is made of nothing
// else; what edit puts is there in its place.
func Rewrite(path string, edit func(msg []byte, put func([]byte)) error) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("%s: %w", filepath.Base(path), err)
		}
	}()
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	in, err := NewReader(bytes.NewReader(data), int64(len(data)))
	if err != nil {
		return err
	}
	out := slices.Clone(data[:int64(len(data))-in.left]) // what comes before the messages
	for {
		msg, err := in.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err == nil {
			err = edit(msg, func(msg []byte) {
				out = binary.LittleEndian.AppendUint32(out, uint32(len(msg)))
				out = append(out, msg...)
			})
		}
		if err != nil {
			return err
		}
	}
	if bytes.Equal(out, data) {
		return nil
	}
	// Never half of it: this may be all there is of the container.
	tmp := path + ".new"
	if err = os.WriteFile(tmp, out, 0o600); err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		_ = os.Remove(tmp)
	}
	return err
}

// Decode decodes a message leniently: a value that go-criu does not know is
// unset, also where CRIU's definition requires one.
func Decode(msg []byte, into proto.Message) error {
	if err := (proto.UnmarshalOptions{AllowPartial: true}).Unmarshal(msg, into); err != nil {
		return fault.Invalid("malformed: %v", err)
	}
	return nil
}

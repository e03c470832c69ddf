package img

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"google.golang.org/protobuf/proto"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/fault"
)

// EachIn calls fn with each message of the image dir/name, which has to be of the given
// kind. The first error ends it, io.EOF without one; an image that is not there is an
// error of fs.ErrNotExist.
func EachIn(dir, name, kind string, fn func(msg []byte) error) error {
	f, err := capture.OpenPlain(filepath.Join(dir, name))
	if err != nil {
		return err
	}
	defer f.Close()
	in, err := readerOf(f)
	if err == nil && in.kind != kind {
		err = fault.Invalid("is no image of kind %s", kind)
	}
	for err == nil {
		var msg []byte
		if msg, err = in.Next(); err == nil {
			err = fn(msg)
		}
	}
	if errors.Is(err, io.EOF) {
		return nil
	}
	return fmt.Errorf("%s: %w", name, err)
}

func readerOf(f *os.File) (*Reader, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return NewReader(f, info.Size())
}

// head is how long the magic numbers of an image are, in bytes.
const head = 8

// WithMessage is an image that has the head of another, and one message.
func WithMessage(image []byte, m proto.Message) ([]byte, error) {
	if len(image) < head {
		return nil, errNoMagic
	}
	msg, err := proto.Marshal(m)
	if err != nil {
		return nil, err
	}
	out := append([]byte{}, image[:head]...)
	out = binary.LittleEndian.AppendUint32(out, uint32(len(msg)))
	return append(out, msg...), nil
}

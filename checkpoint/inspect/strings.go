package inspect

import (
	"bytes"
	"errors"
	"io"
)

// stringsAt is a range of memory that holds strings, each with a NUL at its
// end: arguments, or the environment. Nil is an empty one.
type stringsAt struct {
	start uint64
	data  []byte
	have  bool // some of it was found
}

// newStrings is for the range from start to end, of which no more than
// maxStrings bytes are kept.
func newStrings(start, end uint64) *stringsAt {
	if end <= start {
		return nil
	}
	return &stringsAt{start: start, data: make([]byte, min(end-start, maxStrings))}
}

// within tells whether some of it lies between two addresses.
func (s *stringsAt) within(start, end uint64) bool {
	return s != nil && start < s.start+uint64(len(s.data)) && s.start < end
}

// read takes what of it lies between two addresses from an image of pages,
// where the first of the two is at an offset. An image that is too short has
// lost it, which is not for us to judge.
func (s *stringsAt) read(pages io.ReaderAt, start, end uint64, at int64) error {
	if !s.within(start, end) {
		return nil
	}
	from, to := max(start, s.start), min(end, s.start+uint64(len(s.data)))
	_, err := pages.ReadAt(s.data[from-s.start:to-s.start], at+int64(from-start))
	if err == nil {
		s.have = true
	} else if errors.Is(err, io.EOF) {
		err = nil
	}
	return err
}

func (s *stringsAt) split() (list []string) {
	if s == nil || !s.have {
		return nil
	}
	for _, b := range bytes.Split(bytes.TrimRight(s.data, "\x00"), []byte{0}) {
		list = append(list, text(string(b)))
	}
	return list
}

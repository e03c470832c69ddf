package tarcheck

import (
	"archive/tar"
	"bytes"
	"io"
	"math"
	"strings"

	"github.com/stasis-run/stasis/checkpoint/fault"
)

const (
	blockSize = 512
	// maxSpecial bounds a PAX header and a long name, in bytes; archive/tar reads
	// no larger ones.
	maxSpecial = 1 << 20
	// maxHoles bounds the parts of a sparse file.
	maxHoles = 1 << 20
)

// scanner follows the structure of a tar that is written to it.
type scanner struct {
	entry func(Entry) error

	fill int // bytes of block
	// block is the header, or the extension of a sparse file's, that is under way.
	block [blockSize]byte

	skip    int64  // bytes of content and padding still to come
	special byte   // 'L', 'K', 'x' or 'g', whose data is under way, or 0
	want    int64  // size of that data
	pad     int64  // bytes of padding after it
	data    []byte // what has come of it

	name, link *string           // of L and K, for the next entry
	pax        map[string]string // of x, for the next entry
	sparse     *sparseMap        // of a header whose extensions are under way
	zeros      bool              // a block of zeros has come: nothing else may follow
}

// write takes the next bytes. After an error it must not be called again.
func (s *scanner) write(p []byte) error {
	for len(p) > 0 {
		switch {
		case s.zeros:
			for _, b := range p {
				if b != 0 {
					return fault.Invalid("the tar has data after its end")
				}
			}
			return nil
		case s.special != 0 && int64(len(s.data)) < s.want:
			n := min(int64(len(p)), s.want-int64(len(s.data)))
			s.data = append(s.data, p[:n]...)
			p = p[n:]
			if int64(len(s.data)) == s.want {
				if err := s.specialData(); err != nil {
					return err
				}
			}
		case s.skip > 0:
			n := min(int64(len(p)), s.skip)
			s.skip -= n
			p = p[n:]
		default:
			n := copy(s.block[s.fill:], p)
			s.fill += n
			p = p[n:]
			if s.fill == blockSize {
				s.fill = 0
				if err := s.header(); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// end is called at the end of the input.
func (s *scanner) end() error {
	switch {
	case s.zeros:
		return nil
	case s.fill != 0 || s.skip > 0 || s.special != 0 || s.sparse != nil:
		return io.ErrUnexpectedEOF // as archive/tar has it
	case s.name != nil || s.link != nil || s.pax != nil:
		return fault.Invalid("the tar ends after a header that belongs to another entry")
	}
	return nil
}

// header takes s.block.
func (s *scanner) header() error {
	if s.sparse != nil {
		return s.extension()
	}
	if s.block == [blockSize]byte{} {
		s.zeros = true
		if s.name != nil || s.link != nil || s.pax != nil {
			return fault.Invalid("the tar ends after a header that belongs to another entry")
		}
		return nil
	}
	h, err := parseHeader(&s.block)
	if err != nil {
		return err
	}
	switch h.flag {
	case tar.TypeGNULongName, tar.TypeGNULongLink, tar.TypeXHeader, tar.TypeXGlobalHeader:
		return s.beginSpecial(h)
	}
	return s.file(h)
}

func (s *scanner) beginSpecial(h header) error {
	what := "a long name of GNU's (" + string(h.flag) + ")"
	if h.flag == tar.TypeXHeader || h.flag == tar.TypeXGlobalHeader {
		what = "a PAX header"
		if h.format != formatPOSIX {
			return fault.Invalid("entry %q: %s in a header that is not POSIX's", h.name, what)
		}
		if s.name != nil || s.link != nil || s.pax != nil {
			return fault.Invalid("entry %q: %s after another header for the same entry: programs differ in which one counts", h.name, what)
		}
	} else {
		if h.format != formatGNU {
			return fault.Invalid("entry %q: %s in a header that is not GNU's", h.name, what)
		}
		if s.pax != nil || h.flag == tar.TypeGNULongName && s.name != nil || h.flag == tar.TypeGNULongLink && s.link != nil {
			return fault.Invalid("entry %q: %s after another header for the same entry: programs differ in which one counts", h.name, what)
		}
	}
	if h.size < 1 || h.size > maxSpecial {
		return fault.Invalid("entry %q: %s of %d bytes", h.name, what, h.size)
	}
	s.special, s.want, s.pad, s.data = h.flag, h.size, padding(h.size), nil
	return nil
}

// specialData takes s.data, which is whole.
func (s *scanner) specialData() error {
	flag, data := s.special, s.data
	s.special, s.data, s.skip = 0, nil, s.pad
	switch flag {
	case tar.TypeGNULongName, tar.TypeGNULongLink:
		name, ok := bytes.CutSuffix(data, []byte{0})
		if !ok || len(name) == 0 || bytes.IndexByte(name, 0) >= 0 {
			return fault.Invalid("a long name of GNU's that has no end, or a zero byte in it: %q", short(string(data)))
		}
		text := string(name)
		if flag == tar.TypeGNULongName {
			s.name = &text
		} else {
			s.link = &text
		}
		return nil
	}
	records, err := parsePAX(data)
	if err != nil {
		return err
	}
	if flag == tar.TypeXGlobalHeader {
		// archive/tar hands these on, GNU tar applies them to all that follows.
		for key := range records {
			if key != "comment" {
				return fault.Invalid("a global PAX header with %q, which some programs apply and others do not", short(key))
			}
		}
		return nil
	}
	s.pax = records
	return nil
}

// file takes the header of an entry.
func (s *scanner) file(h header) error {
	name, link, pax := h.name, h.link, s.pax
	if s.name != nil || s.link != nil {
		if h.format != formatGNU {
			return fault.Invalid("entry %q: a long name of GNU's before a header that is not GNU's", short(h.name))
		}
		if s.name != nil {
			name = *s.name
		}
		if s.link != nil {
			link = *s.link
		}
	}
	size := h.size
	if pax != nil {
		if h.format != formatPOSIX {
			return fault.Invalid("entry %q: a PAX header before a header that is not POSIX's", short(h.name))
		}
		if path, ok := pax[paxPath]; ok {
			name = path
		}
		if path, ok := pax[paxLinkpath]; ok {
			link = path
		}
		if text, ok := pax[paxSize]; ok {
			n, err := decimal(text)
			// A size that does not fit the header is 0 there.
			if err != nil || n != h.size && (h.size != 0 || n <= maxOctalSize) {
				return fault.Invalid("entry %q: its size is %d in its header and %s in its PAX header", short(name), h.size, short(text))
			}
			size = n
		}
	}
	s.name, s.link, s.pax = nil, nil, nil
	refused := func(format string, args ...any) error {
		return fault.Invalid("entry %q: "+format, append([]any{short(name)}, args...)...)
	}
	if name == "" {
		return fault.Invalid("an entry without a name")
	}
	if h.flag != tar.TypeDir && strings.HasSuffix(name, "/") {
		return refused("of type %q with the name of a folder, which some programs take for one", h.flag)
	}
	e := Entry{Name: name, Type: h.flag, Size: size}
	switch h.flag {
	case tar.TypeReg, 0:
		e.Type = tar.TypeReg
	case tar.TypeGNUSparse:
		if h.format != formatGNU {
			return refused("a sparse file in a header that is not GNU's")
		}
		m := &sparseMap{entry: e, stored: size}
		more, err := m.first(&s.block)
		if err != nil {
			return refused("%v", err)
		}
		if more {
			s.sparse = m
			return nil
		}
		return s.sparseEnd(m)
	case tar.TypeLink, tar.TypeSymlink:
		if link == "" {
			return refused("a link to nothing")
		}
		fallthrough
	case tar.TypeDir, tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		if size != 0 {
			return refused("of type %q with a content of %d bytes, which some programs pass over and others do not", h.flag, size)
		}
	default:
		return refused("of an unknown kind (%q)", h.flag)
	}
	return s.content(e, size)
}

// content begins what follows an entry's headers.
func (s *scanner) content(e Entry, stored int64) error {
	if stored > math.MaxInt64-blockSize {
		return fault.Invalid("entry %q: no such size can be: %d", short(e.Name), stored)
	}
	s.skip = stored + padding(stored)
	if s.entry != nil {
		return s.entry(e)
	}
	return nil
}

// extension takes s.block, which continues the map of a sparse file.
func (s *scanner) extension() error {
	m := s.sparse
	more, err := m.next(&s.block)
	if err != nil {
		return fault.Invalid("entry %q: %v", short(m.entry.Name), err)
	}
	if more {
		return nil
	}
	s.sparse = nil
	return s.sparseEnd(m)
}

func (s *scanner) sparseEnd(m *sparseMap) error {
	if m.sum != m.stored {
		return fault.Invalid("entry %q: a sparse file that has %d bytes in its parts, and %d in the tar", short(m.entry.Name), m.sum, m.stored)
	}
	m.entry.Size = m.size
	return s.content(m.entry, m.stored)
}

// padding is what fills up the last block of n bytes.
func padding(n int64) int64 { return -n & (blockSize - 1) }

// short bounds what of a tar is in an error.
func short(s string) string {
	if len(s) > 200 {
		return s[:200] + "…"
	}
	return s
}

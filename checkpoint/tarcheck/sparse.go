package tarcheck

import "errors"

// sparseMap is that of a sparse file in GNU's old form: which parts of it are in the
// tar. In the header are four of them, in each block that continues it 21.
type sparseMap struct {
	entry  Entry
	stored int64 // what the header says is in the tar, in bytes
	size   int64 // of the file, holes counted
	sum    int64 // of all parts
	end    int64 // of the last part
	parts  int
}

var errSparse = errors.New("a sparse file whose parts cannot be read without doubt")

const partSize = 24 // offset and length, 12 bytes each

// first reads the header; more says that another block continues it.
func (m *sparseMap) first(b *[blockSize]byte) (more bool, err error) {
	// Before and after the fields of sparse files.
	if !zero(b[369:386]) || !zero(b[495:]) {
		return false, errSparse
	}
	size, blank, err := number(b[483:495], false)
	if err != nil || blank {
		return false, errSparse
	}
	m.size = size
	return m.read(b[386:482], b[482])
}

func (m *sparseMap) next(b *[blockSize]byte) (more bool, err error) {
	if !zero(b[505:]) {
		return false, errSparse
	}
	return m.read(b[:504], b[504])
}

func (m *sparseMap) read(parts []byte, extended byte) (more bool, err error) {
	full := true
	for ; len(parts) > 0; parts = parts[partSize:] {
		if zero(parts[:partSize]) {
			full = false
			if !zero(parts) {
				return false, errSparse
			}
			break
		}
		offset, blank, err := number(parts[:12], false)
		length, none, nerr := number(parts[12:partSize], false)
		if err != nil || nerr != nil || blank || none || parts[0] == 0 || parts[12] == 0 {
			return false, errSparse
		}
		if m.parts++; m.parts > maxHoles {
			return false, errSparse
		}
		if offset < m.end || offset > m.size || length > m.size-offset {
			return false, errSparse
		}
		m.end = offset + length
		m.sum += length
	}
	switch {
	case extended == 0:
		return false, nil
	case extended == 1 && full:
		return true, nil
	}
	return false, errSparse
}

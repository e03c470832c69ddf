package capture

import (
	"bytes"
	"fmt"
	"io"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/fault"
)

// ErrTooLarge is matched by the error of a checkpoint that is larger than may be
// unpacked. It matches errdefs.ErrInvalidArgument.
var ErrTooLarge = fault.Invalid("larger than may be unpacked")

// TooLarge returns an ErrTooLarge. what is the file that does not fit any more.
func TooLarge(what string, limit int64) error {
	return fault.New(ErrTooLarge, "%s: larger than is allowed: a checkpoint may have %d bytes unpacked", what, limit)
}

// Limit returns how many bytes a checkpoint may have that is unpacked into the folder
// dir: asked, or if that is 0, half of what is free there. What is compressed can say
// nothing of its size that could be believed, and must not fill the disk.
func Limit(dir string, asked int64) (int64, error) {
	if asked != 0 {
		return asked, nil
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, fmt.Errorf("statfs %s: %w", dir, err)
	}
	return int64(st.Bavail) * st.Bsize / 2, nil
}

// maxNodes bounds the objects and lists in a file of JSON. A decoded one takes a
// hundred times the memory of its text.
const maxNodes = 1 << 16

// CheckJSON refuses JSON that would take far more memory than its text does.
func CheckJSON(data []byte) error { return CheckNodes(data, maxNodes) }

// CheckNodes is CheckJSON for a file that may have so many objects and lists.
func CheckNodes(data []byte, most int) error {
	n := 0
	for _, token := range []string{"{", "[", "null"} { // of null too, a decoder makes an element
		n += bytes.Count(data, []byte(token))
	}
	if n > most {
		return fault.Invalid("JSON with %d objects and lists; at most %d are read", n, most)
	}
	return nil
}

// ReadSmall reads a file of a checkpoint that has no more than limit bytes.
func ReadSmall(path string, limit int64) ([]byte, error) {
	f, err := OpenPlain(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(data)) > limit {
		return nil, fault.Invalid("%s: larger than %d bytes", filepath.Base(path), limit)
	}
	return data, err
}

package archive

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/tarcheck"
)

// Limits on what is read; a zero takes the default.
type Limits struct {
	// Files is how many entries an archive may have. The default is 65,536 of
	// CRIU's images, which is also what package checkpoint takes, and some more.
	Files int
	// Metadata is the largest size of each of the files of JSON, in bytes. The
	// default is 16 MiB.
	Metadata int64
	// Total is what all that is written may take, in bytes. The default is half of
	// what is free in the file system. More gives an error that matches
	// capture.ErrTooLarge.
	Total int64
}

func (l Limits) withDefaults() Limits {
	if l.Files == 0 {
		l.Files = 1<<16 + 256
	}
	if l.Metadata == 0 {
		l.Metadata = 16 << 20
	}
	return l
}

// entries are the plain files of an archive, in its order.
type entries struct {
	tar   *tar.Reader
	scan  *tarcheck.Reader // below tar
	body  io.ReadCloser
	bytes counter // read of body
	left  int     // entries that may still come
	seen  map[string]bool
}

// blockSize is what tars are made of, in bytes.
const blockSize = 512

// openEntries begins to read an archive, compressed or not.
func openEntries(ctx context.Context, r io.Reader, limits Limits) (*entries, error) {
	body, err := Decompress(capture.NewReader(ctx, r))
	if err != nil {
		return nil, truncated("the beginning", err)
	}
	e := &entries{body: body, left: limits.Files, seen: map[string]bool{}}
	e.scan = tarcheck.NewReader(io.TeeReader(body, &e.bytes), nil)
	e.tar = tar.NewReader(e.scan)
	return e, nil
}

// errEnough ends the reading of an archive, without an error.
var errEnough = errors.New("the rest of the archive is not needed")

// eachFile calls fn with each file of an archive, until it returns errEnough.
func eachFile(ctx context.Context, r io.Reader, limits Limits, fn func(*entries, *tar.Header) error) error {
	in, err := openEntries(ctx, r, limits)
	if err != nil {
		return err
	}
	defer in.close()
	for {
		hdr, err := in.next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err == nil {
			err = fn(in, hdr)
		}
		if errors.Is(err, errEnough) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (e *entries) close() { e.body.Close() }

// next returns the next file; io.EOF after the last.
func (e *entries) next() (*tar.Header, error) {
	for {
		if _, err := io.Copy(io.Discard, e.tar); err != nil {
			return nil, truncated("the last file", err)
		}
		end := e.bytes
		hdr, err := e.tar.Next()
		switch {
		case errors.Is(err, io.EOF):
			// A tar ends with a block of zeros; to the Go library the end of
			// the input will do. Less than a block is what fills up the last
			// file.
			if e.bytes-end < blockSize {
				return nil, fault.Invalid("truncated: it has no end")
			}
			if err := e.scan.Finish(); err != nil {
				return nil, truncated("its end", err)
			}
			return nil, io.EOF
		case errors.Is(err, tar.ErrHeader), errors.Is(err, io.ErrUnexpectedEOF):
			return nil, fault.Invalid("truncated, or no tar: %v", err)
		case err != nil:
			return nil, err
		}
		if e.left--; e.left < 0 {
			return nil, fault.Invalid("too many files")
		}
		if hdr.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		name, err := cleanName(hdr.Name)
		if err != nil {
			return nil, err
		}
		switch hdr.Typeflag {
		case tar.TypeDir:
			continue
		case tar.TypeReg:
		default:
			return nil, fault.Invalid("%q: a %s; an archive of a checkpoint has only plain files and folders", name, kind(hdr.Typeflag))
		}
		// A hole of any size costs an archive nothing.
		for key := range hdr.PAXRecords {
			if strings.HasPrefix(key, "GNU.sparse.") {
				return nil, fault.Invalid("%q: a sparse file", name)
			}
		}
		if e.seen[name] {
			return nil, fault.Invalid("%q: there twice", name)
		}
		e.seen[name] = true
		hdr.Name = name
		return hdr, nil
	}
}

func kind(typeflag byte) string {
	switch typeflag {
	case tar.TypeLink:
		return "hard link"
	case tar.TypeSymlink:
		return "symbolic link"
	case tar.TypeChar, tar.TypeBlock:
		return "device"
	case tar.TypeFifo:
		return "FIFO"
	case tar.TypeGNUSparse:
		return "sparse file"
	}
	return "thing of unknown type " + string(rune(typeflag))
}

// cleanName takes the leading ./ from a name. One with .. in it is refused even
// if it stays inside: no honest program writes it.
func cleanName(name string) (string, error) {
	if path.IsAbs(name) || slices.Contains(strings.Split(name, "/"), "..") {
		return "", fault.Invalid("%q: leads out of the archive", name)
	}
	if !utf8.ValidString(name) || strings.ContainsFunc(name, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return "", fault.Invalid("%q: not a name of a checkpoint's files", name)
	}
	return path.Clean(name), nil
}

// read reads the file that next returned last, at most limit bytes.
func (e *entries) read(hdr *tar.Header, limit int64) ([]byte, error) {
	if hdr.Size > limit {
		return nil, fault.Invalid("%s: %d bytes, at most %d are read", hdr.Name, hdr.Size, limit)
	}
	data, err := io.ReadAll(e.tar)
	if err != nil {
		return nil, truncated(hdr.Name, err)
	}
	if err := capture.CheckJSON(data); err != nil {
		return nil, fmt.Errorf("%s: %w", hdr.Name, err)
	}
	return data, nil
}

// missing says that there is no such file.
func missing(name string) error {
	return fault.Invalid("no archive of a checkpoint: there is no %s", name)
}

// truncated says which file an archive ends in.
func truncated(name string, err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return fault.Invalid("%s: the archive ends in the middle of it", name)
	}
	return err
}

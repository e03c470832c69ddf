package oci

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/layout"
)

// tree writes a tar of root's own files and folders: 0600, 0700, all of the same
// time. After an error it does nothing; close returns that.
type tree struct {
	w    io.Writer
	time time.Time
	err  error
}

func newTree(w io.Writer, at time.Time) *tree {
	if at.IsZero() {
		at = time.Unix(0, 0)
	}
	return &tree{w: w, time: at.UTC().Truncate(time.Second)}
}

func (t *tree) folder(name string) {
	t.header(&tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: 0o700, ModTime: t.time})
}

func (t *tree) file(name string, data []byte) {
	t.content(name, int64(len(data)), bytes.NewReader(data))
}

// images writes files of the folder dir, their names after prefix.
func (t *tree) images(ctx context.Context, prefix, dir string, files []imageFile) {
	for _, file := range files {
		t.copy(ctx, prefix+file.name, filepath.Join(dir, file.name))
	}
}

// copy writes the file at path under a name.
func (t *tree) copy(ctx context.Context, name, path string) {
	if t.err == nil {
		t.err = t.copyFile(ctx, name, path)
	}
}

func (t *tree) copyFile(ctx context.Context, name, path string) error {
	f, err := capture.OpenPlain(path)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	t.content(name, st.Size(), capture.NewReader(ctx, io.LimitReader(f, st.Size())))
	return t.err
}

func (t *tree) header(h *tar.Header) {
	if t.err != nil {
		return
	}
	// A tar.Writer would take the content too, in small pieces, where a pump reads
	// it by itself.
	var head bytes.Buffer
	if t.err = tar.NewWriter(&head).WriteHeader(h); t.err == nil {
		_, t.err = t.w.Write(head.Bytes())
	}
}

// content writes a file of size, which is all that r has.
func (t *tree) content(name string, size int64, r io.Reader) {
	t.header(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o600, ModTime: t.time})
	if t.err != nil {
		return
	}
	n, err := io.Copy(t.w, r)
	switch {
	case err != nil:
		t.err = err
	case n != size:
		t.err = fmt.Errorf("%s: has %d bytes of %d", name, n, size)
	default:
		_, t.err = t.w.Write(make([]byte, -size&(block-1)))
	}
}

// block is what everything in a tar is a multiple of.
const block = 512

func (t *tree) close() error {
	if t.err == nil {
		_, t.err = t.w.Write(make([]byte, 2*block))
	}
	return t.err
}

// copyContext copies with buf until ctx ends. It keeps to buf, whatever faster
// way r or w offers: those of os.File come in small pieces.
func copyContext(ctx context.Context, w io.Writer, r io.Reader, buf []byte) error {
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n, err := r.Read(buf)
		if n > 0 {
			if _, err := w.Write(buf[:n]); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// imageFile is a file of CRIU's.
type imageFile struct {
	name string
	size int64 // in bytes
}

// listImages lists the files of a flat folder by name, and the sum of their
// sizes.
func listImages(dir string) (files []imageFile, total int64, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, 0, err
	}
	for _, e := range entries {
		// As package checkpoint has it: an unfinished checkpoint that was to
		// replace this one, and what ext4 has in its root.
		if e.IsDir() && (e.Name() == layout.Partial || e.Name() == layout.LostFound) {
			continue
		}
		info, err := e.Info()
		if err != nil {
			return nil, 0, err
		}
		if !info.Mode().IsRegular() || !plainName(e.Name()) {
			return nil, 0, fault.Invalid("%s: %q is no plain file; a checkpoint has no others", dir, e.Name())
		}
		files = append(files, imageFile{e.Name(), info.Size()})
		total += info.Size()
	}
	if len(files) > maxFiles {
		return nil, 0, fault.Invalid("%s: more than %d files", dir, maxFiles)
	}
	return files, total, nil
}

package oci

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/checkpoint/tarcheck"
)

// unpacker writes CRIU's images of a tar into a folder, and nothing else
// anywhere.
type unpacker struct {
	dir   string // exists and is empty
	names map[string]bool
	// left is what all files of the tar may still have, in bytes.
	left int64
	buf  []byte
}

func newUnpacker(dir string, limit int64) *unpacker {
	return &unpacker{dir: dir, names: map[string]bool{}, left: limit, buf: make([]byte, chunkSize)}
}

// once refuses a name that was there before. Which of two files counts, readers
// disagree.
func (u *unpacker) once(name string) error {
	if u.names[name] {
		return fault.Invalid("%q: twice", name)
	}
	u.names[name] = true
	return nil
}

// plain refuses an entry that is no plain file, or too much in sum.
func (u *unpacker) plain(h *tar.Header) error {
	if h.Typeflag != tar.TypeReg {
		return fault.Invalid("%q: a %s; a checkpoint has only plain files", h.Name, kind(h.Typeflag))
	}
	if u.left -= h.Size; u.left < 0 {
		return fault.Invalid("%q: larger than the image says its layer is", h.Name)
	}
	return nil
}

func kind(flag byte) string {
	switch flag {
	case tar.TypeDir:
		return "folder"
	case tar.TypeSymlink:
		return "symbolic link"
	case tar.TypeLink:
		return "hard link"
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		return "device or FIFO"
	}
	return fmt.Sprintf("tar entry of type %q", flag)
}

// image writes a file of CRIU's.
func (u *unpacker) image(ctx context.Context, name string, h *tar.Header, r io.Reader) error {
	if !plainName(name) {
		return fault.Invalid("%q: not a name that a checkpoint's file can have", h.Name)
	}
	if len(u.names) >= maxFiles {
		return fault.Invalid("more than %d files", maxFiles)
	}
	return named(name, u.write(ctx, filepath.Join(u.dir, name), h, r))
}

// write writes a plain file to a path where there is none.
func (u *unpacker) write(ctx context.Context, path string, h *tar.Header, r io.Reader) error {
	if err := u.plain(h); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(badTar(copyContext(ctx, f, r, u.buf)), f.Close())
}

// metadata returns the content of a small file.
func (u *unpacker) metadata(h *tar.Header, r io.Reader) ([]byte, error) {
	if err := u.plain(h); err != nil {
		return nil, err
	}
	if h.Size > maxMetadata {
		return nil, fault.Invalid("%q: larger than %d bytes", h.Name, maxMetadata)
	}
	data, err := io.ReadAll(r)
	return data, named(h.Name, badTar(err))
}

// badTar tells what is wrong with a tar from what is wrong with reading it.
func badTar(err error) error {
	for _, cause := range []error{tar.ErrHeader, tar.ErrFieldTooLong, io.ErrUnexpectedEOF} {
		if errors.Is(err, cause) {
			return fault.Invalid("no valid tar: %v", err)
		}
	}
	return err
}

// unpackStasis reads the last layer of a runnable image into a capture, whose
// images go to a folder that exists, and whose /dev/shm goes beside it.
func unpackStasis(ctx context.Context, r io.Reader, c *capture.Capture, limit int64) error {
	u := newUnpacker(c.Images, limit)
	scan := tarcheck.NewReader(r, nil)
	tr := tar.NewReader(scan)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			if err := scan.Finish(); err != nil {
				return badTar(err)
			}
			break
		}
		if err != nil {
			return badTar(err)
		}
		if err := u.once(h.Name); err != nil {
			return err
		}
		name, inside := strings.CutPrefix(h.Name, layout.EmbeddedImages+"/")
		switch {
		case h.Name == layout.Embedded+"/" || h.Name == layout.EmbeddedImages+"/":
			if h.Typeflag != tar.TypeDir {
				err = fault.Invalid("%q: a %s; a folder is expected", h.Name, kind(h.Typeflag))
			}
		case h.Name == layout.EmbeddedInfo:
			var data []byte
			if data, err = u.metadata(h, tr); err == nil {
				c.Info, err = capture.DecodeInfo(data)
				err = named(layout.EmbeddedInfo, err)
			}
		case h.Name == layout.EmbeddedSpec:
			if c.Spec, err = u.metadata(h, tr); err == nil {
				err = named(layout.EmbeddedSpec, checkSpec(c.Spec))
			}
		case h.Name == layout.EmbeddedDevShm:
			c.DevShm = filepath.Join(filepath.Dir(c.Images), filepath.Base(layout.EmbeddedDevShm))
			// It is handed on as it is.
			err = u.write(ctx, c.DevShm, h, tarcheck.NewReader(tr, nil))
		case inside:
			err = u.image(ctx, name, h, tr)
		default:
			err = fault.Invalid("%q: the layer may hold nothing but /%s", h.Name, layout.Embedded)
		}
		if err != nil {
			return err
		}
	}
	for _, name := range []string{layout.EmbeddedInfo, layout.EmbeddedSpec, layout.EmbeddedImages + "/"} {
		if !u.names[name] {
			return fault.Invalid("%s: missing", name)
		}
	}
	return nil
}

// unpackFlat reads the tar of containerd's format: CRIU's images, and no folder.
func unpackFlat(ctx context.Context, r io.Reader, dir string, limit int64) error {
	u := newUnpacker(dir, limit)
	scan := tarcheck.NewReader(r, nil)
	tr := tar.NewReader(scan)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return badTar(scan.Finish())
		}
		if err != nil {
			return badTar(err)
		}
		name := strings.TrimPrefix(h.Name, "./")
		if name == "" && h.Typeflag == tar.TypeDir {
			continue // the folder itself
		}
		if err = u.once(name); err == nil {
			err = u.image(ctx, name, h, tr)
		}
		if err != nil {
			return err
		}
	}
}

// blobReader reads a layer in the store, decompressed. A second goroutine hashes
// the blob meanwhile.
type blobReader struct {
	ctx      context.Context
	desc     ocispec.Descriptor
	ra       content.ReaderAt
	source   *source
	raw      *bufio.Reader
	plain    io.ReadCloser // decompressed
	hash     *pump         // nil when it is closed
	digester digest.Digester
}

// source remembers whether what is wrong came from below.
type source struct {
	io.Reader
	failed bool
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.Reader.Read(p)
	s.failed = err != nil && !errors.Is(err, io.EOF)
	return n, err
}

// Read gives an error that matches errdefs.ErrInvalidArgument if the layer is not
// compressed as it says.
func (b *blobReader) Read(p []byte) (int, error) {
	n, err := b.plain.Read(p)
	if err != nil && !errors.Is(err, io.EOF) && !b.source.failed {
		err = fault.Invalid("%s is damaged: %v", b.desc.Digest, err)
	}
	return n, err
}

func openBlob(ctx context.Context, store content.Provider, desc ocispec.Descriptor) (*blobReader, error) {
	if err := desc.Digest.Validate(); err != nil {
		return nil, fault.Invalid("digest %q: %v", desc.Digest, err)
	}
	ra, err := store.ReaderAt(ctx, desc)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", desc.Digest, err)
	}
	b := &blobReader{ctx: ctx, ra: ra, desc: desc, digester: desc.Digest.Algorithm().Digester()}
	if err := checkSize(ra, desc); err != nil {
		ra.Close()
		return nil, err
	}
	b.hash = newPump(b.digester.Hash())
	b.source = &source{Reader: io.TeeReader(io.NewSectionReader(ra, 0, desc.Size), b.hash)}
	b.raw = bufio.NewReaderSize(b.source, chunkSize)
	if b.plain, err = decompressor(b.raw, desc.MediaType); err != nil {
		b.hash.Close()
		ra.Close()
		if !b.source.failed {
			err = fault.Invalid("%s is damaged: %v", desc.Digest, err)
		}
		return nil, err
	}
	return b, nil
}

// finish compares the digest, after the tar has been read to its end.
func (b *blobReader) finish() error {
	n, err := io.CopyN(io.Discard, b, maxPadding+1)
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("read %s: %w", b.desc.Digest, err)
	}
	if n > maxPadding {
		return fault.Invalid("%s goes on after the end of its tar", b.desc.Digest)
	}
	buf := make([]byte, chunkSize)
	if err := copyContext(b.ctx, io.Discard, b.raw, buf); err != nil {
		return fmt.Errorf("read %s: %w", b.desc.Digest, err)
	}
	if err := b.hash.Close(); err != nil {
		return err
	}
	b.hash = nil
	if got := b.digester.Digest(); got != b.desc.Digest {
		return fault.Invalid("%s is altered: its digest is %s", b.desc.Digest, got)
	}
	return nil
}

// Close ends the reading, finished or not.
func (b *blobReader) Close() error {
	err := b.plain.Close()
	if b.hash != nil {
		b.hash.Close()
	}
	return errors.Join(err, b.ra.Close())
}

// storedLayer is a writable layer in the store. It is read with the context of
// WriteLayer, which therefore has to carry containerd's namespace.
type storedLayer struct {
	store content.Provider
	desc  ocispec.Descriptor
	limit int64 // of the tar, in bytes
}

func (l storedLayer) WriteLayer(ctx context.Context, w io.Writer) error {
	b, err := openBlob(ctx, l.store, l.desc)
	if err != nil {
		return err
	}
	defer b.Close()
	in := &io.LimitedReader{R: tarcheck.NewReader(b, nil), N: l.limit + 1}
	if err := copyContext(ctx, w, in, make([]byte, chunkSize)); err != nil {
		return fmt.Errorf("read the writable layer %s: %w", l.desc.Digest, err)
	}
	if in.N <= 0 {
		return capture.TooLarge("the writable layer "+l.desc.Digest.String(), l.limit)
	}
	return b.finish()
}

// uncompressedSize is what a layer's descriptor says of it, in bytes.
func uncompressedSize(desc ocispec.Descriptor) (int64, error) {
	text := desc.Annotations[AnnotationUncompressed]
	size, err := strconv.ParseInt(text, 10, 64)
	if err != nil || size < 0 {
		return 0, fault.Invalid("layer %s does not tell its size: annotation %s is %q", desc.Digest, AnnotationUncompressed, text)
	}
	return size, nil
}

// checkSpace refuses early what is larger than allowed, or what the file system has no
// room for.
func checkSpace(dir string, size, limit int64) error {
	if size > limit {
		return capture.TooLarge("CRIU's images", limit)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	if free := st.Bavail * uint64(st.Bsize); uint64(size) > free {
		return fault.Unusable("the checkpoint has %d bytes, and only %d are free in %s", size, free, dir)
	}
	return nil
}

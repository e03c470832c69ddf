package archive

import (
	"bufio"
	"errors"
	"io"
	"sync/atomic"

	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"github.com/stasis-run/stasis/checkpoint/fault"
)

// maxWindow is zstd's: what decoding takes of memory, in bytes. It is what the
// zstd program accepts.
const maxWindow = 128 << 20

// compressor returns a writer that compresses to w. It is the fastest level:
// memory is mostly either compressible by anything or by nothing, and the user
// waits.
func compressor(w io.Writer, c compression.Compression) (io.WriteCloser, error) {
	switch c {
	case compression.Uncompressed:
		return nopCloser{w}, nil
	case compression.Gzip:
		return gzip.NewWriterLevel(w, gzip.BestSpeed)
	case compression.Zstd:
		return zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.SpeedFastest))
	}
	return nil, fault.Invalid("unknown compression %d", c)
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

// Decompress returns what r holds, whether compressed or not. What cannot be
// decompressed is an invalid argument; errors of r itself are returned as they
// are, and so is io.ErrUnexpectedEOF.
//
// containerd's compression.DecompressStream is not used: it runs other programs,
// and takes as much memory as a stream asks for.
func Decompress(r io.Reader) (io.ReadCloser, error) {
	d := &decompressed{source: source{Reader: r}}
	buf := bufio.NewReaderSize(&d.source, 64<<10)
	head, err := buf.Peek(10)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch compression.DetectCompression(head) {
	case compression.Gzip:
		d.ReadCloser, err = gzip.NewReader(buf)
	case compression.Zstd:
		var z *zstd.Decoder
		if z, err = zstd.NewReader(buf, zstd.WithDecoderMaxWindow(maxWindow)); err == nil {
			d.ReadCloser = z.IOReadCloser()
		}
	default:
		return io.NopCloser(buf), nil
	}
	if err != nil {
		return nil, d.judge(err)
	}
	return d, nil
}

// decompressed tells errors in compressed data from those of reading it.
type decompressed struct {
	io.ReadCloser
	source source
}

func (d *decompressed) Read(p []byte) (int, error) {
	n, err := d.ReadCloser.Read(p)
	return n, d.judge(err)
}

func (d *decompressed) judge(err error) error {
	if err == nil || d.source.failed.Load() || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return err
	}
	return fault.Invalid("what is compressed is damaged: %v", err)
}

// source knows if reading failed. zstd reads in a goroutine of its own.
type source struct {
	io.Reader
	failed atomic.Bool
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.Reader.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		s.failed.Store(true)
	}
	return n, err
}

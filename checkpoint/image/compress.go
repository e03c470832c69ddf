package image

import (
	"io"
	"slices"
	"sync"

	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/stasis-run/stasis/checkpoint/fault"
)

// layerTypes are the media types of layers that we write and read.
var layerTypes = map[compression.Compression]string{
	compression.Uncompressed: ocispec.MediaTypeImageLayer,
	compression.Gzip:         ocispec.MediaTypeImageLayerGzip,
	compression.Zstd:         ocispec.MediaTypeImageLayerZstd,
}

// compressor returns a writer that compresses to w, or nil for none. It is the
// fastest level: memory is mostly either compressible by anything or by nothing,
// and the user waits.
func compressor(w io.Writer, c compression.Compression) (io.WriteCloser, error) {
	switch c {
	case compression.Uncompressed:
		return nil, nil
	case compression.Gzip:
		return gzip.NewWriterLevel(w, gzip.BestSpeed)
	case compression.Zstd:
		// A blob has a digest: no sum of zstd's own.
		z, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderCRC(false))
		return &frames{w: w, z: z}, err
	}
	return nil, fault.Invalid("unknown compression %d", c)
}

// frameSize is large beside what a frame of its own costs, and several are in a
// chunk of a pump.
const frameSize = 1 << 20

// frames compresses what it is given by zstd, on all CPUs at once: each part of
// frameSize is a frame by itself. (Several in a row are the same as one: RFC 8878,
// section 3.1.) Other parts make other bytes, so whoever wants the same has to
// write the same pieces, as a pump does.
type frames struct {
	w    io.Writer
	z    *zstd.Encoder
	outs [][]byte // of a Write before
}

func (f *frames) Write(p []byte) (n int, err error) {
	parts := slices.Collect(slices.Chunk(p, frameSize))
	for len(f.outs) < len(parts) {
		f.outs = append(f.outs, nil)
	}
	var group sync.WaitGroup
	for i, part := range parts {
		group.Go(func() { f.outs[i] = f.z.EncodeAll(part, f.outs[i][:0]) })
	}
	group.Wait()
	for i, out := range f.outs[:len(parts)] {
		if _, err := f.w.Write(out); err != nil {
			return n, err
		}
		n = min(len(p), (i+1)*frameSize)
	}
	return n, nil
}

func (f *frames) Close() error { return f.z.Close() }

// decompressor returns what was compressed in a layer of the media type.
func decompressor(r io.Reader, mediaType string) (io.ReadCloser, error) {
	switch mediaType {
	case ocispec.MediaTypeImageLayer:
		return io.NopCloser(r), nil
	case ocispec.MediaTypeImageLayerGzip:
		return gzip.NewReader(r)
	case ocispec.MediaTypeImageLayerZstd:
		z, err := zstd.NewReader(r, zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, err
		}
		return z.IOReadCloser(), nil
	}
	return nil, fault.Invalid("a layer of media type %q; known are tar, tar+gzip, tar+zstd", mediaType)
}

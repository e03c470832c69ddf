package image

import (
	"io"

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
		return zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderCRC(false))
	}
	return nil, fault.Invalid("unknown compression %d", c)
}

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

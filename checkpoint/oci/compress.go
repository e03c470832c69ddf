package oci

import (
	"encoding/binary"
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

	sample, packed []byte // of incompressible
}

func (f *frames) Write(p []byte) (n int, err error) {
	parts := slices.Collect(slices.Chunk(p, frameSize))
	for len(f.outs) < len(parts) {
		f.outs = append(f.outs, nil)
	}
	var group sync.WaitGroup
	for i, part := range parts {
		if f.incompressible(part) {
			f.outs[i] = f.outs[i][:0]
			continue
		}
		group.Go(func() { f.outs[i] = f.z.EncodeAll(part, f.outs[i][:0]) })
	}
	group.Wait()
	for i, out := range f.outs[:len(parts)] {
		if len(out) > 0 {
			_, err = f.w.Write(out)
		} else {
			err = f.store(parts[i])
		}
		if err != nil {
			return n, err
		}
		n = min(len(p), (i+1)*frameSize)
	}
	return n, nil
}

// samples is how many of a frame's pages are tried, and samplePage is their size.
const (
	samples    = 16
	samplePage = 4 << 10
)

// incompressible tells whether compression is of no use for a whole frame, by some
// of its pages. What is encrypted, compressed already or random needs not be copied
// by the encoder to find that out.
func (f *frames) incompressible(part []byte) bool {
	if len(part) < frameSize {
		return false
	}
	f.sample = f.sample[:0]
	for i := range samples {
		f.sample = append(f.sample, part[i*len(part)/samples:][:samplePage]...)
	}
	f.packed = f.z.EncodeAll(f.sample, f.packed[:0])
	return len(f.packed) >= len(f.sample)
}

// store writes part as it is, as a frame of raw blocks (RFC 8878, section 3.1.1).
func (f *frames) store(part []byte) error {
	const (
		magic         = 0xFD2FB528
		singleSegment = 0xA0 // and four bytes for the size of the content
		last          = 1
		blockSize     = 128 << 10
	)
	head := binary.LittleEndian.AppendUint32(nil, magic)
	head = binary.LittleEndian.AppendUint32(append(head, singleSegment), uint32(len(part)))
	for len(part) > 0 {
		block := part[:min(len(part), blockSize)]
		part = part[len(block):]
		h := uint32(len(block)) << 3 // between it and last is the type, 0: raw
		if len(part) == 0 {
			h |= last
		}
		head = append(head, byte(h), byte(h>>8), byte(h>>16))
		if _, err := f.w.Write(head); err != nil {
			return err
		}
		if _, err := f.w.Write(block); err != nil {
			return err
		}
		head = head[:0]
	}
	return nil
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

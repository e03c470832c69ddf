package oci

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"testing"

	"github.com/containerd/containerd/v2/pkg/archive/compression"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// TestFrames reads as one what was compressed in several frames.
func TestFrames(t *testing.T) {
	random := make([]byte, frameSize)
	rand.Read(random)
	for i, n := range []int{0, 1, frameSize - 1, frameSize, frameSize + 1, 3*frameSize + 5, 4*frameSize + 5, 3 * frameSize} {
		data := bytes.Repeat([]byte("0123456789abcdef"), n/16+1)[:n]
		if i >= 6 { // what cannot be compressed is between what can, or at the end
			copy(data[min(i-4, 2)*frameSize:], random)
			n -= frameSize
		}
		var packed bytes.Buffer
		z, err := compressor(&packed, compression.Zstd)
		if err != nil {
			t.Fatal(err)
		}
		// The second has less to do than the first, with what that has left.
		for _, part := range [][]byte{data, data[:len(data)/2]} {
			if got, err := z.Write(part); got != len(part) || err != nil {
				t.Errorf("Write of %d: %d, %v", len(part), got, err)
			}
		}
		if err := z.Close(); err != nil {
			t.Error(err)
		}
		if added := packed.Len() - (len(data) - n); n > 1000 && added > n/100 {
			t.Errorf("%d bytes, and %d that cannot be compressed, are %d", n, len(data)-n, packed.Len())
		}
		r, err := decompressor(&packed, ocispec.MediaTypeImageLayerZstd)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(r)
		if want := append(bytes.Clone(data), data[:len(data)/2]...); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%d bytes: %d bytes come back, %v", len(want), len(got), err)
		}
		r.Close()
	}
	z, err := compressor(&fullAfter{1}, compression.Zstd)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := z.Write(make([]byte, 2*frameSize+1)); n != frameSize || !errors.Is(err, errFull) {
		t.Errorf("when all is full: %d, %v", n, err)
	}
}

var errFull = errors.New("full")

// fullAfter is full after so many writes.
type fullAfter struct{ n int }

func (f *fullAfter) Write(p []byte) (int, error) {
	if f.n--; f.n < 0 {
		return 0, errFull
	}
	return len(p), nil
}

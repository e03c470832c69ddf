package sum

import (
	"bytes"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/zeebo/blake3"
)

// TestSum compares what is written in pieces with what is summed chunk by chunk, at
// the sizes where a chunk ends.
func TestSum(t *testing.T) {
	data := make([]byte, 2*ChunkSize+1)
	_, _ = rand.NewChaCha8([32]byte{}).Read(data)
	for _, size := range []int{0, 1, ChunkSize - 1, ChunkSize, ChunkSize + 1, 2 * ChunkSize, 2*ChunkSize + 1} {
		var chunks []byte
		buf := make([]byte, 1000)
		for i := range Chunks(int64(size)) {
			part := data[i*ChunkSize : min(size, (i+1)*ChunkSize)]
			one, n, err := Of(bytes.NewReader(part), buf)
			if err != nil || n != int64(len(part)) {
				t.Fatal(n, err)
			}
			if one != blake3.Sum256(part) {
				t.Errorf("%d bytes: chunk %d is not BLAKE3", size, i)
			}
			chunks = append(chunks, one[:]...)
		}
		w := NewWriter()
		for rest := data[:size]; len(rest) > 0; {
			n := min(len(rest), 1+rand.IntN(3<<20))
			_, _ = w.Write(rest[:n])
			rest = rest[n:]
		}
		want, got := Join(chunks), w.Sum()
		if got.Text != want.Text || !bytes.Equal(got.Chunks, want.Chunks) || w.Sum().Text != got.Text {
			t.Errorf("%d bytes: %s and %s", size, got.Text, want.Text)
		}
		if !got.Valid(int64(size)) {
			t.Errorf("%d bytes: %s is not valid", size, got.Text)
		}
		if large := size > ChunkSize; large != (got.Chunks != nil) || large != strings.HasPrefix(got.Text, chunked) {
			t.Errorf("%d bytes: %s with %d bytes of sums", size, got.Text, len(got.Chunks))
		}
	}
}

func TestValid(t *testing.T) {
	small, large := Join(make([]byte, Size)), Join(make([]byte, 2*Size))
	other := Join(bytes.Repeat([]byte{1}, 2*Size))
	for name, c := range map[string]struct {
		sum  Sum
		size int64
		want bool
	}{
		"small":               {small, ChunkSize, true},
		"large":               {large, ChunkSize + 1, true},
		"none":                {Sum{}, 1, false},
		"of another kind":     {Sum{Text: "sha256:" + strings.Repeat("0", 64)}, 1, false},
		"short":               {Sum{Text: small.Text[:len(small.Text)-2]}, 1, false},
		"no hex":              {Sum{Text: whole + strings.Repeat("x", 64)}, 1, false},
		"upper case":          {Sum{Text: whole + strings.Repeat("A", 64)}, 1, false},
		"small for large":     {small, ChunkSize + 1, false},
		"large for small":     {large, ChunkSize, false},
		"too few chunks":      {large, 2*ChunkSize + 1, false},
		"others' chunks":      {Sum{large.Text, other.Chunks}, ChunkSize + 1, false},
		"no chunks":           {Sum{Text: large.Text}, ChunkSize + 1, false},
		"small with chunks":   {Sum{small.Text, large.Chunks}, 1, false},
		"chunks of one chunk": {Sum{Text: large.Text}, 1, false},
	} {
		if got := c.sum.Valid(c.size); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// Package sum has the sums by which a manifest names the content of files. They
// carry a signature, so nobody can make another file that has the same one:
// BLAKE3. A large file has one for each chunk, so that its chunks can be summed and
// verified side by side, and one by one.
package sum

import (
	"encoding/hex"
	"io"
	"strings"

	"github.com/zeebo/blake3"
)

const (
	// ChunkSize is what a large file is cut into, in bytes.
	ChunkSize = 4 << 20
	// Size is that of one sum, in bytes.
	Size = 32

	whole   = "blake3:"        // of a file that has no more than one chunk
	chunked = "blake3-chunks:" // of the sums of the chunks, one after the other
)

// Sum is that of a file.
type Sum struct {
	// Text is a kind, a colon and hex.
	Text string
	// Chunks are the sums of the chunks; nil if there is no more than one.
	Chunks []byte
}

// Chunks is how many a file of size bytes has.
func Chunks(size int64) int { return max(1, int((size-1)/ChunkSize)+1) }

// Join makes the sum of a file of the sums of its chunks.
func Join(chunks []byte) Sum {
	if len(chunks) <= Size {
		return Sum{Text: whole + hex.EncodeToString(chunks)}
	}
	all := blake3.Sum256(chunks)
	return Sum{chunked + hex.EncodeToString(all[:]), chunks}
}

// Valid tells whether s can be the sum of a file of size bytes: what it says of the
// chunks fits.
func (s Sum) Valid(size int64) bool {
	if n := Chunks(size); n > 1 {
		return len(s.Chunks) == n*Size && Join(s.Chunks).Text == s.Text
	}
	digits, ok := strings.CutPrefix(s.Text, whole)
	sum, err := hex.DecodeString(digits)
	return ok && err == nil && len(sum) == Size && strings.ToLower(digits) == digits && s.Chunks == nil
}

// Of returns the sum of one chunk, which is all that r has, and its length. buf is
// for the copy.
func Of(r io.Reader, buf []byte) (sum [Size]byte, n int64, err error) {
	h := blake3.New()
	n, err = io.CopyBuffer(onlyWriter{h}, onlyReader{r}, buf)
	h.Sum(sum[:0])
	return sum, n, err
}

// So that io.CopyBuffer uses the buffer.
type (
	onlyReader struct{ io.Reader }
	onlyWriter struct{ io.Writer }
)

// Writer sums a file that is written to it.
type Writer struct {
	hash   *blake3.Hasher
	n      int // bytes of the chunk
	chunks []byte
}

// NewWriter returns one to which nothing was written.
func NewWriter() *Writer { return &Writer{hash: blake3.New()} }

// Write never fails.
func (w *Writer) Write(p []byte) (int, error) {
	done := len(p)
	for len(p) > 0 {
		if w.n == ChunkSize {
			w.chunks = w.hash.Sum(w.chunks)
			w.hash.Reset()
			w.n = 0
		}
		part := p[:min(len(p), ChunkSize-w.n)]
		_, _ = w.hash.Write(part)
		w.n += len(part)
		p = p[len(part):]
	}
	return done, nil
}

// Sum returns the sum of all that was written so far.
func (w *Writer) Sum() Sum { return Join(w.hash.Sum(append([]byte(nil), w.chunks...))) }

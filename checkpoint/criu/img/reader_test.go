package img

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/stasis-run/stasis/checkpoint/layout"
)

// Messages lie within the image, whatever their lengths say.
func FuzzMessages(f *testing.F) {
	paths, err := filepath.Glob("../../testdata/*/*.img")
	must(f, err)
	if len(paths) == 0 {
		f.Fatal("no seeds")
	}
	for _, path := range paths {
		if !layout.Pages.Has(filepath.Base(path)) {
			data, err := os.ReadFile(path)
			must(f, err)
			f.Add(data)
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		read := func(step func(*Reader) (int, error)) {
			in, err := NewReader(bytes.NewReader(data), int64(len(data)))
			if err != nil {
				return
			}
			total := 0
			for {
				n, err := step(in)
				total += n
				if total > len(data) {
					t.Fatalf("%d bytes of messages in %d", total, len(data))
				}
				if errors.Is(err, io.EOF) && in.left != 0 {
					t.Fatalf("ends with %d bytes left", in.left)
				}
				if err != nil {
					return
				}
			}
		}
		read(func(r *Reader) (int, error) { msg, err := r.Next(); return len(msg), err })
		read(func(r *Reader) (int, error) { return 0, r.Skip() })
	})
}

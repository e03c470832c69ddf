package image

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/errdefs"

	"github.com/stasis-run/stasis/checkpoint/sum"
)

// TestBegun writes an image whose layer was begun before: it is the same as ever,
// and a layer that does not fit is not taken, and removed.
func TestBegun(t *testing.T) {
	s := newStore(t)
	base := s.baseImage()
	c := newCapture(t)
	const name = "pages-1.img"
	pages, err := os.ReadFile(filepath.Join(c.Images, name))
	if err != nil {
		t.Fatal(err)
	}
	altered := bytes.Clone(pages)
	altered[len(altered)/2]++
	sums := sum.NewWriter()
	_, _ = sums.Write(pages)
	manifest := fmt.Sprintf(`{"files":[{"name":"inventory.img","sum":"sha256:00"},{"name":%q,"sum":%q}]}`, name, sums.Sum().Text)
	if err := os.WriteFile(filepath.Join(c.Images, "stasis.json"), []byte(manifest), 0o600); err != nil {
		t.Fatal(err)
	}
	at := c.Info.Checkpointed
	for _, tc := range []struct {
		about string
		at    time.Time
		name  string
		data  []byte
		fits  bool
	}{
		{"it fits", at, name, pages, true},
		{"another second", at.Add(time.Second), name, pages, false},
		{"another file", at, "pages-2.img", pages, false},
		{"another byte", at, name, altered, false},
		{"less", at, name, pages[:len(pages)-4096], false},
		{"more", at, name, append(altered, 0), false},
	} {
		for of, comp := range compressions {
			t.Run(tc.about+"/"+of, func(t *testing.T) {
				ctx, done := s.leased()
				defer done()
				want, err := WriteRunnable(ctx, s, base, c, Options{Compression: comp})
				if err != nil {
					t.Fatal(err)
				}
				begun, err := Begin(ctx, s, tc.at, tc.name, int64(len(tc.data)), bytes.NewReader(tc.data), Options{Compression: comp, Root: s.dir})
				if err != nil {
					t.Fatal(err)
				}
				taken := false
				begun.Taken = func() { taken = true }
				got, err := WriteRunnable(ctx, s, base, c, Options{Compression: comp, Begun: func() (*Begun, error) { return begun, nil }})
				if err != nil || got.Digest != want.Digest {
					t.Errorf("%v, %v, want %v", got.Digest, err, want.Digest)
				}
				if taken != tc.fits {
					t.Errorf("taken: %v", taken)
				}
				begun.Discard(ctx)
				if found, err := s.ListStatuses(s.ctx); err != nil || len(found) > 0 {
					t.Errorf("unfinished writes are left: %v, %v", found, err)
				}
			})
		}
	}

	ctx, done := s.leased()
	defer done()
	// One of another compression is not taken, nor one twice.
	begun, err := Begin(ctx, s, at, name, int64(len(pages)), bytes.NewReader(pages), Options{Compression: compression.Zstd, Root: s.dir})
	if err != nil {
		t.Fatal(err)
	}
	times := 0
	begun.Taken = func() { times++ }
	for _, comp := range []compression.Compression{compression.Uncompressed, compression.Zstd} {
		if _, err := WriteRunnable(ctx, s, base, c, Options{Compression: comp, Begun: func() (*Begun, error) { return begun, nil }}); err != nil {
			t.Error(err)
		}
	}
	if times != 0 {
		t.Errorf("taken %d times after it was discarded", times)
	}
	// A file that ends early leaves nothing.
	if _, err := Begin(ctx, s, at, name, int64(len(pages)+1), bytes.NewReader(pages), Options{Root: s.dir}); err == nil {
		t.Error("a file that is too short: no error")
	}
	// Nor does one that would go through containerd.
	if _, err := Begin(ctx, s, at, name, int64(len(pages)), bytes.NewReader(pages), Options{}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("without a folder: %v", err)
	}
	if found, err := s.ListStatuses(s.ctx); err != nil || len(found) > 0 {
		t.Errorf("unfinished writes are left: %v, %v", found, err)
	}
}

package oci

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/checkpoint/sum"
)

// TestCheckpointLayer writes an image whose layer was started before: it is the same as
// ever, and what was started and does not fit is not used, and removed.
func TestCheckpointLayer(t *testing.T) {
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
	if err := os.WriteFile(filepath.Join(c.Images, layout.Manifest), []byte(manifest), 0o600); err != nil {
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
				l := NewCheckpointLayer(s, Options{Compression: comp, Folder: s.folder()})
				if err := l.Start(ctx, tc.at, tc.name, int64(len(tc.data)), bytes.NewReader(tc.data)); err != nil {
					t.Fatal(err)
				}
				if got := finishRunnable(ctx, t, s, base, c, l); got.Digest != want.Digest {
					t.Errorf("%v, want %v", got.Digest, want.Digest)
				}
				if l.reused != tc.fits {
					t.Errorf("what was started is used: %v", l.reused)
				}
				l.Discard(ctx)
				if found, err := s.ListStatuses(s.ctx); err != nil || len(found) > 0 {
					t.Errorf("unfinished writes are left: %v, %v", found, err)
				}
			})
		}
	}

	ctx, done := s.leased()
	defer done()
	// The file goes if it may, and only that.
	removed := *c
	removed.Images = t.TempDir()
	if err := os.CopyFS(removed.Images, os.DirFS(c.Images)); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadDir(removed.Images)
	if err != nil {
		t.Fatal(err)
	}
	l := NewCheckpointLayer(s, Options{Folder: s.folder()})
	l.RemoveStarted = true
	if err := l.Start(ctx, at, name, int64(len(pages)), bytes.NewReader(pages)); err != nil {
		t.Fatal(err)
	}
	finishRunnable(ctx, t, s, base, &removed, l)
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, err := os.Lstat(filepath.Join(removed.Images, name)); errors.Is(err, fs.ErrNotExist) {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the file stays")
		}
	}
	if after, err := os.ReadDir(removed.Images); err != nil || len(after) != len(before)-1 {
		t.Errorf("%v, %v, of %v", after, err, before)
	}
	// A file that ends early leaves nothing.
	if err := NewCheckpointLayer(s, Options{Folder: s.folder()}).Start(ctx, at, name, int64(len(pages)+1), bytes.NewReader(pages)); err == nil {
		t.Error("a file that is too short: no error")
	}
	// Nor does one that would go through containerd.
	if err := NewCheckpointLayer(s, Options{}).Start(ctx, at, name, int64(len(pages)), bytes.NewReader(pages)); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("without a folder: %v", err)
	}
	if found, err := s.ListStatuses(s.ctx); err != nil || len(found) > 0 {
		t.Errorf("unfinished writes are left: %v, %v", found, err)
	}
}

// finishRunnable writes a runnable image with a layer that may be started.
func finishRunnable(ctx context.Context, t *testing.T, s *store, base ocispec.Descriptor, c *capture.Capture, l *CheckpointLayer) ocispec.Descriptor {
	t.Helper()
	b, err := ReadBase(ctx, s, base, c.Info)
	if err != nil {
		t.Fatal(err)
	}
	var layers RunnableLayers
	if layers.Writable, err = WriteWritableLayer(ctx, s, c, l.o); err != nil {
		t.Fatal(err)
	}
	if layers.Checkpoint, err = l.Finish(ctx, c); err != nil {
		t.Fatal(err)
	}
	desc, err := WriteRunnableManifest(ctx, s, b, c, layers)
	if err != nil {
		t.Fatal(err)
	}
	return desc
}

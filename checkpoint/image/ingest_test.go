package image

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"
)

// TestIngest uploads through the store's folder and through its API, and by the
// API where the folder is not what it should be.
func TestIngest(t *testing.T) {
	data := bytes.Repeat([]byte("0123456789abcdef"), 70<<16) // more than flushEvery
	other := t.TempDir()
	for name, tc := range map[string]struct {
		root   func(s *store) string
		direct bool
	}{
		"folder":        {func(s *store) string { return s.dir }, true},
		"no folder":     {func(*store) string { return "" }, false},
		"other folder":  {func(*store) string { return other }, false},
		"no such thing": {func(*store) string { return "/nonexistent" }, false},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			ctx, done := s.leased()
			defer done()
			in, err := newIngest(ctx, s, newRef(), tc.root(s))
			if err != nil {
				t.Fatal(err)
			}
			if direct := in.file != nil; direct != tc.direct {
				t.Errorf("through the folder: %v", direct)
			}
			if n, err := in.Write(data); err != nil || n != len(data) {
				t.Fatal(n, err)
			}
			w, err := in.finish(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if err := w.Commit(ctx, int64(len(data)), digest.FromBytes(data)); err != nil {
				t.Fatal(err)
			}
			in.close(ctx, false)
			if _, err := s.Info(ctx, digest.FromBytes(data)); err != nil {
				t.Error(err)
			}
			left, err := s.ListStatuses(ctx)
			if err != nil || len(left) > 0 {
				t.Errorf("uploads left: %v, %v", left, err)
			}
		})
	}
}

// TestIngestFails leaves nothing of an upload that fails, or was meddled with.
func TestIngestFails(t *testing.T) {
	s := newStore(t)
	ctx, done := s.leased()
	defer done()
	in, err := newIngest(ctx, s, newRef(), s.dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := in.Write([]byte("what was sent")); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(in.file.Name(), 4); err != nil {
		t.Fatal(err)
	}
	if _, err := in.finish(ctx); err == nil {
		t.Error("no error, though there is less than was written")
	}
	in.close(ctx, true)
	if left, err := s.ListStatuses(ctx); err != nil || len(left) > 0 {
		t.Errorf("uploads left: %v, %v", left, err)
	}
	if left, _ := filepath.Glob(filepath.Join(s.dir, "ingest", "*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

package oci

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// TestIngest uploads through the store's folder and through its API, and by the
// API where the folder is not what it should be.
func TestIngest(t *testing.T) {
	data := append(bytes.Repeat([]byte("0123456789abcdef"), 2*chunkSize/16), "the end"...)
	other := t.TempDir()
	for name, tc := range map[string]struct {
		root      func(s *store) string
		direct    bool
		unaligned bool // at addresses that no file system takes past its cache
	}{
		"folder":        {root: func(s *store) string { return s.dir }, direct: true},
		"unaligned":     {root: func(s *store) string { return s.dir }, direct: true, unaligned: true},
		"no folder":     {root: func(*store) string { return "" }},
		"other folder":  {root: func(*store) string { return other }},
		"no such thing": {root: func(*store) string { return "/nonexistent" }},
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
			for _, part := range [][]byte{data[:chunkSize], data[chunkSize : 2*chunkSize], data[2*chunkSize:]} {
				if tc.unaligned {
					part = append(make([]byte, 1, len(part)+1), part...)[1:]
				}
				if n, err := in.Write(part); err != nil || n != len(part) {
					t.Fatal(n, err)
				}
			}
			got := digest.FromBytes(data)
			if err := in.commit(ctx, got, map[string]string{"stasis.run/x": "y"}); err != nil {
				t.Fatal(err)
			}
			in.close(ctx)
			info, err := s.Info(ctx, got)
			if err != nil || info.Size != int64(len(data)) || info.Labels["stasis.run/x"] != "y" {
				t.Errorf("in the store: %+v, %v", info, err)
			}
			blob := filepath.Join(s.dir, "blobs", "sha256", got.Encoded())
			if info, err := os.Stat(blob); err != nil || info.Mode() != 0o444 {
				t.Errorf("the blob's file: %v, %v", info, err)
			}
			left, err := s.ListStatuses(ctx)
			if err != nil || len(left) > 0 {
				t.Errorf("uploads left: %v, %v", left, err)
			}
		})
	}
}

// TestIngestPlaced gives a store a blob that it need not read once more, unless its
// namespaces do not share.
func TestIngestPlaced(t *testing.T) {
	for name, tc := range map[string]struct {
		opts   []metadata.DBOpt
		placed bool
	}{
		"shared":   {nil, true},
		"isolated": {[]metadata.DBOpt{metadata.WithPolicyIsolated}, false},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t, tc.opts...)
			ctx, done := s.leased()
			defer done()
			for range 2 { // the second time it is there
				in, err := newIngest(ctx, s, newRef(), s.dir)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := in.Write([]byte("data")); err != nil {
					t.Fatal(err)
				}
				if !tc.placed {
					placed, err := in.place(ctx, digest.FromString("data"), content.WithLabels(nil))
					if placed || err != nil {
						t.Fatalf("placed: %v, %v", placed, err)
					}
				}
				if err := in.commit(ctx, digest.FromString("data"), nil); err != nil {
					t.Fatal(err)
				}
				in.close(ctx)
				if !tc.placed {
					break
				}
			}
			if data, err := content.ReadBlob(ctx, s, ocispec.Descriptor{Digest: digest.FromString("data")}); err != nil || string(data) != "data" {
				t.Errorf("%q, %v", data, err)
			}
			if left, err := s.ListStatuses(ctx); err != nil || len(left) > 0 {
				t.Errorf("uploads left: %v, %v", left, err)
			}
		})
	}
}

// TestIngestCollected has containerd collect its garbage when the file has the name
// of a blob, and nobody has told it yet.
func TestIngestCollected(t *testing.T) {
	s := newStore(t)
	ctx, done := s.leased()
	defer done()
	in, err := newIngest(ctx, collecting{s, s.dir}, newRef(), s.dir)
	if err != nil {
		t.Fatal(err)
	}
	defer in.close(ctx)
	if _, err := in.Write([]byte("data")); err != nil {
		t.Fatal(err)
	}
	if err := in.commit(ctx, digest.FromString("data"), nil); err != nil {
		t.Fatal(err)
	}
	if data, err := content.ReadBlob(ctx, s, ocispec.Descriptor{Digest: digest.FromString("data")}); err != nil || string(data) != "data" {
		t.Errorf("%q, %v", data, err)
	}
}

// collecting is a store whose garbage is collected before a writer is opened that
// expects a blob.
type collecting struct {
	content.Store
	dir string
}

func (c collecting) Writer(ctx context.Context, opts ...content.WriterOpt) (content.Writer, error) {
	var o content.WriterOpts
	for _, opt := range opts {
		if err := opt(&o); err != nil {
			return nil, err
		}
	}
	if o.Desc.Digest != "" {
		if err := os.Remove(filepath.Join(c.dir, "blobs", "sha256", o.Desc.Digest.Encoded())); err != nil {
			return nil, err
		}
	}
	return c.Store.Writer(ctx, opts...)
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
	if err := in.commit(ctx, digest.FromString("what was sent"), nil); err == nil {
		t.Error("no error, though there is less than was written")
	}
	in.close(ctx)
	if left, err := s.ListStatuses(ctx); err != nil || len(left) > 0 {
		t.Errorf("uploads left: %v, %v", left, err)
	}
	if left, _ := filepath.Glob(filepath.Join(s.dir, "ingest", "*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

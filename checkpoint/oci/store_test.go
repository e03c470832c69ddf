package oci

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/contentstore"
)

// store is containerd's content, images and leases, as in its daemon.
type store struct {
	t   *testing.T
	dir string // of the blobs
	db  *metadata.DB
	content.Store
	records images.Store
	leases  leases.Manager
	// ctx has a namespace, and leased a lease as well.
	ctx context.Context
}

func newStore(t *testing.T, opts ...metadata.DBOpt) *store {
	t.Helper()
	dir := t.TempDir()
	blobs, err := local.NewStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	// The test's folder may be on a slow disk, and nothing has to survive.
	file, err := bolt.Open(filepath.Join(t.TempDir(), "meta.db"), 0o600, &bolt.Options{NoSync: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	ctx := namespaces.WithNamespace(t.Context(), "test")
	db := metadata.NewDB(file, blobs, nil, opts...)
	if err := db.Init(ctx); err != nil {
		t.Fatal(err)
	}
	return &store{t, dir, db, db.ContentStore(), metadata.NewImageStore(db), metadata.NewLeaseManager(db), ctx}
}

func (s *store) leased() (context.Context, func()) {
	s.t.Helper()
	ctx, done, err := WithLease(s.ctx, s.leases, "")
	if err != nil {
		s.t.Fatal(err)
	}
	return ctx, func() {
		if err := done(); err != nil {
			s.t.Error(err)
		}
	}
}

// folder is the store's folder, as of a containerd whose layout is known.
func (s *store) folder() contentstore.Folder { return contentstore.At(s.dir, "2.4.2") }

// collect runs containerd's garbage collector.
func (s *store) collect() {
	s.t.Helper()
	if _, err := s.db.GarbageCollect(s.ctx); err != nil {
		s.t.Fatal(err)
	}
}

// blobs returns what is in the store, by digest.
func (s *store) blobs() map[digest.Digest]content.Info {
	s.t.Helper()
	all := map[digest.Digest]content.Info{}
	if err := s.Walk(s.ctx, func(i content.Info) error { all[i.Digest] = i; return nil }); err != nil {
		s.t.Fatal(err)
	}
	return all
}

func (s *store) put(ctx context.Context, mediaType string, data []byte, refs ...ocispec.Descriptor) ocispec.Descriptor {
	s.t.Helper()
	desc, err := writeBlob(ctx, s, mediaType, data, gcLabels(refs...))
	if err != nil {
		s.t.Fatal(err)
	}
	return desc
}

func (s *store) get(desc ocispec.Descriptor, v any) []byte {
	s.t.Helper()
	data, err := content.ReadBlob(s.ctx, s, desc)
	if err != nil {
		s.t.Fatal(err)
	}
	if v != nil {
		if err := json.Unmarshal(data, v); err != nil {
			s.t.Fatal(err)
		}
	}
	return data
}

// baseConfig has what our own types do not know, and layers that are empty.
func baseConfig(diffIDs ...digest.Digest) []byte {
	data, _ := json.Marshal(map[string]any{
		"architecture": runtime.GOARCH, "os": "linux", "author": "someone", "x-unknown": map[string]int{"a": 1},
		"config": map[string]any{"Cmd": []string{"sleep", "1000"}, "Healthcheck": map[string]any{"Interval": 5}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": diffIDs},
		"history": []map[string]any{
			{"created_by": "ADD rootfs"}, {"created_by": "CMD", "empty_layer": true},
		},
	})
	return data
}

// baseImage puts an image for two platforms into the store, with a record. The
// other platform's is not there, as after a pull.
func (s *store) baseImage() ocispec.Descriptor {
	s.t.Helper()
	ctx, done := s.leased()
	defer done()
	l := s.put(ctx, images.MediaTypeDockerSchema2LayerGzip, []byte("a layer"))
	l.Annotations = map[string]string{"a": "b"}
	config := s.put(ctx, images.MediaTypeDockerSchema2Config, baseConfig(digest.FromString("tar")))
	manifest, _ := json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: images.MediaTypeDockerSchema2Manifest,
		Config: config, Layers: []ocispec.Descriptor{l},
	})
	desc := s.put(ctx, images.MediaTypeDockerSchema2Manifest, manifest, config, l)
	desc.Platform = &ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}
	other := ocispec.Descriptor{MediaType: images.MediaTypeDockerSchema2Manifest, Digest: digest.FromString("other"), Size: 5,
		Platform: &ocispec.Platform{OS: "linux", Architecture: "s390x"}}
	index, _ := json.Marshal(ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex,
		Manifests: []ocispec.Descriptor{other, desc},
	})
	target := s.put(ctx, ocispec.MediaTypeImageIndex, index, other, desc)
	if _, err := s.records.Create(s.ctx, images.Image{Name: "test/base:1", Target: target}); err != nil {
		s.t.Fatal(err)
	}
	return target
}

// bytesLayer is a writable layer in memory.
type bytesLayer []byte

func (l bytesLayer) WriteLayer(_ context.Context, w io.Writer) error {
	_, err := w.Write(l)
	return err
}

// newCapture makes a capture with three files, one of which is of many chunks
// and cannot be compressed.
func newCapture(t *testing.T) *capture.Capture {
	t.Helper()
	dir := t.TempDir()
	pages := make([]byte, 3*chunkSize+12345)
	var x uint64 = 1
	for i := range pages {
		x = x*6364136223846793005 + 1442695040888963407
		pages[i] = byte(x >> 56)
	}
	for name, data := range map[string][]byte{
		"inventory.img": []byte("inventory"),
		"pages-1.img":   pages,
		"dump.log":      {},
	} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return &capture.Capture{
		Info: capture.Info{
			Version:       1,
			ContainerID:   "c0ffee",
			ContainerName: "db",
			Namespace:     "k8s.io",
			Pod:           &capture.Pod{Name: "web-0", Namespace: "shop", UID: "u", ID: "p"},
			Base:          capture.Base{Name: "test/base:1", Digest: "sha256:00", Config: "sha256:11", Snapshotter: "overlayfs"},
			Runtime:       "io.containerd.stasis.v1",
			OCIRuntime:    capture.Program{Name: "runc", Version: "1.3.2"},
			Engine:        capture.Program{Name: "stasis", Version: "v1"},
			CRIU:          "4.2.1",
			Host: capture.Host{Architecture: runtime.GOARCH, Kernel: "6.12", CgroupV2: true,
				Distribution: capture.Program{Name: "debian", Version: "13"}},
			Created:      time.Date(2026, 1, 2, 3, 4, 5, 678, time.UTC),
			Checkpointed: time.Date(2026, 2, 3, 4, 5, 6, 789, time.UTC),
			Labels:       map[string]string{"app": "db"},
			Stats:        &capture.Stats{Frozen: time.Second, ImageBytes: 5, LayerBytes: 6},
		},
		Spec:   json.RawMessage(`{"ociVersion":"1.2.0","process":{"args":["sleep","1000"]}}`),
		Images: dir,
		Layer:  bytesLayer(makeTar(t, entry{name: "etc/.wh.old"}, entry{name: "var/new", data: "new"})),
	}
}

// formats are all writers.
var formats = map[Format]func(context.Context, content.Store, ocispec.Descriptor, *capture.Capture, Options) (ocispec.Descriptor, error){
	Runnable: WriteRunnable,
	Index:    WriteIndex,
	Podman: func(ctx context.Context, s content.Store, _ ocispec.Descriptor, c *capture.Capture, o Options) (ocispec.Descriptor, error) {
		return WritePodman(ctx, s, c, o)
	},
}

var compressions = map[string]compression.Compression{
	"none": compression.Uncompressed, "gzip": compression.Gzip, "zstd": compression.Zstd,
}

// folder returns the files of a flat folder.
func folder(t *testing.T, dir string) map[string]string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	for _, e := range entries {
		data, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode() != 0o600 {
			t.Errorf("%s has mode %v, want 0600", e.Name(), info.Mode())
		}
		files[e.Name()] = string(data)
	}
	return files
}

// compare checks that two captures are the same. Formats of others know of no
// missing layer.
func compare(t *testing.T, ctx context.Context, got, want *capture.Capture) {
	t.Helper()
	gotInfo, _ := json.Marshal(got.Info)
	wantInfo, _ := json.Marshal(want.Info)
	if !bytes.Equal(gotInfo, wantInfo) {
		t.Errorf("info %s\nwant %s", gotInfo, wantInfo)
	}
	if !bytes.Equal(got.Spec, want.Spec) {
		t.Errorf("spec %s\nwant %s", got.Spec, want.Spec)
	}
	if got, want := folder(t, got.Images), folder(t, want.Images); !maps.Equal(got, want) {
		t.Errorf("images differ: %d files, want %d", len(got), len(want))
	}
	switch {
	case want.Layer == nil:
	case got.Layer == nil:
		t.Error("the layer is lost")
	default:
		for range 2 {
			var gotLayer, wantLayer bytes.Buffer
			if err := got.Layer.WriteLayer(ctx, &gotLayer); err != nil {
				t.Fatal(err)
			}
			if err := want.Layer.WriteLayer(ctx, &wantLayer); err != nil {
				t.Fatal(err)
			}
			// The archive has its own order, and headers for whiteouts.
			if got, want := listTar(t, &gotLayer), listTar(t, &wantLayer); !slices.Equal(got, want) {
				t.Errorf("layer %v, want %v", got, want)
			}
		}
	}
}

// listTar returns the entries, and what files hold.
func listTar(t *testing.T, r io.Reader) []entry {
	t.Helper()
	var entries []entry
	tr := tar.NewReader(r)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			slices.SortFunc(entries, func(a, b entry) int { return strings.Compare(a.name, b.name) })
			return entries
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		entries = append(entries, entry{name: h.Name, data: string(data), flag: h.Typeflag, link: h.Linkname})
	}
}

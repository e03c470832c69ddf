package contentstore

import (
	"bytes"
	"context"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"
)

// version is one whose layout is known.
const version = "v2.4.2"

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// store is containerd's content store, as in its daemon.
type store struct {
	content.Store
	dir string
}

// newStore returns a store, and a context with a lease.
func newStore(t *testing.T, opts ...metadata.DBOpt) (context.Context, *store) {
	t.Helper()
	s := &store{dir: t.TempDir()}
	blobs, err := local.NewStore(s.dir)
	must(t, err)
	file, err := bolt.Open(filepath.Join(t.TempDir(), "meta.db"), 0o600, &bolt.Options{NoSync: true})
	must(t, err)
	t.Cleanup(func() { file.Close() })
	ctx := namespaces.WithNamespace(t.Context(), "test")
	db := metadata.NewDB(file, blobs, nil, opts...)
	must(t, db.Init(ctx))
	s.Store = db.ContentStore()
	lease, err := metadata.NewLeaseManager(db).Create(ctx, leases.WithRandomID())
	must(t, err)
	return leases.WithLease(ctx, lease.ID), s
}

func (s *store) folder() Folder { return At(s.dir, version) }

func (s *store) blob(d digest.Digest) string {
	return filepath.Join(s.dir, "blobs", "sha256", d.Encoded())
}

// holds checks that the store has the data, and nothing of an upload.
func (s *store) holds(t *testing.T, ctx context.Context, data string, labels map[string]string) {
	t.Helper()
	sum := digest.FromString(data)
	info, err := s.Info(ctx, sum)
	if err != nil || info.Size != int64(len(data)) {
		t.Errorf("in the store: %+v, %v", info, err)
	}
	for name, want := range labels {
		if got := info.Labels[name]; got != want {
			t.Errorf("label %s: %q, want %q", name, got, want)
		}
	}
	if got, err := content.ReadBlob(ctx, s, ocispec.Descriptor{Digest: sum}); err != nil || string(got) != data {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if info, err := os.Stat(s.blob(sum)); err != nil || info.Mode() != 0o444 {
		t.Errorf("the blob's file: %v, %v", info, err)
	}
	s.idle(t, ctx)
}

// idle checks that there is nothing of an upload.
func (s *store) idle(t *testing.T, ctx context.Context) {
	t.Helper()
	if left, err := s.ListStatuses(ctx); err != nil || len(left) > 0 {
		t.Errorf("uploads left: %v, %v", left, err)
	}
	if left, _ := filepath.Glob(filepath.Join(s.dir, "ingest", "*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// upload uploads data in parts of so many blocks, or the rest.
func upload(t *testing.T, ctx context.Context, s content.Store, f Folder, data []byte, sizes ...int) (inFolder bool) {
	t.Helper()
	u, err := Begin(ctx, s, f)
	must(t, err)
	defer u.Close(ctx)
	sum := digest.FromBytes(data)
	size := len(data)
	for _, blocks := range append(sizes, len(data)) {
		part := data[:min(blocks*directBlock, len(data))]
		data = data[len(part):]
		if n, err := u.Write(part); err != nil || n != len(part) {
			t.Fatal(n, err)
		}
	}
	if u.Size() != int64(size) {
		t.Errorf("size %d, want %d", u.Size(), size)
	}
	must(t, u.Commit(ctx, sum, map[string]string{"stasis.run/x": "y"}))
	return u.InFolder()
}

// testData is of some blocks and an end.
func testData() []byte {
	return append(bytes.Repeat([]byte("0123456789abcdef"), 8*directBlock/16), "the end"...)
}

// TestUpload uploads through the store's folder, or through the socket where that is
// not possible.
func TestUpload(t *testing.T) {
	for name, tc := range map[string]struct {
		folder   func(s *store) Folder
		inFolder bool
		offset   int // of the data in memory: no file system takes 1 past its cache
	}{
		"folder":             {folder: (*store).folder, inFolder: true},
		"unaligned":          {folder: (*store).folder, inFolder: true, offset: 1},
		"no folder":          {folder: func(*store) Folder { return Folder{} }},
		"new major version":  {folder: func(s *store) Folder { return At(s.dir, "v3.0.0") }},
		"unparsable version": {folder: func(s *store) Folder { return At(s.dir, "1dcd765fa") }},
		"missing folder":     {folder: func(*store) Folder { return At("/nonexistent", version) }},
		"another's folder":   {folder: func(*store) Folder { return At(t.TempDir(), version) }},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, s := newStore(t)
			data := append(make([]byte, tc.offset), testData()...)[tc.offset:]
			if got := upload(t, ctx, s, tc.folder(s), data, 4, 3); got != tc.inFolder {
				t.Errorf("in the folder: %v", got)
			}
			s.holds(t, ctx, string(data), map[string]string{"stasis.run/x": "y"})
		})
	}
}

// changed is a store whose folder changes when an upload begins.
type changed struct {
	content.Store
	change func()
}

func (c changed) Writer(ctx context.Context, opts ...content.WriterOpt) (content.Writer, error) {
	w, err := c.Store.Writer(ctx, opts...)
	if err == nil {
		c.change()
	}
	return w, err
}

// TestLayoutChanged uploads to a containerd of a known version, whose folder does not have
// the known layout. view is what Stasis sees of the folder.
func TestLayoutChanged(t *testing.T) {
	// ingest shows each upload as what add makes of it in dir.
	ingest := func(add func(t *testing.T, dir string, ref []byte, data string)) func(*testing.T, *store, string) {
		return func(t *testing.T, s *store, view string) {
			uploads, err := filepath.Glob(filepath.Join(s.dir, "ingest", "*"))
			must(t, err)
			for _, upload := range uploads {
				dir := filepath.Join(view, "ingest", filepath.Base(upload))
				must(t, os.MkdirAll(dir, 0o755))
				ref, err := os.ReadFile(filepath.Join(upload, "ref"))
				must(t, err)
				add(t, dir, ref, filepath.Join(upload, "data"))
			}
		}
	}
	write := func(t *testing.T, data []byte, path ...string) {
		t.Helper()
		must(t, os.WriteFile(filepath.Join(path...), data, 0o600))
	}
	// blobs shows the uploads as they are, and the blobs as what make makes of them.
	blobs := func(make func(t *testing.T, path string)) func(*testing.T, *store, string) {
		return func(t *testing.T, s *store, view string) {
			if _, err := os.Lstat(filepath.Join(view, "ingest")); err == nil {
				return
			}
			must(t, os.Symlink(filepath.Join(s.dir, "ingest"), filepath.Join(view, "ingest")))
			make(t, filepath.Join(view, "blobs"))
		}
	}
	for name, tc := range map[string]struct {
		change   func(t *testing.T, s *store, view string)
		inFolder bool
	}{
		"uploads elsewhere": {change: func(t *testing.T, s *store, view string) {
			must(t, os.MkdirAll(filepath.Join(view, "uploads"), 0o755))
		}},
		"names elsewhere": {change: ingest(func(t *testing.T, dir string, ref []byte, _ string) {
			write(t, ref, dir, "name")
			write(t, nil, dir, "data")
		})},
		"names in another form": {change: ingest(func(t *testing.T, dir string, ref []byte, _ string) {
			write(t, append(ref, '\n'), dir, "ref")
			write(t, nil, dir, "data")
		})},
		"data elsewhere": {change: ingest(func(t *testing.T, dir string, ref []byte, _ string) {
			write(t, ref, dir, "ref")
			write(t, nil, dir, "bytes")
		})},
		"data with a header": {change: ingest(func(t *testing.T, dir string, ref []byte, _ string) {
			write(t, ref, dir, "ref")
			write(t, []byte("header"), dir, "data")
		})},
		"data in a folder": {change: ingest(func(t *testing.T, dir string, ref []byte, _ string) {
			write(t, ref, dir, "ref")
			must(t, os.MkdirAll(filepath.Join(dir, "data"), 0o755))
		})},
		"data by a link": {change: ingest(func(t *testing.T, dir string, ref []byte, data string) {
			write(t, ref, dir, "ref")
			if err := os.Symlink(data, filepath.Join(dir, "data")); !os.IsExist(err) {
				must(t, err)
			}
		})},
		"blobs elsewhere": {inFolder: true, change: blobs(func(t *testing.T, path string) {
			must(t, os.Mkdir(path, 0o755))
		})},
		"blobs in a file": {inFolder: true, change: blobs(func(t *testing.T, path string) {
			write(t, nil, path)
		})},
		"blobs on another file system": {inFolder: true, change: blobs(func(t *testing.T, path string) {
			must(t, os.Symlink(otherFileSystem(t, filepath.Dir(path)), path))
		})},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, s := newStore(t)
			view, data := t.TempDir(), testData()
			c := changed{s, func() { tc.change(t, s, view) }}
			if got := upload(t, ctx, c, At(view, version), data, 4, 3); got != tc.inFolder {
				t.Errorf("in the folder: %v", got)
			}
			s.holds(t, ctx, string(data), map[string]string{"stasis.run/x": "y"})
		})
	}
}

// otherFileSystem returns a folder that is on another file system than dir.
func otherFileSystem(t *testing.T, dir string) string {
	t.Helper()
	other, err := os.MkdirTemp("/dev/shm", "stasis-test-")
	if err != nil {
		t.Skipf("no second file system: %v", err)
	}
	t.Cleanup(func() { os.RemoveAll(other) })
	device := func(path string) uint64 {
		info, err := os.Stat(path)
		must(t, err)
		return info.Sys().(*syscall.Stat_t).Dev
	}
	if device(dir) == device(other) {
		t.Skip("the temporary folder is on /dev/shm")
	}
	return other
}

// TestPlaced gives a store a blob that it need not read again, unless its namespaces do
// not share.
func TestPlaced(t *testing.T) {
	for name, tc := range map[string]struct {
		opts   []metadata.DBOpt
		placed bool
	}{
		"shared":   {nil, true},
		"isolated": {[]metadata.DBOpt{metadata.WithPolicyIsolated}, false},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, s := newStore(t, tc.opts...)
			for range 2 { // the second time it is there
				u, err := Begin(ctx, s, s.folder())
				must(t, err)
				_, err = u.Write([]byte("data"))
				must(t, err)
				placed, err := u.place(ctx, digest.FromString("data"), content.WithLabels(nil))
				if placed != tc.placed || err != nil {
					t.Fatalf("placed: %v, %v", placed, err)
				}
				must(t, u.Commit(ctx, digest.FromString("data"), nil))
				u.Close(ctx)
				if !tc.placed {
					break
				}
			}
			s.holds(t, ctx, "data", nil)
		})
	}
}

// TestCollected has containerd collect its garbage when the file has the name of a blob,
// and no client has told containerd of it yet.
func TestCollected(t *testing.T) {
	ctx, s := newStore(t)
	upload(t, ctx, collecting{s}, s.folder(), []byte("data"))
	s.holds(t, ctx, "data", nil)
}

// collecting is a store whose garbage is collected before a writer is opened that
// expects a blob.
type collecting struct{ *store }

func (c collecting) Writer(ctx context.Context, opts ...content.WriterOpt) (content.Writer, error) {
	var o content.WriterOpts
	for _, opt := range opts {
		if err := opt(&o); err != nil {
			return nil, err
		}
	}
	if o.Desc.Digest != "" {
		if err := os.Remove(c.blob(o.Desc.Digest)); err != nil {
			return nil, err
		}
	}
	return c.Store.Writer(ctx, opts...)
}

// TestUploadFails leaves nothing of an upload that fails, or was meddled with.
func TestUploadFails(t *testing.T) {
	ctx, s := newStore(t)
	u, err := Begin(ctx, s, s.folder())
	must(t, err)
	_, err = u.Write([]byte("what was sent"))
	must(t, err)
	must(t, os.Truncate(u.file.Name(), 4))
	sum := digest.FromString("what was sent")
	if err := u.Commit(ctx, sum, nil); err == nil {
		t.Error("no error, though there is less than was written")
	}
	u.Close(ctx)
	if _, err := os.Stat(s.blob(sum)); !os.IsNotExist(err) {
		t.Errorf("the blob's file: %v, want %v", err, fs.ErrNotExist)
	}
	s.idle(t, ctx)
}

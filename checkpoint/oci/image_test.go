package oci

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/checkpoint/sign"
)

// entry is one of a tar; a plain file unless flag says otherwise.
type entry struct {
	name, data string
	flag       byte
	link       string
}

func makeTar(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, e := range entries {
		if e.flag == 0 {
			e.flag = tar.TypeReg
		}
		h := &tar.Header{Typeflag: e.flag, Name: e.name, Linkname: e.link, Size: int64(len(e.data)), Mode: 0o600}
		if err := tw.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(tw, e.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// TestRoundTrip writes each format, reads it, and writes it again: the capture and
// the image are the same, to the last byte.
func TestRoundTrip(t *testing.T) {
	for format, write := range formats {
		for name, comp := range compressions {
			for _, layer := range []bool{true, false} {
				t.Run(string(format)+"/"+name+map[bool]string{true: "", false: ", no layer"}[layer], func(t *testing.T) {
					s := newStore(t)
					base := s.baseImage()
					c := newCapture(t)
					if !layer {
						c.Layer, c.Info.Pod = nil, nil
					}
					ctx, done := s.leased()
					defer done()
					desc, err := write(ctx, s, base, c, Options{Compression: comp})
					if err != nil {
						t.Fatal(err)
					}
					if got, err := Detect(ctx, s, desc); got != format || err != nil {
						t.Fatalf("Detect: %q, %v", got, err)
					}
					dir := filepath.Join(t.TempDir(), "new")
					again, err := Read(ctx, s, desc, dir)
					if err != nil {
						t.Fatal(err)
					}
					if again.Images != filepath.Join(dir, "checkpoint") {
						t.Errorf("images are in %s", again.Images)
					}
					compare(t, ctx, again, c)
					if !layer && format != Podman && again.Layer != nil {
						t.Error("a layer that was not there")
					}
					second, err := write(ctx, s, base, again, Options{Compression: comp})
					if err != nil {
						t.Fatal(err)
					}
					if second.Digest != desc.Digest {
						t.Errorf("written again it is %s, was %s", second.Digest, desc.Digest)
					}
				})
			}
		}
	}
}

// TestRunnableIsAnImage looks at the image as any other tool does.
func TestRunnableIsAnImage(t *testing.T) {
	s := newStore(t)
	base := s.baseImage()
	c := newCapture(t)
	ctx, done := s.leased()
	defer done()
	desc, err := WriteRunnable(ctx, s, base, c, Options{Compression: compression.Zstd})
	if err != nil {
		t.Fatal(err)
	}
	var m ocispec.Manifest
	s.get(desc, &m)
	if len(m.Layers) != 3 {
		t.Fatalf("%d layers, want the base's, the writable, the checkpoint", len(m.Layers))
	}
	if l := m.Layers[0]; l.Digest != digest.FromString("a layer") || l.MediaType != ocispec.MediaTypeImageLayerGzip || l.Annotations["a"] != "b" {
		t.Errorf("layer of the base: %+v", l)
	}
	for key := range m.Annotations {
		if !strings.HasPrefix(key, "stasis.run/") {
			t.Errorf("annotation %s on the manifest: another engine may take the image for its own", key)
		}
	}
	if name := m.Layers[2].Annotations["org.criu.checkpoint.container.name"]; name != "db" {
		t.Errorf("the checkpoint layer's container name is %q", name)
	}

	var config map[string]json.RawMessage
	s.get(m.Config, &config)
	var baseKeys map[string]json.RawMessage
	_ = json.Unmarshal(baseConfig(), &baseKeys)
	for _, key := range []string{"author", "config", "x-unknown", "os", "architecture"} {
		if string(config[key]) != string(baseKeys[key]) {
			t.Errorf("config.%s is %s, want %s as in the base", key, config[key], baseKeys[key])
		}
	}
	var parsed ocispec.Image
	s.get(m.Config, &parsed)
	if len(parsed.RootFS.DiffIDs) != 3 {
		t.Errorf("%d diff IDs", len(parsed.RootFS.DiffIDs))
	}
	full := 0
	for _, h := range parsed.History {
		if !h.EmptyLayer {
			full++
		}
	}
	if full != 3 || len(parsed.History) != 4 {
		t.Errorf("history %+v", parsed.History)
	}
	if !parsed.Created.Equal(c.Info.Checkpointed) {
		t.Errorf("created %v", parsed.Created)
	}
	// What the layers hold, and that diff IDs are true.
	var names []string
	for i, l := range m.Layers[1:] {
		b, err := openBlob(ctx, s, l)
		if err != nil {
			t.Fatal(err)
		}
		digester := digest.Canonical.Digester()
		r := io.TeeReader(b, digester.Hash())
		tr := tar.NewReader(r)
		for {
			h, err := tr.Next()
			if err != nil {
				break
			}
			names = append(names, h.Name)
			if h.Uid != 0 || h.Gid != 0 || i == 1 && h.Mode != map[byte]int64{tar.TypeDir: 0o700, tar.TypeReg: 0o600}[h.Typeflag] {
				t.Errorf("%s: owner %d:%d, mode %o", h.Name, h.Uid, h.Gid, h.Mode)
			}
		}
		if _, err := io.Copy(io.Discard, r); err != nil {
			t.Fatal(err)
		}
		if got := digester.Digest(); got != parsed.RootFS.DiffIDs[i+1] {
			t.Errorf("layer %d: diff ID %s, want %s", i+1, parsed.RootFS.DiffIDs[i+1], got)
		}
		if err := b.finish(); err != nil {
			t.Error(err)
		}
		b.Close()
	}
	want := []string{"etc/.wh.old", "var/new", ".stasis/", ".stasis/checkpoint/", ".stasis/checkpoint/pages-1.img",
		".stasis/info.json", ".stasis/spec.json", ".stasis/checkpoint/dump.log", ".stasis/checkpoint/inventory.img"}
	if !slices.Equal(names, want) {
		t.Errorf("layers hold\n%q, want\n%q", names, want)
	}
}

// TestSecondGeneration makes a checkpoint of a container whose image is one: the
// older processes are not in it.
func TestSecondGeneration(t *testing.T) {
	s := newStore(t)
	base := s.baseImage()
	c := newCapture(t)
	ctx, done := s.leased()
	defer done()
	first, err := WriteRunnable(ctx, s, base, c, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(c.Images, "core-2.img"), []byte("2"), 0o600); err != nil {
		t.Fatal(err)
	}
	c.Layer = bytesLayer(makeTar(t, entry{name: "var/newer"}))
	second, err := WriteRunnable(ctx, s, first, c, Options{})
	if err != nil {
		t.Fatal(err)
	}
	var one, two ocispec.Manifest
	s.get(first, &one)
	s.get(second, &two)
	if len(two.Layers) != 4 || two.Layers[1].Digest != one.Layers[1].Digest || two.Layers[2].Digest == one.Layers[2].Digest {
		t.Errorf("layers %v", two.Layers)
	}
	var config ocispec.Image
	s.get(two.Config, &config)
	if len(config.RootFS.DiffIDs) != 4 || len(config.History) != 5 {
		t.Errorf("%d diff IDs, history %+v", len(config.RootFS.DiffIDs), config.History)
	}
	again, err := Read(ctx, s, second, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	compare(t, ctx, again, c)
}

// TestReadInfo lists without reading.
func TestReadInfo(t *testing.T) {
	for format, write := range formats {
		t.Run(string(format), func(t *testing.T) {
			s := newStore(t)
			base := s.baseImage()
			c := newCapture(t)
			ctx, done := s.leased()
			defer done()
			key, err := sign.Dir(filepath.Join(t.TempDir(), "stasis")).Key()
			if err != nil {
				t.Fatal(err)
			}
			envelope, err := key.Sign([]byte("a manifest"), nil)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(c.Images, layout.Signature), envelope, 0o600); err != nil {
				t.Fatal(err)
			}
			desc, err := write(ctx, s, base, c, Options{})
			if err != nil {
				t.Fatal(err)
			}
			got, err := ReadInfo(ctx, s, desc)
			if !slices.Equal(got.SignedBy, []string{key.ID}) {
				t.Errorf("signed by %q", got.SignedBy)
			}
			if err != nil {
				t.Fatal(err)
			}
			want := c.Info
			if format != Index {
				want.Labels, want.Stats, want.Host.CgroupV2 = nil, nil, format == Podman
			}
			gotJSON, _ := json.Marshal(got.Info)
			wantJSON, _ := json.Marshal(want)
			if !bytes.Equal(gotJSON, wantJSON) {
				t.Errorf("got  %s\nwant %s", gotJSON, wantJSON)
			}
			if got.Format != format || got.Checkpoint < 3*chunkSize || (got.Layer == 0) != (format == Podman) || got.Layer > 4096 {
				t.Errorf("format %q, sizes %d and %d", got.Format, got.Checkpoint, got.Layer)
			}
		})
	}
	s := newStore(t)
	if got, err := ReadInfo(s.ctx, s, s.baseImage()); got.Format != None || err != nil {
		t.Errorf("an image that is no checkpoint: %+v, %v", got, err)
	}
}

// TestProgress checks that the last call has all.
func TestProgress(t *testing.T) {
	s := newStore(t)
	ctx, done := s.leased()
	defer done()
	last := make(chan [2]int64, 100)
	_, err := WriteRunnable(ctx, s, s.baseImage(), newCapture(t), Options{Progress: func(stage string, done, total int64) {
		if stage == "checkpoint" {
			last <- [2]int64{done, total}
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	close(last)
	var got [2]int64
	for got = range last {
	}
	if got[1] < 3*chunkSize || got[0] < got[1] {
		t.Errorf("%d bytes of %d", got[0], got[1])
	}
}

// TestGarbageCollection: as long as there is a lease or a name all is kept, then
// nothing is.
func TestGarbageCollection(t *testing.T) {
	for format, write := range formats {
		t.Run(string(format), func(t *testing.T) {
			s := newStore(t)
			base := s.baseImage()
			ctx, done := s.leased()
			desc, err := write(ctx, s, base, newCapture(t), Options{})
			if err != nil {
				t.Fatal(err)
			}
			all := s.blobs()
			same := func(when string, want map[digest.Digest]content.Info) {
				t.Helper()
				s.collect()
				got := s.blobs()
				for d := range want {
					if _, ok := got[d]; !ok {
						t.Errorf("%s: %s is gone", when, d)
					}
				}
				for d, info := range got {
					if _, ok := want[d]; !ok {
						t.Errorf("%s: %s is still there (%v)", when, d, info.Labels)
					}
				}
			}
			same("without a name", all)
			const name = "test/checkpoint:1"
			img, err := Save(ctx, s, s.records, name, desc, map[string]string{"a": "b"})
			if err != nil {
				t.Fatal(err)
			}
			if img.Labels[AnnotationCheckpoint] != string(format) || img.Labels["a"] != "b" ||
				format == Index && img.Labels["containerd.io/checkpoint"] != "true" {
				t.Errorf("labels %v", img.Labels)
			}
			done()
			same("with a name", all)
			// The base's record goes; what the checkpoint needs of it stays.
			if err := s.records.Delete(s.ctx, "test/base:1"); err != nil {
				t.Fatal(err)
			}
			s.collect()
			if _, err := Read(s.ctx, s, desc, t.TempDir()); err != nil {
				t.Error(err)
			}
			switch format {
			case Runnable:
				var m ocispec.Manifest
				s.get(desc, &m)
				for _, d := range append(m.Layers, m.Config) {
					if _, err := s.Info(s.ctx, d.Digest); err != nil {
						t.Errorf("without the base's record: %v", err)
					}
				}
			case Index:
				if _, err := images.Manifest(s.ctx, s, base, platforms.Default()); err != nil {
					t.Errorf("without the base's record: %v", err)
				}
			case Podman:
				for d := range s.blobs() {
					if d == base.Digest {
						t.Error("the base is kept")
					}
				}
			}
			if err := s.records.Delete(s.ctx, name); err != nil {
				t.Fatal(err)
			}
			same("after the record was deleted", nil)
		})
	}
}

// TestInterrupted ends a write at different points: nothing has a name, and when
// the lease has ended nothing is there but the base.
func TestInterrupted(t *testing.T) {
	for format, write := range formats {
		for _, after := range []int64{0, 1, 2 * chunkSize} {
			s := newStore(t)
			base := s.baseImage()
			before := s.blobs()
			ctx, done := s.leased()
			stop, cancel := context.WithCancel(ctx)
			c := newCapture(t)
			if after == 0 {
				cancel()
			}
			_, err := write(stop, s, base, c, Options{Progress: func(stage string, n, _ int64) {
				if n >= after {
					cancel()
				}
			}})
			cancel()
			if !errors.Is(err, context.Canceled) {
				t.Errorf("%s: cancelled after %d bytes: %v", format, after, err)
			}
			if found, err := s.ListStatuses(s.ctx); err != nil || len(found) > 0 {
				t.Errorf("%s: unfinished writes are left: %v, %v", format, found, err)
			}
			done()
			s.collect()
			if got := s.blobs(); len(got) != len(before) {
				t.Errorf("%s: %d blobs are left of %d", format, len(got), len(before))
			}
			records, err := s.records.List(s.ctx)
			if err != nil || len(records) != 1 {
				t.Errorf("%s: images %v, %v", format, records, err)
			}
		}
	}
}

// TestSaveReplaces replaces a checkpoint, and nothing else.
func TestSaveReplaces(t *testing.T) {
	s := newStore(t)
	base := s.baseImage()
	ctx, done := s.leased()
	defer done()
	c := newCapture(t)
	one, err := WriteRunnable(ctx, s, base, c, Options{})
	if err != nil {
		t.Fatal(err)
	}
	two, err := WriteIndex(ctx, s, base, c, Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, desc := range []ocispec.Descriptor{one, two, one} {
		if _, err := Save(ctx, s, s.records, "test/c:1", desc, nil); err != nil {
			t.Fatal(err)
		}
		img, err := s.records.Get(ctx, "test/c:1")
		if err != nil || img.Target.Digest != desc.Digest {
			t.Errorf("%+v, %v; want %s", img, err, desc.Digest)
		}
		if _, marked := img.Labels["containerd.io/checkpoint"]; marked != (desc.Digest == two.Digest) {
			t.Errorf("labels %v", img.Labels)
		}
	}
	if _, err := Save(ctx, s, s.records, "test/base:1", one, nil); !errdefs.IsAlreadyExists(err) {
		t.Errorf("in place of the base image: %v", err)
	}
	if _, err := Save(ctx, s, s.records, "test/other:1", base, nil); !errdefs.IsInvalidArgument(err) {
		t.Errorf("an image that is no checkpoint: %v", err)
	}
}

// TestIncompleteBase refuses a base of which a layer is missing, as lazy
// snapshotters leave it.
func TestIncompleteBase(t *testing.T) {
	s := newStore(t)
	base := s.baseImage()
	if err := s.Delete(s.ctx, digest.FromString("a layer")); err != nil {
		t.Fatal(err)
	}
	ctx, done := s.leased()
	defer done()
	if _, err := WriteRunnable(ctx, s, base, newCapture(t), Options{}); !errdefs.IsFailedPrecondition(err) ||
		!strings.Contains(err.Error(), "ctr content fetch") {
		t.Errorf("%v", err)
	}
}

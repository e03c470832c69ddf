package oci

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/stasis-run/stasis/checkpoint/capture"
)

func blobName(data string) string { return "blobs/sha256/" + digest.FromString(data).Encoded() }

// layoutTar is a tar with an index that lists a blob, and more entries.
func layoutTar(t testing.TB, more ...entry) []byte {
	t.Helper()
	index, err := json.Marshal(ocispec.Index{Manifests: []ocispec.Descriptor{
		{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("a manifest"), Size: 10},
	}})
	if err != nil {
		t.Fatal(err)
	}
	return makeTar(t, append([]entry{
		{name: "oci-layout", data: `{"imageLayoutVersion":"1.0.0"}`}, {name: "index.json", data: string(index)},
		{name: blobName("a manifest"), data: "a manifest"},
	}, more...)...)
}

func TestReadLayout(t *testing.T) {
	s := newStore(t)
	ctx, done := s.leased()
	defer done()
	list, err := ReadLayout(ctx, s, bytes.NewReader(layoutTar(t, entry{name: "manifest.json", data: "[]"})), 1<<20)
	if err != nil || len(list) != 1 {
		t.Fatalf("%+v, %v", list, err)
	}
	if data := s.get(list[0], nil); string(data) != "a manifest" {
		t.Errorf("%q", data)
	}
	good := layoutTar(t)
	for name, c := range map[string]struct {
		data []byte
		says string
	}{
		"nothing":             {makeTar(t), "there is no oci-layout"},
		"no index":            {makeTar(t, entry{name: "oci-layout", data: "{}"}), "no index.json"},
		"an index twice":      {layoutTar(t, entry{name: "./index.json", data: "{}"}), "twice"},
		"an index that is":    {makeTar(t, entry{name: "oci-layout", data: "{}"}, entry{name: "index.json", data: "["}), "no valid manifest or index"},
		"a large index":       {makeTar(t, entry{name: "index.json", data: strings.Repeat(" ", maxDocument+1)}), "index.json: 8388609 bytes; at most 8388608"},
		"many objects":        {makeTar(t, entry{name: "oci-layout", data: "{}"}, entry{name: "index.json", data: `{"manifests":[` + strings.Repeat("{},", 1<<20) + `{}]}`}), "objects and lists"},
		"many manifests":      {makeTar(t, entry{name: "oci-layout", data: "{}"}, entry{name: "index.json", data: `{"manifests":[` + strings.Repeat("{},", maxManifests) + `{}]}`}), "at most 64"},
		"a large version":     {makeTar(t, entry{name: "oci-layout", data: strings.Repeat(" ", maxLayoutVersion+1)}), "oci-layout: 4097 bytes"},
		"an altered blob":     {layoutTar(t, entry{name: blobName("a"), data: "b"}), "altered"},
		"no name of a blob":   {layoutTar(t, entry{name: "blobs/sha256/../x", data: "b"}), "not the name of a blob"},
		"many files":          {layoutTar(t, make([]entry, maxBlobs)...), "without a name"},
		"too large":           {layoutTar(t, entry{name: "blobs/sha256/x", data: strings.Repeat("x", 17<<20)}), "larger than is allowed"},
		"too large elsewhere": {layoutTar(t, entry{name: "x", data: strings.Repeat("x", 17<<20)}), "larger than is allowed"},
		"truncated":           {good[:len(good)-2000], "no valid tar"},
		"data after the end":  {append(bytes.Clone(good), good...), "after its end"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ReadLayout(ctx, s, bytes.NewReader(c.data), 16<<20)
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("error %v; want an invalid argument with %q", err, c.says)
			}
		})
	}
	many := make([]entry, maxBlobs)
	for i := range many {
		many[i].name = strings.Repeat("n", i/64+1) + string(rune('A'+i%64))
	}
	if _, err := ReadLayout(ctx, s, bytes.NewReader(layoutTar(t, many...)), 1<<30); err == nil || !strings.Contains(err.Error(), "more than 4096 files") {
		t.Errorf("many files: %v", err)
	}
}

// Whatever a tar holds, only blobs with the right digest come into the store.
func FuzzReadLayout(f *testing.F) {
	f.Add(layoutTar(f))
	f.Add(layoutTar(f, entry{name: blobName("a"), data: "a"}, entry{name: "dir/", flag: tar.TypeDir}))
	f.Fuzz(func(t *testing.T, data []byte) {
		dir := t.TempDir()
		blobs, err := local.NewStore(dir) // containerd's, without its database
		if err != nil {
			t.Fatal(err)
		}
		list, err := ReadLayout(t.Context(), blobs, bytes.NewReader(data), 1<<16)
		if err != nil && len(list) > 0 || len(list) > maxManifests {
			t.Errorf("%d images, %v", len(list), err)
		}
		total := int64(0)
		err = blobs.Walk(t.Context(), func(info content.Info) error {
			total += info.Size
			got, err := content.ReadBlob(t.Context(), blobs, ocispec.Descriptor{Digest: info.Digest, Size: info.Size})
			if digest.FromBytes(got) != info.Digest {
				t.Errorf("%s: altered", info.Digest)
			}
			return err
		})
		if err != nil && !errors.Is(err, os.ErrNotExist) { // of a store of nothing
			t.Fatal(err)
		}
		if total > 1<<16 {
			t.Errorf("%d bytes", total)
		}
	})
}

// An index that lists one manifest many times is not read as often, and each of its
// parts has a label.
func TestKeep(t *testing.T) {
	s := newStore(t)
	ctx, done := s.leased()
	defer done()
	desc := ocispec.Descriptor{}
	for range 40 { // 2^40 ways lead to the last
		data, err := json.Marshal(ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{desc, desc}})
		if err != nil {
			t.Fatal(err)
		}
		if desc.Digest == "" {
			data = []byte(`{"mediaType":"` + ocispec.MediaTypeImageIndex + `"}`)
		}
		desc = s.put(ctx, ocispec.MediaTypeImageIndex, data)
	}
	if err := Keep(ctx, s, desc); err != nil {
		t.Fatal(err)
	}
	if info := s.blobs()[desc.Digest]; len(info.Labels) == 0 {
		t.Errorf("%+v", info)
	}
	missing := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("gone"), Size: 4}
	if err := Keep(ctx, s, missing); !errdefs.IsNotFound(err) {
		t.Errorf("an image that is not here: %v", err)
	}
}

// A name that nobody typed replaces nothing.
func TestSaveNew(t *testing.T) {
	s := newStore(t)
	base := s.baseImage()
	ctx, done := s.leased()
	defer done()
	c := newCapture(t)
	var descs []ocispec.Descriptor
	for _, id := range []string{"a", "b", "c"} {
		c.Info.ContainerID = id
		desc, err := WriteRunnable(ctx, s, base, c, Options{})
		if err != nil {
			t.Fatal(err)
		}
		descs = append(descs, desc)
	}
	save := func(name string, desc ocispec.Descriptor, want string, wantMade bool) {
		t.Helper()
		img, made, err := SaveNew(ctx, s, s.records, name, desc, nil)
		if err != nil || img.Name != want || made != wantMade || img.Target.Digest != desc.Digest {
			t.Errorf("%s: %s, %v, %v; want %s, %v", name, img.Name, made, err, want, wantMade)
		}
	}
	short := func(i int) string { return descs[i].Digest.Encoded()[:12] }
	save("test/c:1", descs[0], "test/c:1", true)
	save("test/c:1", descs[0], "test/c:1", false)
	save("test/c:1", descs[1], "test/c:1-"+short(1), true)
	save("test/c:1", descs[1], "test/c:1-"+short(1), false)
	save("test/base:1", descs[0], "test/base:1-"+short(0), true)
	// One who knows the digest before can take that name as well.
	if _, err := s.records.Create(ctx, images.Image{Name: "test/c:1-" + short(2), Target: base}); err != nil {
		t.Fatal(err)
	}
	save("test/c:1", descs[2], "test/c:1-"+descs[2].Digest.Encoded(), true)
	tag := strings.Repeat("t", maxTag)
	save("test/c:"+tag, descs[0], "test/c:"+tag, true)
	save("test/c:"+tag, descs[1], "test/c:"+tag[:maxTag-13]+"-"+short(1), true)
	for name, want := range map[string]ocispec.Descriptor{"test/c:1": descs[0], "test/base:1": base} {
		if img, err := s.records.Get(ctx, name); err != nil || img.Target.Digest != want.Digest {
			t.Errorf("%s is %s, %v", name, img.Target.Digest, err)
		}
	}
	byDigest := "test/c@" + base.Digest.String()
	save(byDigest, descs[0], byDigest, true)
	if _, _, err := SaveNew(ctx, s, s.records, byDigest, descs[1], nil); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a name by digest: %v", err)
	}
	if _, _, err := SaveNew(ctx, s, s.records, "test/x:1", base, nil); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no checkpoint: %v", err)
	}
}

// A checkpoint that is larger than allowed is refused, its writable layer too.
func TestReadLimited(t *testing.T) {
	s := newStore(t)
	base := s.baseImage()
	ctx, done := s.leased()
	defer done()
	c := newCapture(t)
	c.Layer = bytesLayer(makeTar(t, entry{name: "zeros", data: strings.Repeat("\x00", 4<<20)}))
	for format, write := range formats {
		desc, err := write(ctx, s, base, c, Options{Compression: compressions["zstd"]})
		if err != nil {
			t.Fatal(err)
		}
		for limit, fits := range map[int64]string{1 << 20: "", 3*chunkSize + 1<<20: "images", 64 << 20: "all"} {
			dir := filepath.Join(t.TempDir(), "dir")
			got, err := ReadLimited(ctx, s, desc, dir, limit)
			if err == nil && got.Layer != nil {
				err = got.Layer.WriteLayer(ctx, io.Discard)
			}
			if fits == "all" && err != nil || fits != "all" && !errors.Is(err, capture.ErrTooLarge) {
				t.Errorf("%s, %d bytes: %v", format, limit, err)
			}
		}
	}
}

// The writable layer of an image is handed on as it is: a tar that programs read
// differently is not.
func TestAmbiguousLayer(t *testing.T) {
	s := newStore(t)
	ctx, done := s.leased()
	defer done()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, h := range []*tar.Header{
		{Format: tar.FormatGNU, Typeflag: tar.TypeReg, Name: strings.Repeat("long/", 40) + "a"},
		{Format: tar.FormatPAX, Typeflag: tar.TypeReg, Name: "b", PAXRecords: map[string]string{"path": "é"}},
	} {
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
	}
	data := buf.Bytes()
	// The header and name of L, without the entry: then that of PAX.
	mixed := append(append(bytes.Clone(data[:1024]), data[1536:]...), make([]byte, 1024)...)
	desc := s.put(ctx, ocispec.MediaTypeImageLayer, mixed)
	err := storedLayer{s, desc, 1 << 20}.WriteLayer(ctx, io.Discard)
	if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "long name of GNU") {
		t.Errorf("error %v", err)
	}
}

func TestBounded(t *testing.T) {
	h := Bounded()
	for size, ok := range map[int64]bool{maxPulled: true, maxPulled + 1: false} {
		_, err := h(t.Context(), ocispec.Descriptor{MediaType: ocispec.MediaTypeImageIndex, Size: size})
		if ok != (err == nil) || err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
}

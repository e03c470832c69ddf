package oci

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// good is a valid last layer of a runnable image.
func good() []entry {
	return []entry{
		{name: ".stasis/", flag: tar.TypeDir},
		{name: ".stasis/info.json", data: `{"version":1}`},
		{name: ".stasis/spec.json", data: `{}`},
		{name: ".stasis/checkpoint/", flag: tar.TypeDir},
		{name: ".stasis/checkpoint/inventory.img", data: "inventory"},
	}
}

// hostileLayers are layers that no reader may accept, and what has to be said.
var hostileLayers = map[string]struct {
	entries []entry
	says    string
}{
	"nothing":        {nil, "info.json: missing"},
	"no spec":        {good()[:2], "spec.json: missing"},
	"no checkpoint":  {good()[:3], "checkpoint/: missing"},
	"elsewhere":      {append(good(), entry{name: "etc/passwd", data: "x"}), `"etc/passwd"`},
	"absolute":       {append(good(), entry{name: "/.stasis/checkpoint/x.img"}), "nothing but /.stasis"},
	"up":             {append(good(), entry{name: ".stasis/checkpoint/../../x"}), "not a name"},
	"just up":        {append(good(), entry{name: ".stasis/checkpoint/.."}), "not a name"},
	"the folder":     {append(good(), entry{name: ".stasis/checkpoint/."}), "not a name"},
	"subfolder":      {append(good(), entry{name: ".stasis/checkpoint/a/", flag: tar.TypeDir}), "not a name"},
	"below":          {append(good(), entry{name: ".stasis/checkpoint/a/b.img"}), "not a name"},
	"hidden":         {append(good(), entry{name: ".stasis/checkpoint/.wh.inventory.img"}), "not a name"},
	"opaque":         {append(good(), entry{name: ".stasis/.wh..wh..opq"}), "nothing but"},
	"line feed":      {append(good(), entry{name: ".stasis/checkpoint/a\nb"}), "not a name"},
	"no UTF-8":       {append(good(), entry{name: ".stasis/checkpoint/\xff"}), "not a name"},
	"twice":          {append(good(), good()[4]), "twice"},
	"info twice":     {append(good(), good()[1]), "twice"},
	"symlink":        {append(good(), entry{name: ".stasis/checkpoint/x.img", flag: tar.TypeSymlink, link: "/etc/passwd"}), "symbolic link"},
	"hard link":      {append(good(), entry{name: ".stasis/checkpoint/x.img", flag: tar.TypeLink, link: "/etc/passwd"}), "hard link"},
	"device":         {append(good(), entry{name: ".stasis/checkpoint/x.img", flag: tar.TypeBlock}), "device"},
	"FIFO":           {append(good(), entry{name: ".stasis/checkpoint/x.img", flag: tar.TypeFifo}), "FIFO"},
	"info is a link": {append(good()[2:], entry{name: ".stasis/info.json", flag: tar.TypeSymlink, link: "/etc/passwd"}), "symbolic link"},
	"folder is a link": {append([]entry{{name: ".stasis/", flag: tar.TypeSymlink, link: "/etc"}}, good()[1:]...),
		"the name of a folder"},
	"newer info":   {[]entry{{name: ".stasis/info.json", data: `{"version":2}`}}, "newer"},
	"no version":   {[]entry{{name: ".stasis/info.json", data: `{}`}}, "no valid format version"},
	"unknown key":  {[]entry{{name: ".stasis/info.json", data: `{"version":1,"surprise":1}`}}, "surprise"},
	"no JSON":      {[]entry{{name: ".stasis/info.json", data: `{"version":1} x`}}, "info.json"},
	"spec no JSON": {[]entry{{name: ".stasis/spec.json", data: `[]`}}, "spec.json"},
	"spec null":    {[]entry{{name: ".stasis/spec.json", data: `null`}}, "spec.json"},
	"large info":   {[]entry{{name: ".stasis/info.json", data: strings.Repeat(" ", maxMetadata+1)}}, "larger than"},
}

// runnable puts a runnable image with the layer as its last into the store.
func (s *store) runnable(ctx context.Context, blob []byte, mediaType string, change func(*ocispec.Manifest)) ocispec.Descriptor {
	s.t.Helper()
	l := s.put(ctx, mediaType, blob)
	l.Annotations = map[string]string{AnnotationUncompressed: strconv.Itoa(maxMetadata * 2)}
	config := s.put(ctx, ocispec.MediaTypeImageConfig, baseConfig())
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: config,
		Layers: []ocispec.Descriptor{l}, Annotations: map[string]string{
			AnnotationCheckpoint: string(Runnable), AnnotationVersion: "1", AnnotationCheckpointLayer: l.Digest.String(),
		}}
	if change != nil {
		change(&m)
	}
	data, err := json.Marshal(m)
	if err != nil {
		s.t.Fatal(err)
	}
	return s.put(ctx, ocispec.MediaTypeImageManifest, data)
}

// refuse checks that reading fails, says why, and leaves nothing.
func (s *store) refuse(ctx context.Context, desc ocispec.Descriptor, says string) {
	s.t.Helper()
	parent := s.t.TempDir()
	dir := filepath.Join(parent, "dir")
	_, err := Read(ctx, s, desc, dir)
	switch {
	case err == nil:
		s.t.Error("accepted")
	case !strings.Contains(err.Error(), says):
		s.t.Errorf("says %q; want %q in it", err, says)
	case !errdefs.IsInvalidArgument(err) && !errdefs.IsFailedPrecondition(err):
		s.t.Errorf("%v is of no class that callers know", err)
	}
	if left, err := os.ReadDir(parent); err != nil || len(left) > 0 {
		s.t.Errorf("left behind: %v, %v", left, err)
	}
}

func compress(t testing.TB, data []byte, c compression.Compression) []byte {
	t.Helper()
	var buf bytes.Buffer
	z, err := compressor(&buf, c)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := z.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func TestHostileLayers(t *testing.T) {
	for name, c := range hostileLayers {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			ctx, done := s.leased()
			defer done()
			blob := compress(t, makeTar(t, c.entries...), compression.Zstd)
			s.refuse(ctx, s.runnable(ctx, blob, ocispec.MediaTypeImageLayerZstd, nil), c.says)
		})
	}
}

func TestHostileImages(t *testing.T) {
	layer := makeTar(t, good()...)
	many := good()
	for i := range maxFiles {
		many = append(many, entry{name: fmt.Sprintf(".stasis/checkpoint/%d.img", i)})
	}
	annotate := func(key, value string) func(*ocispec.Manifest) {
		return func(m *ocispec.Manifest) { m.Annotations[key] = value }
	}
	size := func(value string) func(*ocispec.Manifest) {
		return func(m *ocispec.Manifest) {
			m.Layers[0].Annotations = map[string]string{AnnotationUncompressed: value}
		}
	}
	zeros := append(good(), entry{name: ".stasis/checkpoint/pages-1.img", data: strings.Repeat("\x00", 8<<20)})
	for name, c := range map[string]struct {
		blob      []byte
		mediaType string
		change    func(*ocispec.Manifest)
		says      string
	}{
		"another version":   {layer, ocispec.MediaTypeImageLayer, annotate(AnnotationVersion, "2"), "newer"},
		"no version":        {layer, ocispec.MediaTypeImageLayer, annotate(AnnotationVersion, ""), AnnotationVersion},
		"another layer":     {layer, ocispec.MediaTypeImageLayer, annotate(AnnotationCheckpointLayer, "sha256:0"), "not the one"},
		"no writable layer": {layer, ocispec.MediaTypeImageLayer, annotate(AnnotationWritableLayer, "sha256:0"), "no layer has"},
		"no size":           {layer, ocispec.MediaTypeImageLayer, size(""), "does not tell its size"},
		"negative size":     {layer, ocispec.MediaTypeImageLayer, size("-1"), "does not tell its size"},
		"too large":         {layer, ocispec.MediaTypeImageLayer, size("9000000000000000000"), "larger than is allowed"},
		"bomb":              {compress(t, makeTar(t, zeros...), compression.Zstd), ocispec.MediaTypeImageLayerZstd, size("1000000"), "larger than"},
		"padding":           {compress(t, append(layer[:len(layer):len(layer)], make([]byte, 8<<20)...), compression.Gzip), ocispec.MediaTypeImageLayerGzip, nil, "goes on"},
		"many files":        {makeTar(t, many...), ocispec.MediaTypeImageLayer, nil, "more than"},
		"truncated":         {layer[:len(layer)-2000], ocispec.MediaTypeImageLayer, nil, "no valid tar"},
		"truncated gzip":    {compress(t, makeTar(t, zeros...), compression.Gzip)[:5000], ocispec.MediaTypeImageLayerGzip, nil, "unexpected EOF"},
		"not compressed":    {layer, ocispec.MediaTypeImageLayerZstd, nil, "magic"},
		"unknown type":      {layer, "application/x-tar", nil, "media type"},
		"docker's type":     {layer, images.MediaTypeDockerSchema2LayerGzip, nil, "media type"},
		"wrong layer size":  {layer, ocispec.MediaTypeImageLayer, func(m *ocispec.Manifest) { m.Layers[0].Size++ }, "the manifest says"},
		"bad digest":        {layer, ocispec.MediaTypeImageLayer, func(m *ocispec.Manifest) { m.Layers[0].Digest = "x"; m.Annotations[AnnotationCheckpointLayer] = "x" }, "digest"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			ctx, done := s.leased()
			defer done()
			s.refuse(ctx, s.runnable(ctx, c.blob, c.mediaType, c.change), c.says)
		})
	}
	t.Run("good", func(t *testing.T) {
		s := newStore(t)
		ctx, done := s.leased()
		defer done()
		if _, err := Read(ctx, s, s.runnable(ctx, layer, ocispec.MediaTypeImageLayer, nil), t.TempDir()); err != nil {
			t.Error(err)
		}
	})
}

func TestHostileIndexes(t *testing.T) {
	spec := func(typeURL, value string) []byte {
		data, err := proto.Marshal(&anypb.Any{TypeUrl: typeURL, Value: []byte(value)})
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	fine := spec(specType, "{}")
	flat := makeTar(t, entry{name: "inventory.img", data: "x"})
	for name, c := range map[string]struct {
		tar, spec []byte
		change    func(*ocispec.Index)
		says      string
	}{
		"subfolder":    {makeTar(t, entry{name: "a/", flag: tar.TypeDir}), fine, nil, "not a name"},
		"up":           {makeTar(t, entry{name: "../a.img"}), fine, nil, "not a name"},
		"absolute":     {makeTar(t, entry{name: "/a.img"}), fine, nil, "not a name"},
		"link":         {makeTar(t, entry{name: "a.img", flag: tar.TypeSymlink, link: "/etc/passwd"}), fine, nil, "symbolic link"},
		"twice":        {makeTar(t, entry{name: "a.img"}, entry{name: "./a.img"}), fine, nil, "twice"},
		"no protobuf":  {flat, []byte("\xff\xff"), nil, "protobuf"},
		"another type": {flat, spec("x", "{}"), nil, "of type"},
		"no spec":      {flat, fine, func(i *ocispec.Index) { i.Manifests = i.Manifests[:1] }, "no container's spec"},
		"two":          {flat, fine, func(i *ocispec.Index) { i.Manifests = append(i.Manifests, i.Manifests[0]) }, "2 blobs"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			ctx, done := s.leased()
			defer done()
			index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, Manifests: []ocispec.Descriptor{
				s.put(ctx, images.MediaTypeContainerd1Checkpoint, c.tar),
				s.put(ctx, images.MediaTypeContainerd1CheckpointConfig, c.spec),
			}}
			if c.change != nil {
				c.change(&index)
			}
			data, _ := json.Marshal(index)
			s.refuse(ctx, s.put(ctx, ocispec.MediaTypeImageIndex, data), c.says)
		})
	}
}

// TestAltered flips a bit of the stored layers: reading notices.
func TestAltered(t *testing.T) {
	s := newStore(t)
	ctx, done := s.leased()
	defer done()
	desc, err := WriteRunnable(ctx, s, s.baseImage(), newCapture(t), Options{})
	if err != nil {
		t.Fatal(err)
	}
	var m ocispec.Manifest
	s.get(desc, &m)
	c, err := Read(ctx, s, desc, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	flip := func(d digest.Digest, at int64) {
		t.Helper()
		path := filepath.Join(s.dir, "blobs", "sha256", d.Encoded())
		if err := os.Chmod(path, 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		b := make([]byte, 1)
		if _, err := f.ReadAt(b, at); err != nil {
			t.Fatal(err)
		}
		b[0] ^= 1
		if _, err := f.WriteAt(b, at); err != nil {
			t.Fatal(err)
		}
	}
	flip(m.Layers[1].Digest, 520)
	if err := c.Layer.WriteLayer(ctx, io.Discard); !errdefs.IsInvalidArgument(err) {
		t.Errorf("writable layer: %v", err)
	}
	flip(m.Layers[2].Digest, 3<<20)
	s.refuse(ctx, desc, "is altered")
}

// TestDetect tells checkpoints from what looks like one.
func TestDetect(t *testing.T) {
	s := newStore(t)
	ctx, done := s.leased()
	defer done()
	layers := []ocispec.Descriptor{{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromString("l"), Size: 1}}
	put := func(mediaType string, v any) ocispec.Descriptor {
		data, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return s.put(ctx, mediaType, data)
	}
	manifest := func(as map[string]string) ocispec.Descriptor {
		return put(ocispec.MediaTypeImageManifest, ocispec.Manifest{Layers: layers, Annotations: as})
	}
	index := func(as map[string]string, ms ...ocispec.Descriptor) ocispec.Descriptor {
		return put(ocispec.MediaTypeImageIndex, ocispec.Index{Manifests: ms, Annotations: as})
	}
	plain := manifest(nil)
	missing := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("x"), Size: 1}
	stasis := manifest(map[string]string{AnnotationCheckpoint: "runnable"})
	for name, c := range map[string]struct {
		desc ocispec.Descriptor
		want Format
	}{
		"plain":                     {plain, None},
		"plain index":               {index(nil, plain), None},
		"runnable":                  {stasis, Runnable},
		"runnable, second of two":   {index(nil, plain, missing, stasis), Runnable},
		"podman":                    {manifest(map[string]string{podmanName: "c"}), Podman},
		"CRI-O":                     {manifest(map[string]string{crioName: "c"}), Podman},
		"CRIU, on the index only":   {index(map[string]string{criuName: "c"}, plain), Podman},
		"containerd":                {index(nil, ocispec.Descriptor{MediaType: images.MediaTypeContainerd1Checkpoint}), Index},
		"an unknown kind of ours":   {manifest(map[string]string{AnnotationCheckpoint: "other"}), None},
		"something else altogether": {put("application/json", map[string]string{"a": "b"}), None},
	} {
		if got, err := Detect(ctx, s, c.desc); got != c.want || err != nil {
			t.Errorf("%s: %q, %v; want %q", name, got, err, c.want)
		}
	}
	if _, err := Detect(ctx, s, missing); !errdefs.IsNotFound(err) {
		t.Errorf("content that is missing: %v", err)
	}
	both := put(ocispec.MediaTypeImageManifest, map[string]any{"layers": layers, "manifests": []any{}})
	if _, err := Detect(ctx, s, both); !errdefs.IsInvalidArgument(err) {
		t.Errorf("both manifest and index: %v", err)
	}
}

// TestDirNotEmpty leaves alone what is there.
func TestDirNotEmpty(t *testing.T) {
	s := newStore(t)
	ctx, done := s.leased()
	defer done()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "mine"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	desc := s.runnable(ctx, makeTar(t, good()...), ocispec.MediaTypeImageLayer, nil)
	if _, err := Read(ctx, s, desc, dir); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "mine") {
		t.Errorf("%v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "mine")); err != nil {
		t.Error(err)
	}
}

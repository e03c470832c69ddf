package oci

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/layout"
)

// checkFolder fails if there is anything in dir but plain files of 0600 with
// plain names, of no more than limit bytes together.
func checkFolder(t *testing.T, dir string, limit int64) {
	t.Helper()
	var total int64
	err := filepath.Walk(dir, func(path string, info os.FileInfo, err error) error {
		if err != nil || path == dir {
			return err
		}
		if info.Mode() != 0o600 || filepath.Dir(path) != dir || !plainName(info.Name()) {
			t.Errorf("wrote %q, %v", path, info.Mode())
		}
		total += info.Size()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if total > limit {
		t.Errorf("wrote %d bytes", total)
	}
}

const fuzzLimit = 1 << 20

// FuzzStasisLayer reads anything as the last layer of a runnable image.
func FuzzStasisLayer(f *testing.F) {
	f.Add(makeTar(f, good()...))
	f.Add(makeTar(f, append(good(), entry{name: layout.EmbeddedDevShm, data: "x"})...))
	for name, c := range hostileLayers {
		if name != "large info" {
			f.Add(makeTar(f, c.entries...))
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		parent := t.TempDir()
		dir := filepath.Join(parent, "dir")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		c := &capture.Capture{Images: dir}
		err := unpackStasis(t.Context(), bytes.NewReader(data), c, fuzzLimit)
		if err == nil && (c.Info.Version != capture.InfoVersion || checkSpec(c.Spec) != nil) {
			t.Errorf("accepted %+v, %s", c.Info, c.Spec)
		}
		checkFolder(t, dir, fuzzLimit)
		if c.DevShm != "" {
			_ = os.Remove(filepath.Join(parent, "devshm-checkpoint.tar"))
		}
		if left, err := os.ReadDir(parent); err != nil || len(left) != 1 {
			t.Errorf("wrote outside: %v, %v", left, err)
		}
	})
}

// FuzzFlatLayer reads anything as containerd's tar of CRIU's images.
func FuzzFlatLayer(f *testing.F) {
	f.Add(makeTar(f, entry{name: "inventory.img", data: "x"}, entry{name: "./pages-1.img", data: "y"}))
	f.Add(makeTar(f, entry{name: "../a"}, entry{name: "a/b"}))
	f.Fuzz(func(t *testing.T, data []byte) {
		parent := t.TempDir()
		dir := filepath.Join(parent, "dir")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		_ = unpackFlat(t.Context(), bytes.NewReader(data), dir, fuzzLimit)
		checkFolder(t, dir, fuzzLimit)
		if left, err := os.ReadDir(parent); err != nil || len(left) != 1 {
			t.Errorf("wrote outside: %v, %v", left, err)
		}
	})
}

// FuzzDocument reads anything as a manifest, an index, an image's config, and a
// container's spec.
func FuzzDocument(f *testing.F) {
	f.Add([]byte(`{"manifests":[{"mediaType":"application/vnd.containerd.container.criu.checkpoint.criu.tar"}]}`))
	f.Add([]byte(`{"config":{},"layers":[{}],"annotations":{"stasis.run/checkpoint":"runnable"}}`))
	f.Add([]byte(`{"layers":[{}],"annotations":{"io.podman.annotations.checkpoint.criu.version":"40201","org.criu.checkpoint.container.name":"c"}}`))
	f.Add(baseConfig("sha256:0"))
	spec, _ := proto.Marshal(&anypb.Any{TypeUrl: specType, Value: []byte("{}")})
	f.Add(spec)
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, index := range []bool{true, false} {
			doc, err := decodeDocument(data, index)
			if err != nil {
				continue
			}
			found := recognize(doc, nil)
			_, _ = fromAnnotations(found.annotations), fromForeign(found.annotations)
			if found.format != None && found.format != Index && len(doc.Layers) == 0 {
				t.Errorf("a checkpoint without layers: %s", data)
			}
		}
		if b, err := decodeConfig(data); err == nil && b.config != nil {
			b.dropCheckpoint("")
			if _, err := b.with(time.Unix(1, 0), nil, nil); err != nil {
				t.Error(err)
			}
		}
		_, _ = decodeSpec(data)
	})
}

// FuzzCompressed decompresses anything, as far as a layer may.
func FuzzCompressed(f *testing.F) {
	layer := makeTar(f, good()...)
	f.Add(compress(f, layer, compression.Zstd))
	f.Add(compress(f, layer, compression.Gzip))
	f.Add(layer)
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, mediaType := range layerTypes {
			r, err := decompressor(bytes.NewReader(data), mediaType)
			if err != nil {
				continue
			}
			dir := filepath.Join(t.TempDir(), "dir")
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			_ = unpackStasis(t.Context(), r, &capture.Capture{Images: dir}, fuzzLimit)
			checkFolder(t, dir, fuzzLimit)
			r.Close()
		}
	})
}

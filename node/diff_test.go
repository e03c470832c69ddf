package node

import (
	"archive/tar"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/stasis-run/stasis/checkpoint/capture"
)

// layerOf writes a layer: names with their content; one that ends with a slash
// is a folder.
func layerOf(t testing.TB, files map[string]string) capture.Layer {
	path := filepath.Join(t.TempDir(), "layer.tar")
	f, err := os.Create(path)
	must0(t, err)
	defer f.Close()
	w := tar.NewWriter(f)
	for name, content := range files {
		h := &tar.Header{Name: name, Mode: 0o644, Size: int64(len(content)), Typeflag: tar.TypeReg}
		if name[len(name)-1] == '/' {
			h.Typeflag, h.Mode = tar.TypeDir, 0o755
		}
		must0(t, w.WriteHeader(h))
		_, err := w.Write([]byte(content))
		must0(t, err)
	}
	must0(t, w.Close())
	return capture.FileLayer(path)
}

func TestDiffFiles(t *testing.T) {
	first := layerOf(t, map[string]string{"d/": "", "d/same": "x", "d/changed": "x", "d/gone": "x", "removed-again": "x",
		"d/.wh.back": "", "d/.wh.replaced": "", "d/.wh.deleted": ""})
	second := layerOf(t, map[string]string{"d/": "", "d/same": "x", "d/changed": "y", "d/new": "xyz", ".wh.removed-again": "",
		"d/replaced": "x", "d/.wh.deleted": "", "d/.wh.deleted-now": ""})
	got, err := diffFiles(t.Context(), first, second)
	must0(t, err)
	want := []FileDiff{
		{"/d/back", "added", 0},
		{"/d/changed", "changed", 1},
		{"/d/deleted-now", "deleted", 0},
		{"/d/gone", "deleted", 0},
		{"/d/new", "added", 3},
		{"/d/replaced", "added", 1},
		{"/removed-again", "deleted", 0},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%+v\nwant %+v", got, want)
	}
	if got, err := diffFiles(t.Context(), first, nil); got != nil || err != nil {
		t.Errorf("unknown: %v, %v", got, err)
	}
	broken := filepath.Join(t.TempDir(), "broken")
	must0(t, os.WriteFile(broken, []byte("no tar"), 0o600))
	if _, err := diffFiles(t.Context(), first, capture.FileLayer(broken)); err == nil {
		t.Error("a broken layer is no error")
	}
}

// Whatever a layer holds, it is compared or refused.
func FuzzReadLayer(f *testing.F) {
	for _, files := range []map[string]string{{"a": "x", "d/": "", "d/.wh.b": ""}, {}} {
		data, err := os.ReadFile(string(layerOf(f, files).(capture.FileLayer)))
		must0(f, err)
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		path := filepath.Join(t.TempDir(), "layer.tar")
		must0(t, os.WriteFile(path, data, 0o600))
		diffs, err := diffFiles(t.Context(), capture.FileLayer(path), capture.FileLayer(path))
		if err == nil && len(diffs) != 0 {
			t.Errorf("a layer differs from itself: %+v", diffs)
		}
	})
}

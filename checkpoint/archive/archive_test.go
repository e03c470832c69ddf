package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/errdefs"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/layout"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// member is an entry of a tar.
type member struct {
	name string
	data string
	hdr  tar.Header // Size and Name are set
}

func file(name, data string) member { return member{name: name, data: data} }

func link(name string, typeflag byte, target string) member {
	return member{name: name, hdr: tar.Header{Typeflag: typeflag, Linkname: target}}
}

// tarOf returns a tar.
func tarOf(t testing.TB, members ...member) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, m := range members {
		m.hdr.Name, m.hdr.Size = m.name, int64(len(m.data))
		if m.hdr.Mode == 0 {
			m.hdr.Mode = 0o600
		}
		must(t, w.WriteHeader(&m.hdr))
		_, err := w.Write([]byte(m.data))
		must(t, err)
	}
	must(t, w.Close())
	return buf.Bytes()
}

// list returns what is in a tar, by name, folders with their modes.
func list(t testing.TB, data []byte) map[string]string {
	t.Helper()
	got := map[string]string{}
	for r := tar.NewReader(bytes.NewReader(data)); ; {
		hdr, err := r.Next()
		if errors.Is(err, io.EOF) {
			return got
		}
		must(t, err)
		content, err := io.ReadAll(r)
		must(t, err)
		if _, ok := got[hdr.Name]; ok {
			t.Errorf("%s is there twice", hdr.Name)
		}
		if hdr.Typeflag == tar.TypeDir {
			content = []byte(hdr.FileInfo().Mode().String())
		}
		got[hdr.Name] = string(content)
	}
}

func compress(t testing.TB, data []byte, c compression.Compression) []byte {
	t.Helper()
	var buf bytes.Buffer
	w, err := compressor(&buf, c)
	must(t, err)
	_, err = w.Write(data)
	must(t, err)
	must(t, w.Close())
	return buf.Bytes()
}

func layerOf(t testing.TB, l capture.Layer) []byte {
	t.Helper()
	if l == nil {
		t.Fatal("no layer")
	}
	var buf bytes.Buffer
	must(t, l.WriteLayer(t.Context(), &buf))
	return buf.Bytes()
}

// images makes a folder of CRIU's images.
func images(t testing.TB) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "images")
	must(t, os.CopyFS(dir, os.DirFS(filepath.Join("..", "testdata", "runc-sleep"))))
	must(t, os.WriteFile(filepath.Join(dir, layout.DumpStats), []byte("stats"), 0o600))
	must(t, os.WriteFile(filepath.Join(dir, layout.DumpLog), []byte("log"), 0o600))
	return dir
}

const digest1, digest2 = "sha256:" + "1111111111111111111111111111111111111111111111111111111111111111",
	"sha256:" + "2222222222222222222222222222222222222222222222222222222222222222"

func sample(t testing.TB) *capture.Capture {
	layer := filepath.Join(t.TempDir(), "layer.tar")
	must(t, os.WriteFile(layer, tarOf(t,
		member{name: "./", hdr: tar.Header{Typeflag: tar.TypeDir, Mode: 0o711}},
		member{name: "etc/", hdr: tar.Header{Typeflag: tar.TypeDir, Mode: 0o755}},
		file("etc/.wh.group", ""),
		file("etc/new", "new"),
		file(".wh.old", ""),
	), 0o600))
	return &capture.Capture{
		Info: capture.Info{
			Version: 1, ContainerID: "id", ContainerName: "name", Namespace: "ns",
			Pod: &capture.Pod{Name: "pod", Namespace: "podns", UID: "uid", ID: "podid"},
			Base: capture.Base{
				Name: "docker.io/library/redis:7", Digest: digest1, Config: digest2, Snapshotter: "overlayfs",
			},
			Runtime:      "io.containerd.stasis.v1",
			OCIRuntime:   capture.Program{Name: "crun", Version: "1.21"},
			Engine:       capture.Program{Name: "stasis", Version: "1"},
			CRIU:         "4.2.1",
			Host:         capture.Host{Architecture: "amd64", Kernel: "6.1", CgroupV2: true},
			Created:      time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC),
			Checkpointed: time.Date(2026, 1, 2, 4, 4, 5, 6, time.UTC),
			Labels:       map[string]string{"a": "b"},
			Stats:        &capture.Stats{Frozen: time.Second, ImageBytes: 3, LayerBytes: 4},
		},
		Spec:   json.RawMessage(`{"annotations":{"key":"value"},"future":{"x":[1.50]},"ociVersion":"1.2.0"}`),
		Images: images(t),
		Layer:  capture.FileLayer(layer),
	}
}

func write(t testing.TB, c *capture.Capture, comp compression.Compression) []byte {
	t.Helper()
	var buf bytes.Buffer
	must(t, Write(t.Context(), &buf, c, comp))
	return buf.Bytes()
}

// What is written is read again, whatever the compression.
func TestRoundTrip(t *testing.T) {
	for name, comp := range map[string]compression.Compression{
		"none": compression.Uncompressed, "gzip": compression.Gzip, "zstd": compression.Zstd,
	} {
		t.Run(name, func(t *testing.T) {
			want := sample(t)
			data := write(t, want, comp)
			if again := write(t, want, comp); !bytes.Equal(data, again) {
				t.Error("two archives of the same capture differ")
			}
			if got := compression.DetectCompression(data); got != comp {
				t.Errorf("compression %v", got)
			}
			dir := filepath.Join(t.TempDir(), "out")
			got, err := Read(t.Context(), bytes.NewReader(data), dir, Limits{})
			must(t, err)
			if !reflect.DeepEqual(got.Info, want.Info) {
				t.Errorf("info\n%+v, want\n%+v", got.Info, want.Info)
			}
			if string(got.Spec) != `{"annotations":{"key":"value"},"future":{"x":[1.50]},"ociVersion":"1.2.0"}` {
				t.Errorf("spec %s", got.Spec)
			}
			sameFolder(t, got.Images, want.Images)
			if a, b := list(t, layerOf(t, got.Layer)), list(t, layerOf(t, want.Layer)); !reflect.DeepEqual(a, b) {
				t.Errorf("layer %v, want %v", a, b)
			}
			conf, err := ReadConfig(t.Context(), bytes.NewReader(data), Limits{})
			must(t, err)
			if !reflect.DeepEqual(conf.Info, got.Info) || string(conf.Spec) != string(got.Spec) {
				t.Errorf("configuration %+v", conf)
			}
			if runtime, err := ReadRuntime(t.Context(), bytes.NewReader(data), Limits{}); err != nil || runtime != "crun" {
				t.Errorf("runtime %q, %v", runtime, err)
			}
			for path, mode := range map[string]os.FileMode{dir: 0o700, got.Images: 0o700, filepath.Join(dir, layout.Layer): 0o600} {
				if info, err := os.Stat(path); err != nil || info.Mode().Perm() != mode {
					t.Errorf("%s: %v, %v", path, info.Mode(), err)
				}
			}
		})
	}
}

func sameFolder(t *testing.T, got, want string) {
	t.Helper()
	read := func(dir string) map[string]string {
		files := map[string]string{}
		entries, err := os.ReadDir(dir)
		must(t, err)
		for _, e := range entries {
			data, err := os.ReadFile(filepath.Join(dir, e.Name()))
			must(t, err)
			files[e.Name()] = string(data)
		}
		return files
	}
	if a, b := read(got), read(want); !reflect.DeepEqual(a, b) {
		t.Errorf("the files in %s differ from those in %s", got, want)
	}
}

// What other programs find in ours.
func TestWritten(t *testing.T) {
	files := list(t, write(t, sample(t), compression.Uncompressed))
	var config map[string]any
	must(t, json.Unmarshal([]byte(files[configName]), &config))
	for key, want := range map[string]any{
		"id": "id", "name": "name", "runtime": "crun",
		"rootfsImage":      "docker.io/library/redis:7",
		"rootfsImageName":  "docker.io/library/redis:7",
		"rootfsImageRef":   "docker.io/library/redis@" + digest1,
		"rootfsImageID":    strings.TrimPrefix(digest2, "sha256:"),
		"createdTime":      "2026-01-02T03:04:05.000000006Z",
		"checkpointedTime": "2026-01-02T04:04:05.000000006Z",
	} {
		if config[key] != want {
			t.Errorf("%s: %q, want %q", key, config[key], want)
		}
	}
	var deleted []string
	must(t, json.Unmarshal([]byte(files[deletedName]), &deleted))
	if !reflect.DeepEqual(deleted, []string{"/etc/group", "/old"}) {
		t.Errorf("deleted files %v", deleted)
	}
	changed := list(t, []byte(files[filesName]))
	if want := map[string]string{"/": "drwx--x--x", "./": "drwx--x--x", "etc/": "drwxr-xr-x", "etc/new": "new"}; !reflect.DeepEqual(changed, want) {
		t.Errorf("changed files %v, want %v", changed, want)
	}
	if files["stats-dump"] != "stats" || files["dump.log"] != "log" {
		t.Error("CRIU's statistics or log are not where they should be")
	}
	for name := range files {
		if strings.HasPrefix(name, "checkpoint/") && strings.HasSuffix(name, ".log") {
			t.Errorf("%s is among the images", name)
		}
	}
	var spec struct{ Annotations map[string]string }
	must(t, json.Unmarshal([]byte(files[specName]), &spec))
	if spec.Annotations[criContainer] != "name" || spec.Annotations["key"] != "value" {
		t.Errorf("annotations %v", spec.Annotations)
	}
}

// A capture without a layer has the root folder that CRIU's images tell of.
func TestWrittenWithoutLayer(t *testing.T) {
	c := sample(t)
	c.Layer = nil
	files := list(t, write(t, c, compression.Uncompressed))
	if got := list(t, []byte(files[filesName])); !reflect.DeepEqual(got, map[string]string{"/": "drwxr-xr-x"}) {
		t.Errorf("changed files %v", got)
	}
	if _, ok := files[deletedName]; ok {
		t.Error("a list of deleted files")
	}
}

func TestWriteCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Write(ctx, io.Discard, sample(t), compression.Uncompressed); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
}

func TestWriteRefuses(t *testing.T) {
	for name, spoil := range map[string]func(c *capture.Capture) error{
		"a link among the images": func(c *capture.Capture) error { return os.Symlink("/etc/passwd", filepath.Join(c.Images, "x.img")) },
		"a spec that is none":     func(c *capture.Capture) error { c.Spec = json.RawMessage("[]"); return nil },
	} {
		c := sample(t)
		must(t, spoil(c))
		if err := Write(t.Context(), io.Discard, c, compression.Uncompressed); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: error %v", name, err)
		}
	}
}

package checkpoint

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stasis-run/stasis/checkpoint/criu/img/imgtest"
	"github.com/stasis-run/stasis/checkpoint/layout"
)

// A manifest that is accepted is written and read again without a difference.
func FuzzManifest(f *testing.F) {
	f.Add([]byte(goodManifest))
	f.Add([]byte(strings.Replace(goodManifest, `"version":1`, `"version":4`, 1)))
	f.Add([]byte(strings.Replace(strings.Replace(goodManifest, `"version":1`, `"version":3`, 1), "sha256:", "blake3:", 1)))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := decodeManifest(data)
		if err != nil {
			return
		}
		for _, file := range m.Files {
			if filepath.Base(file.Name) != file.Name || strings.HasPrefix(file.Name, ".") {
				t.Fatalf("accepted the name %q", file.Name)
			}
		}
		out, err := m.encode()
		must(t, err)
		again, err := decodeManifest(out)
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		second, err := again.encode()
		must(t, err)
		if !bytes.Equal(out, second) {
			t.Fatalf("%s\n%s", out, second)
		}
	})
}

// Whatever one of a checkpoint's images holds, Open neither panics nor hangs.
func FuzzDerive(f *testing.F) {
	targets := []string{layout.Inventory, layout.ProcessTree, "core-1.img", layout.Files, "pagemap-1.img", layout.FileLocks, layout.Terminals}
	for i, name := range targets {
		paths, err := filepath.Glob(filepath.Join("testdata", "*", name))
		must(f, err)
		for _, path := range paths {
			data, err := os.ReadFile(path)
			must(f, err)
			f.Add(uint8(i), data)
		}
	}
	dir := realFolder(f, "runc-terminal")
	write(f, filepath.Join(dir, layout.FileLocks), imgtest.Encode(f, "FILE_LOCKS"))
	f.Fuzz(func(t *testing.T, target uint8, data []byte) {
		name := targets[int(target)%len(targets)]
		path := filepath.Join(dir, name)
		good, err := os.ReadFile(path)
		must(t, err)
		defer write(t, path, good)
		write(t, path, data)
		ckpt, err := Open(t.Context(), dir)
		if err != nil {
			if !strings.HasPrefix(err.Error(), "checkpoint "+dir+": ") {
				t.Fatal(err)
			}
			return
		}
		addrs, err := ckpt.EstablishedTCP()
		if err != nil || ckpt.Options().OpenTCP != (len(addrs) > 0) {
			t.Fatalf("options %+v, addresses %v, %v", ckpt.Options(), addrs, err)
		}
	})
}

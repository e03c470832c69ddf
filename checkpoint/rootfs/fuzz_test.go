package rootfs

import (
	"archive/tar"
	"bytes"
	"context"
	"io"
	"path"
	"strings"
	"testing"
)

// fuzzLimits keep what a fuzzer finds small.
var fuzzLimits = limits{entries: 100, content: 1 << 20, names: 1 << 16}

func layerSeeds(f *testing.F) [][]byte {
	return [][]byte{
		tarOf(f, header{name: "./", kind: dir}, header{name: "etc/", kind: dir}, header{name: "etc/.wh.motd", kind: file}, header{name: "etc/x", kind: file, content: "1"}),
		tarOf(f, header{name: "l", kind: symlink, content: "../outside"}, header{name: "l/secret", kind: file, content: "1"}),
		tarOf(f, header{name: "etc/.wh..wh..opq", kind: file}, header{name: "x", kind: hard, content: "etc/passwd"}),
		tarOf(f, header{name: "p", kind: tar.TypeFifo}, header{name: "d", kind: tar.TypeBlock, change: func(hdr *tar.Header) { hdr.Devmajor = unusedMajor }}),
		tarOf(f, header{name: "\xff", kind: file, content: "1", change: record("SCHILY.xattr.user.x", "\x00")}),
		tarOf(f, header{name: "e", kind: dir, change: record(completeRecord, completeValue)}, header{name: "../outside/x", kind: file}),
		[]byte("not a tar"),
	}
}

// Whatever the layer, nothing outside of the root is changed.
func FuzzApply(f *testing.F) {
	for _, seed := range layerSeeds(f) {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		j := newJail(t)
		apply(context.Background(), j.root, bytes.NewReader(data), fuzzLimits)
		j.intact()
	})
}

// Whatever the layer, what comes of it has no whiteouts, can be read, and joined
// again.
func FuzzSplitDeleted(f *testing.F) {
	for _, seed := range layerSeeds(f) {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if claims(data) {
			return
		}
		var files bytes.Buffer
		deleted, err := SplitDeleted(bytes.NewReader(data), &files)
		if err != nil {
			return
		}
		for tr := tar.NewReader(bytes.NewReader(files.Bytes())); ; {
			hdr, err := tr.Next()
			if err == io.EOF {
				break
			}
			must(t, err)
			if strings.HasPrefix(path.Base(hdr.Name), whiteoutPrefix) {
				t.Fatalf("whiteout %q", hdr.Name)
			}
		}
		var layer, again bytes.Buffer
		must(t, JoinDeleted(bytes.NewReader(files.Bytes()), deleted, &layer))
		if _, err := SplitDeleted(bytes.NewReader(layer.Bytes()), &again); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(files.Bytes(), again.Bytes()) {
			t.Fatal("split, joined and split, the files are different")
		}
	})
}

// Whatever the tar and the list, the layer that comes of it is one that Apply
// reads.
func FuzzJoinDeleted(f *testing.F) {
	for _, seed := range layerSeeds(f) {
		f.Add(seed, "/etc/passwd\n/x\netc/motd")
		f.Add(seed, "../outside\n/")
	}
	f.Fuzz(func(t *testing.T, data []byte, list string) {
		if claims(data) {
			return
		}
		var layer bytes.Buffer
		if err := JoinDeleted(bytes.NewReader(data), strings.Split(list, "\n"), &layer); err != nil {
			return
		}
		for g := newGuard(&layer, defaultLimits); ; {
			if _, err := g.next(); err == io.EOF {
				return
			} else if err != nil {
				t.Fatal(err)
			}
		}
	})
}

// claims tells that a tar says of its files that they are large, holes counted: it
// would be written out.
func claims(data []byte) bool {
	var size int64
	for tr := tar.NewReader(bytes.NewReader(data)); ; {
		hdr, err := tr.Next()
		if err != nil {
			return false
		}
		if size += hdr.Size; hdr.Size > 1<<20 || size > 1<<20 {
			return true
		}
	}
}

package contentstore

import (
	"bytes"
	"context"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/introspection"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// Folder is the folder of containerd's content store. The zero value is none.
type Folder struct{ path string }

// At is the folder at a path. An empty path is none.
func At(path string) Folder { return Folder{path} }

// Find asks containerd for the folder of its content store. What cannot be found is none.
func Find(ctx context.Context, plugins introspection.Service) Folder {
	list, err := plugins.Plugins(ctx, "type==io.containerd.content.v1")
	if err != nil {
		return Folder{}
	}
	for _, p := range list.Plugins {
		if path := p.Exports["root"]; path != "" {
			return Folder{path}
		}
	}
	return Folder{}
}

// Path is where the folder is, or empty. If the store is on another host, there need not
// be anything.
func (f Folder) Path() string { return f.path }

// Usable tells whether uploads may be written into the folder. Whether one can is known
// when it has begun: see Upload.InFolder.
func (f Folder) Usable() bool { return f.path != "" }

// openUpload opens the file of a new upload, or returns nil. A store that is shared by
// namespaces puts something before the name that it was given.
func (f Folder) openUpload(ref string) *os.File {
	if f.path == "" {
		return nil
	}
	uploads, err := filepath.Glob(filepath.Join(f.path, "ingest", "*", "ref"))
	if err != nil {
		return nil
	}
	for _, path := range uploads {
		if data, err := os.ReadFile(path); err != nil || !bytes.HasSuffix(data, []byte(ref)) {
			continue
		}
		file, err := os.OpenFile(filepath.Join(filepath.Dir(path), "data"), os.O_WRONLY|unix.O_NOFOLLOW, 0)
		if err != nil {
			return nil
		}
		if info, err := file.Stat(); err != nil || !info.Mode().IsRegular() || info.Size() != 0 {
			file.Close()
			return nil
		}
		return file
	}
	return nil
}

// blob is the path of a blob.
func (f Folder) blob(d digest.Digest) string {
	return filepath.Join(f.path, "blobs", d.Algorithm().String(), d.Encoded())
}

package contentstore

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"regexp"

	"github.com/containerd/containerd/v2/core/introspection"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// Folder is the folder of containerd's content store. The zero value is none.
type Folder struct {
	path  string
	known bool // its layout is the one in the package's comment
}

// layoutKnown matches the versions of containerd whose layout is known. Distributions
// add to a version: 1.7.24~ds1, v2.1.4-k3s2. A build without a tag has no number.
var layoutKnown = regexp.MustCompile(`^v?[12]\.[0-9]+([-+~.].*)?$`)

// At is the folder at a path, of a containerd of some version. An empty path is none.
func At(path, version string) Folder {
	return Folder{path, path != "" && layoutKnown.MatchString(version)}
}

// Find asks containerd for the folder of its content store. version is what containerd's
// Version service says, or empty if that is not known. What cannot be found is none.
func Find(ctx context.Context, version string, plugins introspection.Service) Folder {
	list, err := plugins.Plugins(ctx, "type==io.containerd.content.v1")
	if err != nil {
		return Folder{}
	}
	for _, p := range list.Plugins {
		path := p.Exports["root"]
		if path == "" {
			continue
		}
		if p.ID != "content" { // a proxy: containerd's version says nothing of its layout
			version = ""
		}
		return At(path, version)
	}
	return Folder{}
}

// Path is where the folder is, or empty. If the store is on another host, there need not
// be anything.
func (f Folder) Path() string { return f.path }

// Usable tells whether uploads may be written into the folder. Whether one can is known
// when it has begun: see Upload.InFolder.
func (f Folder) Usable() bool { return f.known }

// openUpload opens the file of a new upload, or returns nil. A store that is shared by
// namespaces puts something before the name that it was given.
func (f Folder) openUpload(ref string) *os.File {
	if !f.known {
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

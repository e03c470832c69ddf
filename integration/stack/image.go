package stack

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ispecs "github.com/opencontainers/image-spec/specs-go"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Names of images that Image and NewContainer know how to make.
const (
	Busybox = "stasis.test/busybox:latest"
	Redis   = "stasis.test/redis:latest"
	Python  = "stasis.test/python:latest"
	Nginx   = "stasis.test/nginx:latest"
	Java    = "stasis.test/java:latest"
	Node    = "stasis.test/node:latest"
	// Probe is Busybox with the program of integration/probe as /probe.
	Probe = "stasis.test/probe:latest"
	// Pause is what the sandboxes of pods run: Busybox, asleep.
	Pause = "stasis.test/pause:latest"
)

// Image returns the image of the given name, in the namespace of ctx and
// unpacked. If it is one of the names above, it is imported at first use.
func (s *Stack) Image(ctx context.Context, name string) client.Image {
	s.tb.Helper()
	img, err := s.client.GetImage(ctx, name)
	if err == nil {
		return img
	} else if !errdefs.IsNotFound(err) {
		s.tb.Fatalf("image %s: %v", name, err)
	}
	switch name {
	case Busybox, Pause:
		return s.ImportRootfs(ctx, name, Rootfs("busybox"))
	case Redis, Python, Nginx, Java, Node:
		return s.ImportRootfs(ctx, name, Rootfs(strings.TrimSuffix(strings.TrimPrefix(name, "stasis.test/"), ":latest")))
	case Probe:
		probe, err := TestProgram("probe")
		if err != nil {
			s.tb.Fatalf("image %s: %v", name, err)
		}
		return s.ImportRootfs(ctx, name, Rootfs("busybox"), filepath.Dir(probe))
	}
	s.tb.Fatalf("image %s: not found", name)
	return nil
}

// Rootfs is the folder of a root filesystem in the cache: "busybox", "redis",
// "python", "nginx", "java" or "node".
func Rootfs(name string) string { return filepath.Join(cacheDir(), "rootfs", name) }

// ImportRootfs makes an image with one layer of each of the folders, imports
// it, and unpacks it. The image itself is cached on disk.
func (s *Stack) ImportRootfs(ctx context.Context, name string, dirs ...string) client.Image {
	s.tb.Helper()
	img, err := s.importRootfs(ctx, name, dirs)
	if err != nil {
		s.tb.Fatalf("import image %s: %v", name, err)
	}
	return img
}

func (s *Stack) importRootfs(ctx context.Context, name string, dirs []string) (client.Image, error) {
	f, err := openArchive(name, dirs)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	imgs, err := s.client.Import(ctx, f)
	if err != nil {
		return nil, err
	}
	img := client.NewImage(s.client, imgs[0])
	return img, img.Unpack(ctx, s.opts.Snapshotter)
}

// openArchive opens the OCI archive of an image, which it makes if there is
// none yet or the folders have changed since.
func openArchive(name string, dirs []string) (*os.File, error) {
	key := sha256.New()
	fmt.Fprintln(key, name)
	for _, dir := range dirs {
		if err := stampDir(key, dir); err != nil {
			return nil, fmt.Errorf("%w: run contrib/setup.sh", err)
		}
	}
	cache := filepath.Join(cacheDir(), "images")
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return nil, err
	}
	prefix := digest.FromString(name).Encoded()[:12] + "-"
	path := filepath.Join(cache, prefix+hex.EncodeToString(key.Sum(nil)[:8])+".tar")
	if f, err := os.Open(path); err == nil {
		return f, nil
	}
	f, err := os.CreateTemp(cache, ".new-")
	if err != nil {
		return nil, err
	}
	err = writeArchive(f, name, dirs)
	if err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err == nil {
		// The image's older versions; who reads one has it open.
		old, _ := filepath.Glob(filepath.Join(cache, prefix+"*"))
		for _, o := range old {
			os.Remove(o)
		}
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
		f.Close()
		return nil, err
	}
	return f, nil
}

// stampDir writes to w what changes if anything in the folder does.
func stampDir(w io.Writer, dir string) error {
	return filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		fmt.Fprintln(w, p, info.Mode(), info.Size(), info.ModTime().UnixNano())
		return nil
	})
}

// writeArchive writes an OCI archive: a tar of an OCI image layout.
func writeArchive(w io.Writer, name string, dirs []string) error {
	config := imagespec.Image{
		Platform: imagespec.Platform{Architecture: runtime.GOARCH, OS: "linux"},
		Config: imagespec.ImageConfig{
			Env:        []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
			Cmd:        []string{"/bin/sh"},
			WorkingDir: "/",
		},
		RootFS: imagespec.RootFS{Type: "layers"},
	}
	manifest := imagespec.Manifest{
		Versioned: ispecs.Versioned{SchemaVersion: 2},
		MediaType: imagespec.MediaTypeImageManifest,
	}
	if name == Pause {
		config.Config.Cmd = []string{"/bin/sleep", "infinity"}
	}
	archive := &archiveWriter{tar.NewWriter(w)}
	for _, dir := range dirs {
		desc, err := archive.layer(dir)
		if err != nil {
			return err
		}
		manifest.Layers = append(manifest.Layers, desc)
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, desc.Digest)
	}
	var err error
	if manifest.Config, err = archive.json(imagespec.MediaTypeImageConfig, config); err != nil {
		return err
	}
	index := imagespec.Index{Versioned: manifest.Versioned, MediaType: imagespec.MediaTypeImageIndex}
	desc, err := archive.json(imagespec.MediaTypeImageManifest, manifest)
	if err != nil {
		return err
	}
	desc.Platform = &config.Platform
	desc.Annotations = map[string]string{images.AnnotationImageName: name}
	index.Manifests = []imagespec.Descriptor{desc}
	b, err := json.Marshal(index)
	if err != nil {
		return err
	}
	if err := archive.file(imagespec.ImageIndexFile, b); err != nil {
		return err
	}
	if err := archive.file(imagespec.ImageLayoutFile, []byte(`{"imageLayoutVersion":"1.0.0"}`)); err != nil {
		return err
	}
	return archive.Close()
}

type archiveWriter struct{ *tar.Writer }

// layer adds a folder as an uncompressed layer.
func (a *archiveWriter) layer(dir string) (imagespec.Descriptor, error) {
	// Its name is its digest, so it must be written twice.
	f, err := os.CreateTemp("", "stasis-layer-")
	if err != nil {
		return imagespec.Descriptor{}, err
	}
	defer f.Close()
	defer os.Remove(f.Name())
	sum := sha256.New()
	layer := tar.NewWriter(io.MultiWriter(f, sum))
	if err := layer.AddFS(os.DirFS(dir)); err != nil {
		return imagespec.Descriptor{}, err
	}
	if err := layer.Close(); err != nil {
		return imagespec.Descriptor{}, err
	}
	size, err := f.Seek(0, io.SeekCurrent)
	if err != nil {
		return imagespec.Descriptor{}, err
	}
	desc := imagespec.Descriptor{
		MediaType: imagespec.MediaTypeImageLayer,
		Digest:    digest.NewDigest(digest.SHA256, sum),
		Size:      size,
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return imagespec.Descriptor{}, err
	}
	if err := a.WriteHeader(&tar.Header{Name: blobPath(desc.Digest), Mode: 0o644, Size: size}); err != nil {
		return imagespec.Descriptor{}, err
	}
	_, err = io.Copy(a, f)
	return desc, err
}

// json adds a value as a blob.
func (a *archiveWriter) json(mediaType string, v any) (imagespec.Descriptor, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return imagespec.Descriptor{}, err
	}
	desc := imagespec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	return desc, a.file(blobPath(desc.Digest), b)
}

func (a *archiveWriter) file(name string, b []byte) error {
	if err := a.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(b))}); err != nil {
		return err
	}
	_, err := a.Write(b)
	return err
}

func blobPath(d digest.Digest) string { return "blobs/sha256/" + d.Encoded() }

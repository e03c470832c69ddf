package oci

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/contentstore"
	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/tarcheck"
)

// maxLayoutVersion bounds the file oci-layout, in bytes.
const maxLayoutVersion = 4 << 10

// ReadLayout reads images in an OCI layout from a tar, which is not compressed, into
// the store, and returns what its index.json lists. ctx has a lease. The blobs
// together may have limit bytes; more gives an error that matches
// capture.ErrTooLarge.
//
// containerd's importer is not used: it reads JSON of any size into memory, and
// stores whatever stands in the tar.
func ReadLayout(ctx context.Context, store content.Store, r io.Reader, limit int64) ([]ocispec.Descriptor, error) {
	list, err := readLayout(ctx, store, r, limit)
	if err != nil {
		return nil, fmt.Errorf("read the OCI layout in a tar: %w", err)
	}
	return list, nil
}

func readLayout(ctx context.Context, store content.Store, r io.Reader, limit int64) ([]ocispec.Descriptor, error) {
	scan := tarcheck.NewReader(capture.NewReader(ctx, r), nil)
	tr := tar.NewReader(scan)
	seen := map[string]bool{}
	left := limit
	var index, version []byte
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, badTar(err)
		}
		name := path.Clean(h.Name)
		if seen[name] && h.Typeflag != tar.TypeDir {
			return nil, fault.Invalid("%q: twice", name)
		}
		if seen[name] = true; len(seen) > maxBlobs {
			return nil, fault.Invalid("more than %d files", maxBlobs)
		}
		if h.Typeflag != tar.TypeReg {
			continue // links are of Docker's layout
		}
		left -= h.Size
		switch {
		case name == ocispec.ImageIndexFile:
			index, err = smallFile(tr, h, maxDocument)
		case name == ocispec.ImageLayoutFile:
			version, err = smallFile(tr, h, maxLayoutVersion)
		case left < 0:
			return nil, capture.TooLarge(name, limit)
		case strings.HasPrefix(name, ocispec.ImageBlobsDir+"/"):
			err = readLayoutBlob(ctx, store, name, h.Size, tr)
		}
		if err != nil {
			return nil, named(name, badTar(err))
		}
	}
	if err := scan.Finish(); err != nil {
		return nil, badTar(err)
	}
	if version == nil || index == nil {
		return nil, fault.Invalid("there is no %s or no %s in it", ocispec.ImageLayoutFile, ocispec.ImageIndexFile)
	}
	doc, err := decodeDocument(index, true)
	if err != nil {
		return nil, named(ocispec.ImageIndexFile, err)
	}
	if len(doc.Manifests) > maxManifests {
		return nil, fault.Invalid("%s lists %d images; at most %d are read", ocispec.ImageIndexFile, len(doc.Manifests), maxManifests)
	}
	return doc.Manifests, nil
}

func smallFile(r io.Reader, h *tar.Header, limit int64) ([]byte, error) {
	if h.Size > limit {
		return nil, fault.Invalid("%d bytes; at most %d are read", h.Size, limit)
	}
	return io.ReadAll(r)
}

// readLayoutBlob stores a blob, which has its digest for a name.
func readLayoutBlob(ctx context.Context, store content.Store, name string, size int64, r io.Reader) error {
	algorithm, encoded, _ := strings.Cut(strings.TrimPrefix(name, ocispec.ImageBlobsDir+"/"), "/")
	d := digest.NewDigestFromEncoded(digest.Algorithm(algorithm), encoded)
	if err := d.Validate(); err != nil {
		return fault.Invalid("not the name of a blob: %v", err)
	}
	desc := ocispec.Descriptor{Digest: d, Size: size}
	err := content.WriteBlob(ctx, store, contentstore.NewRef(), r, desc)
	if errdefs.IsFailedPrecondition(err) { // of containerd, for another digest
		return fault.Invalid("it is altered: %v", err)
	}
	return err
}

// Keep sets the labels by which containerd keeps what an image consists of as long as
// the image. What is not here of an index is passed over.
func Keep(ctx context.Context, store content.Store, desc ocispec.Descriptor) error {
	seen := map[digest.Digest]bool{}
	label := images.SetChildrenLabels(store, func(ctx context.Context, desc ocispec.Descriptor) ([]ocispec.Descriptor, error) {
		doc, err := readDocument(ctx, store, desc)
		children := doc.Manifests
		if doc.Config != nil {
			children = append(children, *doc.Config)
		}
		children = append(children, doc.Layers...)
		if len(children) > maxBlobs {
			return nil, fault.Invalid("%s lists %d blobs; at most %d are kept", desc.Digest, len(children), maxBlobs)
		}
		return children, err
	})
	var walk func(desc ocispec.Descriptor, top bool) error
	walk = func(desc ocispec.Descriptor, top bool) error {
		// Not images.Walk, which goes through what is listed twice as often.
		if seen[desc.Digest] || !images.IsIndexType(desc.MediaType) && !images.IsManifestType(desc.MediaType) {
			return nil
		}
		if seen[desc.Digest] = true; len(seen) > maxBlobs {
			return fault.Invalid("an image of more than %d manifests", maxBlobs)
		}
		children, err := label(ctx, desc)
		if errdefs.IsNotFound(err) && !top {
			return nil
		}
		if err != nil {
			return fmt.Errorf("label %s: %w", desc.Digest, err)
		}
		for _, child := range children {
			if err := walk(child, false); err != nil {
				return err
			}
		}
		return nil
	}
	return walk(desc, true)
}

package oci

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/fault"
)

// Format is what kind of image a checkpoint is.
type Format string

const (
	// None is an image that is no checkpoint.
	None     Format = ""
	Runnable Format = "runnable"
	Index    Format = "index"
	Podman   Format = "podman"
)

// Detect tells what format of a checkpoint an image has. It reads indexes and
// manifests only. An image that is no checkpoint is None, without an error; if
// its content is not in the store, the error matches errdefs.ErrNotFound.
func Detect(ctx context.Context, store content.Provider, desc ocispec.Descriptor) (Format, error) {
	f, err := find(ctx, store, desc)
	if err != nil {
		return None, err
	}
	return f.format, nil
}

// document is an index or a manifest.
type document struct {
	Manifests   []ocispec.Descriptor `json:"manifests"`
	Config      *ocispec.Descriptor  `json:"config"`
	Layers      []ocispec.Descriptor `json:"layers"`
	Annotations map[string]string    `json:"annotations"`
}

// found is a checkpoint in an image.
type found struct {
	format Format
	// doc is the index of the format Index, else the manifest.
	doc document
	// annotations are those of the index, if there is one, and of the manifest.
	annotations map[string]string
}

// find looks for a checkpoint in an image, in whatever manifest of an index.
func find(ctx context.Context, store content.Provider, desc ocispec.Descriptor) (found, error) {
	top, err := readDocument(ctx, store, desc)
	if err != nil {
		return found{}, err
	}
	if f := recognize(top, nil); f.format != None || !images.IsIndexType(desc.MediaType) {
		return f, nil
	}
	for i, child := range top.Manifests {
		if i == maxManifests {
			break
		}
		if !images.IsManifestType(child.MediaType) {
			continue
		}
		doc, err := readDocument(ctx, store, child)
		if errdefs.IsNotFound(err) {
			continue // of another platform, and not pulled
		}
		if err != nil {
			return found{}, err
		}
		if f := recognize(doc, top.Annotations); f.format != None {
			return f, nil
		}
	}
	return found{}, nil
}

// recognize tells what a document is, under an index with the annotations
// above.
func recognize(doc document, above map[string]string) found {
	f := found{doc: doc, annotations: maps.Clone(above)}
	if f.annotations == nil {
		f.annotations = map[string]string{}
	}
	maps.Copy(f.annotations, doc.Annotations)
	switch {
	case doc.one(images.MediaTypeContainerd1Checkpoint) != nil:
		f.format = Index
	case len(doc.Layers) == 0:
	case doc.Annotations[AnnotationCheckpoint] == string(Runnable):
		f.format = Runnable
	case has(f.annotations, criuName, podmanName, crioName):
		f.format = Podman
	}
	return f
}

func has(as map[string]string, keys ...string) bool {
	return slices.ContainsFunc(keys, func(key string) bool { _, ok := as[key]; return ok })
}

// one returns the first descriptor of a media type in an index, or nil.
func (d document) one(mediaType string) *ocispec.Descriptor {
	for i := range d.Manifests {
		if d.Manifests[i].MediaType == mediaType {
			return &d.Manifests[i]
		}
	}
	return nil
}

// readDocument reads an index or a manifest. Anything else is an empty document.
func readDocument(ctx context.Context, store content.Provider, desc ocispec.Descriptor) (document, error) {
	index := images.IsIndexType(desc.MediaType)
	if !index && !images.IsManifestType(desc.MediaType) {
		return document{}, nil
	}
	data, err := readBlob(ctx, store, desc, maxDocument)
	if err != nil {
		return document{}, err
	}
	return decodeDocument(data, index)
}

func decodeDocument(data []byte, index bool) (document, error) {
	if err := capture.CheckJSON(data); err != nil {
		return document{}, fmt.Errorf("a manifest or index: %w", err)
	}
	var doc document
	if err := json.Unmarshal(data, &doc); err != nil {
		return document{}, fault.Invalid("no valid manifest or index: %v", err)
	}
	// One that can be read as either is a trick: who signs or scans it may see
	// the other.
	if index && (doc.Config != nil || doc.Layers != nil) || !index && doc.Manifests != nil {
		return document{}, fault.Invalid("both a manifest and an index")
	}
	return doc, nil
}

// readBlob reads a small blob and compares its digest.
func readBlob(ctx context.Context, store content.Provider, desc ocispec.Descriptor, limit int64) ([]byte, error) {
	if err := desc.Digest.Validate(); err != nil {
		return nil, fault.Invalid("digest %q: %v", desc.Digest, err)
	}
	ra, err := store.ReaderAt(ctx, desc)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", desc.Digest, err)
	}
	defer ra.Close()
	if err := checkSize(ra, desc); err != nil {
		return nil, err
	}
	if desc.Size > limit {
		return nil, fault.Invalid("%s (%s) has %d bytes; at most %d are read", desc.Digest, desc.MediaType, desc.Size, limit)
	}
	data := make([]byte, desc.Size)
	if _, err := io.ReadFull(io.NewSectionReader(ra, 0, desc.Size), data); err != nil {
		return nil, fmt.Errorf("read %s: %w", desc.Digest, err)
	}
	if got := desc.Digest.Algorithm().FromBytes(data); got != desc.Digest {
		return nil, fault.Invalid("%s is altered: its digest is %s", desc.Digest, got)
	}
	return data, nil
}

func checkSize(ra content.ReaderAt, desc ocispec.Descriptor) error {
	if ra.Size() != desc.Size {
		return fault.Invalid("%s has %d bytes; the manifest says %d", desc.Digest, ra.Size(), desc.Size)
	}
	return nil
}

package oci

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/contentstore"
	"github.com/stasis-run/stasis/checkpoint/fault"
)

// Base is the image that a container was made from, for its platform.
type Base struct {
	layers []ocispec.Descriptor
	// config has all keys, known or not; diffIDs and history are those of it.
	config  map[string]json.RawMessage
	diffIDs []digest.Digest
	history []ocispec.History
}

// ReadBase reads the image that a checkpoint builds on, of a multi-platform one the
// manifest for the architecture of the container. desc is what the image's record
// points at. All its blobs have to be in the store, and are added to the
// lease in ctx: else they could go with the image before the checkpoint is saved.
func ReadBase(ctx context.Context, store content.Store, desc ocispec.Descriptor, info capture.Info) (*Base, error) {
	m, err := images.Manifest(ctx, store, desc, platforms.Only(ocispec.Platform{OS: "linux", Architecture: architecture(info)}))
	if err != nil {
		return nil, fmt.Errorf("base image %s: %w", desc.Digest, err)
	}
	for _, blob := range append([]ocispec.Descriptor{m.Config}, m.Layers...) {
		if err := retain(ctx, store, blob); err != nil {
			return nil, fmt.Errorf("base image %s: %w", desc.Digest, err)
		}
	}
	data, err := readBlob(ctx, store, m.Config, maxDocument)
	if err != nil {
		return nil, fmt.Errorf("config of base image %s: %w", desc.Digest, err)
	}
	b, err := decodeConfig(data)
	if err != nil {
		return nil, fmt.Errorf("config of base image %s: %w", desc.Digest, err)
	}
	if len(b.diffIDs) != len(m.Layers) {
		return nil, fault.Invalid("base image %s has %d layers, and %d in its config", desc.Digest, len(m.Layers), len(b.diffIDs))
	}
	for _, l := range m.Layers {
		// The same blobs by OCI's names: some tools refuse an image with both.
		switch l.MediaType {
		case images.MediaTypeDockerSchema2LayerGzip:
			l.MediaType = ocispec.MediaTypeImageLayerGzip
		case images.MediaTypeDockerSchema2LayerZstd:
			l.MediaType = ocispec.MediaTypeImageLayerZstd
		}
		b.layers = append(b.layers, l)
	}
	if m.Annotations[AnnotationCheckpoint] == string(Runnable) {
		b.dropCheckpoint(m.Annotations[AnnotationCheckpointLayer])
	}
	return b, nil
}

// decodeConfig reads an image's config, without the layers.
func decodeConfig(data []byte) (*Base, error) {
	var b Base
	if err := capture.CheckJSON(data); err != nil {
		return nil, err
	}
	if err := json.Unmarshal(data, &b.config); err != nil {
		return nil, fault.Invalid("no valid JSON: %v", err)
	}
	var known struct {
		RootFS  ocispec.RootFS    `json:"rootfs"`
		History []ocispec.History `json:"history"`
	}
	if err := json.Unmarshal(data, &known); err != nil {
		return nil, fault.Invalid("no valid image config: %v", err)
	}
	b.diffIDs, b.history = known.RootFS.DiffIDs, known.History
	return &b, nil
}

// dropCheckpoint takes away the layer with /.stasis that an image has whose
// container was restored from it, since a layer on top does not remove files of
// one below.
func (b *Base) dropCheckpoint(checkpoint string) {
	last := len(b.layers) - 1
	if last < 0 || b.layers[last].Digest.String() != checkpoint {
		return
	}
	b.layers, b.diffIDs = b.layers[:last], b.diffIDs[:last]
	for i, h := range slices.Backward(b.history) {
		if !h.EmptyLayer {
			b.history = slices.Delete(b.history, i, i+1)
			break
		}
	}
}

// with returns the config of the image with more layers. created is not set if
// it is zero.
func (b *Base) with(created time.Time, diffIDs []digest.Digest, history []ocispec.History) ([]byte, error) {
	config := maps.Clone(b.config)
	set := func(key string, value any) error {
		data, err := json.Marshal(value)
		config[key] = data
		return err
	}
	err := set("rootfs", ocispec.RootFS{Type: "layers", DiffIDs: slices.Concat(b.diffIDs, diffIDs)})
	if err == nil && !created.IsZero() {
		err = set("created", created.UTC())
	}
	described := 0
	for _, h := range b.history {
		if !h.EmptyLayer {
			described++
		}
	}
	// A history has an entry for each layer, or there is none.
	delete(config, "history")
	if err == nil && described == len(b.diffIDs) {
		err = set("history", slices.Concat(b.history, history))
	}
	if err != nil {
		return nil, err
	}
	return json.Marshal(config) // which sorts the keys
}

// retain adds a blob, which has to be there, to the lease in ctx.
func retain(ctx context.Context, store content.Store, desc ocispec.Descriptor) error {
	_, err := store.Info(ctx, desc.Digest)
	if errdefs.IsNotFound(err) {
		return fault.Unusable("%s (%s) is not in the content store; fetch all of the image: ctr content fetch IMAGE", desc.Digest, desc.MediaType)
	}
	if err != nil {
		return err
	}
	// A writer for what is there already does nothing but lease it.
	ref := contentstore.NewRef()
	w, err := content.OpenWriter(ctx, store, content.WithRef(ref), content.WithDescriptor(desc))
	if errdefs.IsAlreadyExists(err) {
		return nil
	}
	if err != nil {
		return err
	}
	w.Close()
	_ = store.Abort(context.WithoutCancel(ctx), ref)
	return fault.Unusable("%s (%s) was removed from the content store just now; try again", desc.Digest, desc.MediaType)
}

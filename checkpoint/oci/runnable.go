package oci

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strconv"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/layout"
)

// WriteRunnable writes a runnable image and returns the descriptor of its
// manifest. base is what the record of the container's image points at; its
// layers become part of the image as they are. If one of them is not in the
// store, or is of a kind that cannot be, the error matches
// errdefs.ErrFailedPrecondition.
//
// The same capture gives the same image, to the last byte.
func WriteRunnable(ctx context.Context, store content.Store, base ocispec.Descriptor, c *capture.Capture, o Options) (ocispec.Descriptor, error) {
	desc, err := writeRunnable(ctx, store, base, c, o)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("make a runnable image of container %s: %w", c.Info.ContainerName, err)
	}
	return desc, nil
}

func writeRunnable(ctx context.Context, store content.Store, baseDesc ocispec.Descriptor, c *capture.Capture, o Options) (ocispec.Descriptor, error) {
	base, err := ReadBase(ctx, store, baseDesc, c.Info)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	var layers RunnableLayers
	group, gctx := errgroup.WithContext(ctx)
	group.Go(func() (err error) {
		layers.Writable, err = WriteWritableLayer(gctx, store, c, o)
		return err
	})
	group.Go(func() (err error) {
		layers.Checkpoint, err = NewCheckpointLayer(store, o).Finish(gctx, c)
		return err
	})
	if err := group.Wait(); err != nil {
		return ocispec.Descriptor{}, err
	}
	return WriteRunnableManifest(ctx, store, base, c, layers)
}

// RunnableLayers are the layers of a runnable image on top of its base.
type RunnableLayers struct {
	Writable   *Layer // nil: the checkpoint does not tell what it was
	Checkpoint Layer
}

// WriteWritableLayer writes the writable layer of a capture, and returns nil if that
// does not have one.
func WriteWritableLayer(ctx context.Context, store content.Store, c *capture.Capture, o Options) (*Layer, error) {
	if c.Layer == nil {
		return nil, nil
	}
	l, err := writeLayer(ctx, store, o, c.Layer.WriteLayer, o.progress("layer", layerSize(c.Info)))
	return &l, err
}

// WriteRunnableManifest writes what WriteRunnable does for one whose layers are
// written already: its config and manifest.
func WriteRunnableManifest(ctx context.Context, store content.Store, b *Base, c *capture.Capture, layers RunnableLayers) (ocispec.Descriptor, error) {
	arch := architecture(c.Info)
	annotations := toAnnotations(c.Info)
	signedBy(annotations, c.Images)
	annotations[AnnotationCheckpoint] = string(Runnable)
	annotations[AnnotationVersion] = strconv.Itoa(formatVersion)
	annotations[AnnotationCheckpointLayer] = layers.Checkpoint.Digest.String()
	maps.Copy(layers.Checkpoint.Annotations, criuAnnotations(c.Info))
	added := []Layer{layers.Checkpoint}
	history := []ocispec.History{{CreatedBy: "stasis checkpoint", Comment: "/" + layout.Embedded + ": the processes of container " + c.Info.ContainerName}}
	if layers.Writable != nil {
		annotations[AnnotationWritableLayer] = layers.Writable.Digest.String()
		added = slices.Insert(added, 0, *layers.Writable)
		history = slices.Insert(history, 0, ocispec.History{CreatedBy: "stasis checkpoint", Comment: "what container " + c.Info.ContainerName + " wrote"})
	}
	if at := c.Info.Checkpointed.UTC(); !at.IsZero() {
		for i := range history {
			history[i].Created = &at
		}
	}
	all := slices.Clone(b.layers)
	var diffIDs []digest.Digest
	for _, l := range added {
		all = append(all, l.Descriptor)
		diffIDs = append(diffIDs, l.DiffID)
	}
	config, err := b.with(c.Info.Checkpointed, diffIDs, history)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return writeManifest(ctx, store, config, all, annotations, arch)
}

// writeManifest writes an image's config and manifest.
func writeManifest(ctx context.Context, store content.Store, config []byte, layers []ocispec.Descriptor,
	annotations map[string]string, arch string) (ocispec.Descriptor, error) {
	configDesc, err := writeBlob(ctx, store, ocispec.MediaTypeImageConfig, config, nil)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	data, err := json.Marshal(ocispec.Manifest{
		Versioned:   specs.Versioned{SchemaVersion: 2},
		MediaType:   ocispec.MediaTypeImageManifest,
		Config:      configDesc,
		Layers:      layers,
		Annotations: annotations,
	})
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	refs := gcLabels(slices.Concat([]ocispec.Descriptor{configDesc}, layers)...)
	desc, err := writeBlob(ctx, store, ocispec.MediaTypeImageManifest, data, refs)
	desc.Platform = &ocispec.Platform{OS: "linux", Architecture: arch}
	return desc, err
}

// architecture is where the container ran.
func architecture(i capture.Info) string {
	if i.Host.Architecture != "" {
		return i.Host.Architecture
	}
	return runtime.GOARCH
}

// layerSize is the size of the writable layer in bytes, 0 if it is not known.
func layerSize(i capture.Info) int64 {
	if i.Stats == nil {
		return 0
	}
	return i.Stats.LayerBytes
}

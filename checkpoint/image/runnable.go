package image

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
)

// Paths in the last layer of a runnable image.
const (
	stasisDir     = ".stasis"
	infoPath      = stasisDir + "/info.json"
	specPath      = stasisDir + "/spec.json"
	devShmPath    = stasisDir + "/devshm-checkpoint.tar" // if there is one
	checkpointDir = stasisDir + "/checkpoint"
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
	arch := architecture(c.Info)
	b, err := readBase(ctx, store, baseDesc, arch)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	var writable, checkpoint layer
	group, gctx := errgroup.WithContext(ctx)
	if c.Layer != nil {
		group.Go(func() (err error) {
			writable, err = writeLayer(gctx, store, o, c.Layer.WriteLayer, o.progress("layer", layerSize(c.Info)))
			return err
		})
	}
	group.Go(func() (err error) {
		checkpoint, err = writeProcesses(gctx, store, c, o)
		return err
	})
	if err := group.Wait(); err != nil {
		return ocispec.Descriptor{}, err
	}

	annotations := toAnnotations(c.Info)
	signedBy(annotations, c.Images)
	annotations[AnnotationCheckpoint] = string(Runnable)
	annotations[AnnotationVersion] = strconv.Itoa(formatVersion)
	annotations[AnnotationCheckpointLayer] = checkpoint.Digest.String()
	maps.Copy(checkpoint.Annotations, criuAnnotations(c.Info))
	added := []layer{checkpoint}
	history := []ocispec.History{{CreatedBy: "stasis checkpoint", Comment: "/" + stasisDir + ": the processes of container " + c.Info.ContainerName}}
	if c.Layer != nil {
		annotations[AnnotationWritableLayer] = writable.Digest.String()
		added = slices.Insert(added, 0, writable)
		history = slices.Insert(history, 0, ocispec.History{CreatedBy: "stasis checkpoint", Comment: "what container " + c.Info.ContainerName + " wrote"})
	}
	if at := c.Info.Checkpointed.UTC(); !at.IsZero() {
		for i := range history {
			history[i].Created = &at
		}
	}
	var diffIDs []digest.Digest
	for _, l := range added {
		b.layers = append(b.layers, l.Descriptor)
		diffIDs = append(diffIDs, l.diffID)
	}
	config, err := b.with(c.Info.Checkpointed, diffIDs, history)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return writeManifest(ctx, store, config, b.layers, annotations, arch)
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

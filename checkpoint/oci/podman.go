package oci

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/stasis-run/stasis/checkpoint/archive"
	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/fault"
)

// WritePodman writes the format of Podman and CRI-O and returns the descriptor of
// an index with the one manifest. Of their readers, some look for the
// annotations on the index and some on the manifest, so both have all of them.
// The container's image is not part of it: who restores it pulls that by name.
func WritePodman(ctx context.Context, store content.Store, c *capture.Capture, o Options) (ocispec.Descriptor, error) {
	desc, err := writePodman(ctx, store, c, o)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("make a checkpoint image for Podman of container %s: %w", c.Info.ContainerName, err)
	}
	return desc, nil
}

func writePodman(ctx context.Context, store content.Store, c *capture.Capture, o Options) (ocispec.Descriptor, error) {
	_, total, err := listImages(c.Images)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	l, err := writeLayer(ctx, store, o, func(ctx context.Context, w io.Writer) error {
		return archive.Write(ctx, w, c, compression.Uncompressed)
	}, o.progress("checkpoint", total+layerSize(c.Info)))
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	arch := architecture(c.Info)
	empty := Base{config: map[string]json.RawMessage{"os": json.RawMessage(`"linux"`), "config": json.RawMessage(`{}`)}}
	if empty.config["architecture"], err = json.Marshal(arch); err != nil {
		return ocispec.Descriptor{}, err
	}
	history := ocispec.History{CreatedBy: "stasis checkpoint", Comment: "container " + c.Info.ContainerName}
	config, err := empty.with(c.Info.Checkpointed, []digest.Digest{l.DiffID}, []ocispec.History{history})
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	annotations := toAnnotations(c.Info)
	signedBy(annotations, c.Images)
	maps.Copy(annotations, criuAnnotations(c.Info))
	maps.Copy(annotations, podmanAnnotations(c.Info))
	annotations[crioName] = c.Info.ContainerName
	manifest, err := writeManifest(ctx, store, config, []ocispec.Descriptor{l.Descriptor}, annotations, arch)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	data, err := json.Marshal(ocispec.Index{
		Versioned:   specs.Versioned{SchemaVersion: 2},
		MediaType:   ocispec.MediaTypeImageIndex,
		Manifests:   []ocispec.Descriptor{manifest},
		Annotations: annotations,
	})
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return writeBlob(ctx, store, ocispec.MediaTypeImageIndex, data, gcLabels(manifest))
}

func readPodman(ctx context.Context, store content.Provider, f found, dir string, limit int64) (*capture.Capture, error) {
	if n := len(f.doc.Layers); n != 1 {
		return nil, fault.Invalid("it has %d layers; a checkpoint image of Podman or CRI-O has one", n)
	}
	desc := f.doc.Layers[0]
	if desc.MediaType == images.MediaTypeDockerSchema2LayerGzip {
		desc.MediaType = ocispec.MediaTypeImageLayerGzip
	}
	b, err := openBlob(ctx, store, desc)
	if err != nil {
		return nil, err
	}
	defer b.Close()
	// Package archive wants to make the folder itself.
	if err := os.Remove(dir); err != nil {
		return nil, err
	}
	c, err := archive.Read(ctx, b, dir, archive.Limits{Total: limit})
	if err != nil {
		return nil, err
	}
	if err := b.finish(); err != nil {
		return nil, err
	}
	complete(&c.Info, fromForeign(f.annotations))
	return c, nil
}

// complete adds to an Info what it does not have and another does.
func complete(info *capture.Info, from capture.Info) {
	if info.Pod == nil {
		info.Pod = from.Pod
	}
	pod := info.Pod
	for _, i := range []*capture.Info{info, &from} {
		if i.Pod == nil {
			i.Pod = &capture.Pod{}
		}
	}
	theirs := annotated(&from)
	for key, s := range annotated(info) {
		if *s == "" {
			*s = *theirs[key]
		}
	}
	info.Pod = pod
	info.Host.CgroupV2 = info.Host.CgroupV2 || from.Host.CgroupV2
}

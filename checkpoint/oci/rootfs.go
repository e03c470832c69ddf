package oci

import (
	"context"
	"fmt"
	"slices"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/fault"
)

// WriteRootfs writes an image of a container's root filesystem without its processes: its
// base, and what the container wrote on top, as `nerdctl commit` does. It returns the
// descriptor of its manifest. base is as for WriteRunnable.
func WriteRootfs(ctx context.Context, store content.Store, base ocispec.Descriptor, c *capture.Capture, o Options) (ocispec.Descriptor, error) {
	desc, err := writeRootfs(ctx, store, base, c, o)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("make an image of the root filesystem of container %s: %w", c.Info.ContainerName, err)
	}
	return desc, nil
}

func writeRootfs(ctx context.Context, store content.Store, base ocispec.Descriptor, c *capture.Capture, o Options) (ocispec.Descriptor, error) {
	b, err := ReadBase(ctx, store, base, c.Info)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	layers := slices.Clone(b.layers)
	var diffIDs []digest.Digest
	var history []ocispec.History
	writable, err := WriteWritableLayer(ctx, store, c, o)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if writable != nil {
		at := c.Info.Checkpointed.UTC()
		layers, diffIDs = append(layers, writable.Descriptor), []digest.Digest{writable.DiffID}
		history = []ocispec.History{{Created: &at, CreatedBy: "stasis", Comment: "what container " + c.Info.ContainerName + " wrote"}}
	}
	config, err := b.with(c.Info.Checkpointed, diffIDs, history)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return writeManifest(ctx, store, config, layers, nil, architecture(c.Info))
}

// labelRootfs marks an image that WriteRootfs has made, and has its digest.
const labelRootfs = "stasis.run/rootfs"

// CheckRootfsName refuses a name that an image has which SaveRootfs did not give it: it
// would be replaced.
func CheckRootfsName(ctx context.Context, records images.Store, name string) error {
	img, err := records.Get(ctx, name)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err == nil && img.Labels[labelRootfs] != img.Target.Digest.String() {
		err = fault.New(errdefs.ErrAlreadyExists, "there is an image %s, which is not of a root filesystem that was saved here: choose another name", name)
	}
	return err
}

// SaveRootfs names an image that WriteRootfs has made. It replaces another such image.
func SaveRootfs(ctx context.Context, records images.Store, name string, desc ocispec.Descriptor) error {
	if err := CheckRootfsName(ctx, records, name); err != nil {
		return err
	}
	record := images.Image{Name: name, Target: desc, Labels: map[string]string{labelRootfs: desc.Digest.String()}}
	_, err := records.Create(ctx, record)
	if errdefs.IsAlreadyExists(err) {
		// Maybe since just now, and another's.
		if err = CheckRootfsName(ctx, records, name); err == nil {
			_, err = records.Update(ctx, record)
		}
	}
	if err != nil {
		return fmt.Errorf("name image %s: %w", name, err)
	}
	return nil
}

package image

import (
	"context"
	"fmt"
	"maps"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/stasis-run/stasis/checkpoint/fault"
)

// Save names a checkpoint that was written: from then on it is in the image
// store and stays without a lease. A checkpoint that has the name already is
// replaced; another image is not, and the error matches
// errdefs.ErrAlreadyExists. labels are added to those of this package.
func Save(ctx context.Context, store content.Provider, records images.Store, name string, desc ocispec.Descriptor, labels map[string]string) (images.Image, error) {
	img, err := save(ctx, store, records, name, desc, labels)
	if err != nil {
		return images.Image{}, fmt.Errorf("save checkpoint image %s: %w", name, err)
	}
	return img, nil
}

func save(ctx context.Context, store content.Provider, records images.Store, name string, desc ocispec.Descriptor, labels map[string]string) (images.Image, error) {
	form, err := Detect(ctx, store, desc)
	if err != nil {
		return images.Image{}, err
	}
	if form == None {
		return images.Image{}, fault.Invalid("%s is no checkpoint", desc.Digest)
	}
	img := images.Image{Name: name, Target: desc, Labels: map[string]string{AnnotationCheckpoint: string(form)}}
	if form == Index {
		img.Labels["containerd.io/checkpoint"] = "true" // as containerd's client does
	}
	maps.Copy(img.Labels, labels)
	created, err := records.Create(ctx, img)
	if !errdefs.IsAlreadyExists(err) {
		return created, err
	}
	old, err := records.Get(ctx, name)
	if err != nil {
		return images.Image{}, err
	}
	was, err := Detect(ctx, store, old.Target)
	if err != nil && !errdefs.IsNotFound(err) {
		return images.Image{}, err
	}
	if was == None && old.Labels[AnnotationCheckpoint] == "" {
		return images.Image{}, fault.New(errdefs.ErrAlreadyExists, "there is an image of this name that is no checkpoint; choose another name")
	}
	return records.Update(ctx, img, "target", "labels")
}

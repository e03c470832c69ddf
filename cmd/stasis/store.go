package main

import (
	"context"
	"fmt"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/image"
)

// storeOptions are those of making an image in containerd's store.
func (a *app) storeOptions(ctx context.Context, c *client.Client, comp compression.Compression, bar *progress) image.Options {
	return image.Options{Compression: comp, Root: storeRoot(ctx, c), Progress: func(stage string, done, total int64) {
		// Two stages run at once; there is one bar, for the larger.
		if stage == "checkpoint" {
			bar.Stage("store")
			bar.Set(done, total)
		}
	}}
}

// store makes an image of a capture, in one of the forms, and names it; ctx has a
// lease. It returns the image's digest.
func store(ctx context.Context, c *client.Client, ref string, got *capture.Capture, base ocispec.Descriptor, format string, o image.Options) (string, error) {
	desc, err := storeContent(ctx, c, got, base, format, o)
	if err != nil {
		return "", err
	}
	if _, err := image.Save(ctx, c.ContentStore(), c.ImageService(), ref, desc, image.MadeHere(desc)); err != nil {
		return "", err
	}
	return desc.Digest.String(), nil
}

// storeContent is store without the name.
func storeContent(ctx context.Context, c *client.Client, got *capture.Capture, base ocispec.Descriptor, format string, o image.Options) (ocispec.Descriptor, error) {
	switch format {
	case "runnable":
		return image.WriteRunnable(ctx, c.ContentStore(), base, got, o)
	case "index":
		return image.WriteIndex(ctx, c.ContentStore(), base, got, o)
	case "podman":
		return image.WritePodman(ctx, c.ContentStore(), got, o)
	}
	return ocispec.Descriptor{}, fmt.Errorf("%s is no form of image", format)
}

// storeRoot is the folder of containerd's content store, if there is one on this
// host, or "".
func storeRoot(ctx context.Context, c *client.Client) string {
	plugins, err := c.IntrospectionService().Plugins(ctx, "type==io.containerd.content.v1")
	if err != nil {
		return ""
	}
	for _, p := range plugins.Plugins {
		if root := p.Exports["root"]; root != "" {
			return root
		}
	}
	return ""
}

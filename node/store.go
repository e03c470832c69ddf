package node

import (
	"context"
	"fmt"
	"os"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/contentstore"
	"github.com/stasis-run/stasis/checkpoint/oci"
)

// Formats of a checkpoint: of an image, or FormatArchive.
const (
	FormatRunnable = string(oci.Runnable)
	FormatIndex    = string(oci.Index)
	FormatPodman   = string(oci.Podman)
	FormatArchive  = "archive"
	FormatOCI      = "oci" // an image as it is, in a tar
)

// compressionOf is the compression that a request names: "zstd", which is what "" means,
// "gzip" or "none".
func compressionOf(name string) (compression.Compression, error) {
	switch name {
	case "", "zstd":
		return compression.Zstd, nil
	case "gzip":
		return compression.Gzip, nil
	case "none":
		return compression.Uncompressed, nil
	}
	return 0, requestError("%s is no compression: it is zstd, gzip or none", name)
}

// storeOptions are those of making an image in containerd's store.
func storeOptions(ctx context.Context, c *client.Client, compress string, bar *stages) (oci.Options, error) {
	comp, err := compressionOf(compress)
	return oci.Options{Compression: comp, Folder: contentFolder(ctx, c), Progress: func(stage string, done, total int64) {
		// Two stages run at once; there is one bar, for the larger.
		if stage == "checkpoint" {
			bar.begin("store")
			bar.set(done, total)
		}
	}}, err
}

// store makes an image of a capture, in one of the formats, and names it; ctx has a
// lease. Without ref the name is defaultRef, or one more like it.
func store(ctx context.Context, c *client.Client, ref string, got *capture.Capture, base ocispec.Descriptor, format string, o oci.Options) (Image, error) {
	desc, err := storeContent(ctx, c, got, base, format, o)
	if err != nil {
		return Image{}, err
	}
	return nameNew(ctx, c, ref, got, base, desc)
}

// storeEarly is store for a runnable image whose layer was started early.
func (d *dumper) storeEarly(ctx context.Context, ref string, got *capture.Capture, retain bool, o oci.Options) (Image, error) {
	failed := func(err error) (Image, error) {
		return Image{}, fmt.Errorf("make a runnable image of container %s: %w", got.Info.ContainerName, err)
	}
	store := d.client.ContentStore()
	base, err := oci.ReadBase(ctx, store, d.base, got.Info)
	if err != nil {
		return failed(err)
	}
	var layers oci.RunnableLayers
	group, gctx := errgroup.WithContext(ctx)
	group.Go(func() (err error) {
		layers.Writable, err = oci.WriteWritableLayer(gctx, store, got, o)
		return err
	})
	group.Go(func() (err error) {
		layers.Checkpoint, err = d.early.finish(gctx, got, retain, d.key)
		return err
	})
	if err := group.Wait(); err != nil {
		return failed(err)
	}
	desc, err := oci.WriteRunnableManifest(ctx, store, base, got, layers)
	if err != nil {
		return failed(err)
	}
	return nameNew(ctx, d.client, ref, got, d.base, desc)
}

// nameNew names an image that was made here. One that has the name is replaced only if a
// user has typed it: of the same second there may be another. If it is the container's
// base, that is kept, under its digest: the next checkpoint needs it.
func nameNew(ctx context.Context, c *client.Client, ref string, got *capture.Capture, base, desc ocispec.Descriptor) (Image, error) {
	var img images.Image
	var err error
	if ref == "" {
		ref = defaultRef(got.Info.ContainerID, got.Info.Checkpointed)
		img, _, err = oci.SaveNew(ctx, c.ContentStore(), c.ImageService(), ref, desc, oci.MadeHere(desc))
	} else {
		if old, gerr := c.ImageService().Get(ctx, ref); gerr == nil && old.Target.Digest == base.Digest && base.Digest != desc.Digest {
			old.Name = byDigest(ref, old)
			if _, err := c.ImageService().Create(ctx, old); err != nil && !errdefs.IsAlreadyExists(err) {
				return Image{}, fmt.Errorf("keep the container's base as %s: %w", old.Name, err)
			}
		}
		img, err = oci.Save(ctx, c.ContentStore(), c.ImageService(), ref, desc, oci.MadeHere(desc))
	}
	return Image{img.Name, desc.Digest.String()}, err
}

// storeContent is store without the name.
func storeContent(ctx context.Context, c *client.Client, got *capture.Capture, base ocispec.Descriptor, format string, o oci.Options) (ocispec.Descriptor, error) {
	switch format {
	case FormatRunnable:
		return oci.WriteRunnable(ctx, c.ContentStore(), base, got, o)
	case FormatIndex:
		return oci.WriteIndex(ctx, c.ContentStore(), base, got, o)
	case FormatPodman:
		return oci.WritePodman(ctx, c.ContentStore(), got, o)
	}
	return ocispec.Descriptor{}, requestError("%s is no format of an image", format)
}

// contentFolder is the folder of containerd's content store.
func contentFolder(ctx context.Context, c *client.Client) contentstore.Folder {
	v, err := c.Version(ctx)
	if err != nil {
		v.Version = "" // not known; what comes next says what is wrong with containerd
	}
	return contentstore.Find(ctx, v.Version, c.IntrospectionService())
}

// storeLimit is how much may be put into containerd's content store from a file. A
// store on another host has the limit of our state folder.
func (n *Node) storeLimit(ctx context.Context, c *client.Client, asked int64) (int64, error) {
	dir := contentFolder(ctx, c).Path()
	if _, err := os.Stat(dir); err != nil {
		if dir, err = n.stateDir(workFolder); err != nil {
			return 0, err
		}
	}
	return capture.Limit(dir, asked)
}

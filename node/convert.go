package node

import (
	"context"
	"fmt"
	"io"

	"github.com/containerd/containerd/v2/client"
	ctrarchive "github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/stasis-run/stasis/checkpoint/archive"
	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/fault"
)

// Image is an image in containerd's store or in a registry.
type Image struct {
	Ref    string `json:"ref"`
	Digest string `json:"digest"`
}

// ConvertRequest says of what to make an image in which format.
type ConvertRequest struct {
	// Checkpoint is an image, an archive, or a folder of CRIU's images, of which only
	// an archive can be made (ExportRequest).
	Checkpoint string
	// Ref is the name of the image; it replaces a checkpoint.
	Ref string
	// Format is that of the image; empty: FormatRunnable. Compression is that of its
	// layers: "zstd", which is what "" means, "gzip" or "none".
	Format, Compression string
	// MaxSize is how many bytes the checkpoint may have unpacked; 0: half of what is
	// free on the disk.
	MaxSize  int64
	Progress Progress
}

// Convert makes an image of a checkpoint in any format. The image that the container was
// made from, of which some formats consist in part, is pulled if it is not here.
func (n *Node) Convert(ctx context.Context, r ConvertRequest) (*Image, error) {
	ref, err := fullName(r.Ref)
	if err != nil {
		return nil, err
	}
	got, cleanup, err := n.openCapture(ctx, r.Checkpoint, r.MaxSize)
	defer cleanup()
	if err != nil {
		return nil, err
	}
	return n.storeAs(ctx, ref, typed, got, r.Format, r.Compression, r.Progress)
}

// storeAs makes an image of a checkpoint and names it.
func (n *Node) storeAs(ctx context.Context, ref string, name naming, got *capture.Capture, format, compress string, tell Progress) (*Image, error) {
	if format == "" {
		format = FormatRunnable
	}
	ctx, c, done, err := n.leased(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	bar := tell.of(ref)
	defer bar.end()
	desc, err := n.storeWithBase(ctx, c, got, format, compress, bar)
	if err != nil {
		return nil, err
	}
	img, _, err := name(ctx, c, ref, desc)
	if err != nil {
		return nil, err
	}
	return &Image{img.Name, desc.Digest.String()}, nil
}

func (n *Node) storeWithBase(ctx context.Context, c *client.Client, got *capture.Capture, format, compress string, bar *stages) (ocispec.Descriptor, error) {
	if got.Info.Version == 0 {
		return ocispec.Descriptor{}, fault.Invalid("a folder of CRIU's images does not tell the container's spec and its changed files, so it cannot become an image")
	}
	var base ocispec.Descriptor
	if format != FormatPodman {
		var err error
		if base, _, err = n.findBase(ctx, c, got.Info.Base, Registry{}, bar); err != nil {
			return ocispec.Descriptor{}, err
		}
	}
	o, err := storeOptions(ctx, c, compress, bar)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return storeContent(ctx, c, got, base, format, o)
}

// ExportRequest says which checkpoint to write to a file.
type ExportRequest struct {
	// Checkpoint is an image, an archive, or a folder of CRIU's images; for FormatOCI it
	// is an image.
	Checkpoint string
	Output     Output
	// Format is FormatArchive, which is what "" means: that of Podman, CRI-O and the
	// kubelet; or FormatOCI: the image as it is, with all its layers.
	Format string
	// Compression is that of an archive: "zstd", which is what "" means, "gzip" or
	// "none".
	Compression string
	// MaxSize is how many bytes the checkpoint may have unpacked; 0: half of what is
	// free on the disk.
	MaxSize  int64
	Progress Progress
}

// Export writes a checkpoint to a file.
func (n *Node) Export(ctx context.Context, r ExportRequest) error {
	comp, err := compressionOf(r.Compression)
	if err != nil {
		return err
	}
	var write func(io.Writer) error
	switch r.Format {
	case FormatOCI:
		c, err := n.Client(ctx)
		if err != nil {
			return err
		}
		img, err := findCheckpoint(ctx, c, r.Checkpoint)
		if err != nil {
			return err
		}
		write = func(w io.Writer) error {
			return c.Export(ctx, w, ctrarchive.WithPlatform(platforms.All), ctrarchive.WithSkipDockerManifest(),
				ctrarchive.WithImage(c.ImageService(), img.Name))
		}
	case "", FormatArchive:
		got, cleanup, err := n.openCapture(ctx, r.Checkpoint, r.MaxSize)
		defer cleanup()
		if err != nil {
			return err
		}
		write = func(w io.Writer) error { return archive.Write(ctx, w, got, comp) }
	default:
		return requestError("%s is no format of a file", r.Format)
	}
	bar := r.Progress.of(r.Output.Path)
	defer bar.end()
	bar.begin("write")
	err = r.Output.Write(ctx, func(w io.Writer) error { return write(&counting{w: w, bar: bar}) })
	if err != nil {
		return fmt.Errorf("write %s: %w", r.Output.Path, err)
	}
	return nil
}

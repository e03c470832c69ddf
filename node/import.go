package node

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/stasis-run/stasis/checkpoint/archive"
	"github.com/stasis-run/stasis/checkpoint/oci"
)

// ImportRequest says what file to make images of.
type ImportRequest struct {
	// File is a path. Reader, if not nil, is read instead.
	File   string
	Reader io.Reader
	// Ref is the name of the image; it replaces a checkpoint. Empty: the name in the
	// file, else one by the container and the time or the digest, which replaces
	// nothing.
	Ref string
	// Format and Compression are those of the image that is made from an archive, as in
	// ConvertRequest. An OCI image stays what it is.
	Format, Compression string
	// MaxSize is how many bytes the checkpoint may have unpacked, or the images in the
	// store; 0: half of what is free on the disk.
	MaxSize  int64
	Progress Progress
}

// ImportResult is what was imported.
type ImportResult struct {
	Images []Image
	// OCI: the file is an OCI image, which may hold several, and no archive.
	OCI bool
}

// Import reads a checkpoint from a file: an archive of Podman, CRI-O or the kubelet, or
// an image in an OCI layout, compressed or not.
func (n *Node) Import(ctx context.Context, r ImportRequest) (*ImportResult, error) {
	ref := ""
	if r.Ref != "" {
		var err error
		if ref, err = fullName(r.Ref); err != nil {
			return nil, err
		}
	}
	var in io.ReadCloser
	if r.Reader != nil {
		in = interruptible(ctx, io.NopCloser(r.Reader))
	} else {
		var err error
		if in, err = openInput(ctx, r.File); err != nil {
			return nil, err
		}
	}
	defer in.Close()
	buffered := bufio.NewReaderSize(in, 64<<10)
	if isOCI(buffered) {
		found, err := n.importOCI(ctx, buffered, ref, r)
		if err != nil {
			return nil, err
		}
		return &ImportResult{found, true}, nil
	}
	got, cleanup, err := n.openArchive(ctx, buffered, r.MaxSize)
	defer cleanup()
	if err != nil {
		return nil, err
	}
	name := typed
	if ref == "" {
		ref, name = defaultRef(got.Info.ContainerName, got.Info.Checkpointed), untyped
	}
	img, err := n.storeAs(ctx, ref, name, got, r.Format, r.Compression, r.Progress)
	if err != nil {
		return nil, err
	}
	return &ImportResult{Images: []Image{*img}}, nil
}

// isOCI tells by the first name in a tar whether it is an image in an OCI layout.
func isOCI(r *bufio.Reader) bool {
	start, _ := r.Peek(r.Size())
	tar, err := archive.Decompress(bytes.NewReader(start))
	if err != nil {
		return false
	}
	defer tar.Close()
	header := make([]byte, 100) // where a tar has the name
	if _, err := io.ReadFull(tar, header); err != nil {
		return false
	}
	name, _, _ := strings.Cut(strings.TrimPrefix(string(header), "./"), "\x00")
	return strings.HasPrefix(name, "blobs") || name == "oci-layout" || name == "index.json" || name == "manifest.json"
}

// importOCI imports an image, and calls it ref unless that is empty.
func (n *Node) importOCI(ctx context.Context, in io.Reader, ref string, r ImportRequest) ([]Image, error) {
	ctx, c, done, err := n.leased(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	bar := r.Progress.of("image")
	defer bar.end()
	bar.begin("import")
	limit, err := n.storeLimit(ctx, c, r.MaxSize)
	if err != nil {
		return nil, err
	}
	tar, err := archive.Decompress(in)
	if err != nil {
		return nil, fmt.Errorf("import the image: %w", err)
	}
	defer tar.Close()
	tops, err := oci.ReadLayout(ctx, c.ContentStore(), tar, limit)
	if err != nil {
		return nil, fmt.Errorf("import the image: %w", err)
	}
	return nameCheckpoints(ctx, c, tops, ref)
}

// nameCheckpoints makes images of the checkpoints among what an index in a file lists.
// What else there is, containerd collects.
func nameCheckpoints(ctx context.Context, c *client.Client, tops []ocispec.Descriptor, ref string) (results []Image, err error) {
	store := c.ContentStore()
	var found []ocispec.Descriptor
	for _, top := range tops {
		format, err := oci.Detect(ctx, store, top)
		if err != nil {
			return nil, fmt.Errorf("read %s in the file: %w", top.Digest, err)
		}
		if format != oci.None {
			found = append(found, top)
		}
	}
	switch {
	case len(found) == 0:
		return nil, fmt.Errorf("the image in the file is no checkpoint: %w", errdefs.ErrInvalidArgument)
	case len(found) > 1 && ref != "":
		return nil, fmt.Errorf("there are several checkpoints in the file, which cannot all be called %s: give no name: %w", ref, errdefs.ErrInvalidArgument)
	}
	for _, top := range found {
		name, save := ref, typed
		if name == "" {
			save = untyped
			if name, err = nameOf(ctx, store, top); err != nil {
				return nil, err
			}
		}
		top.Annotations = nil // of the layout, not of the image
		// containerd then keeps what the checkpoint consists of.
		if err := oci.Keep(ctx, store, top); err != nil {
			return nil, fmt.Errorf("label %s: %w", name, err)
		}
		img, _, err := save(ctx, c, name, top)
		if err != nil {
			return nil, err
		}
		results = append(results, Image{img.Name, top.Digest.String()})
	}
	return results, nil
}

// naming makes the record of a checkpoint that is in the content store. made tells that
// there is a new record, which replaced none.
type naming func(ctx context.Context, c *client.Client, name string, desc ocispec.Descriptor) (img images.Image, made bool, err error)

// typed is the naming for a name that the user has typed: it replaces a checkpoint.
func typed(ctx context.Context, c *client.Client, name string, desc ocispec.Descriptor) (images.Image, bool, error) {
	img, err := oci.Save(ctx, c.ContentStore(), c.ImageService(), name, desc, nil)
	return img, false, err
}

// untyped is the naming for a name that comes from a checkpoint: it replaces nothing.
func untyped(ctx context.Context, c *client.Client, name string, desc ocispec.Descriptor) (images.Image, bool, error) {
	return oci.SaveNew(ctx, c.ContentStore(), c.ImageService(), name, desc, nil)
}

// nameOf is the name that an image has in the file, or, as Podman gives it none,
// that of a new checkpoint of the container.
func nameOf(ctx context.Context, store content.Provider, top ocispec.Descriptor) (string, error) {
	if name := top.Annotations[images.AnnotationImageName]; name != "" {
		return fullName(name)
	}
	summary, err := oci.ReadInfo(ctx, store, top)
	if err != nil {
		return "", fmt.Errorf("read %s in the file: %w", top.Digest, err)
	}
	i := summary.Info
	if i.ContainerName == "" {
		return "", fmt.Errorf("the image in the file has no name, nor has its container: give it one: %w", errdefs.ErrInvalidArgument)
	}
	if i.Checkpointed.IsZero() { // no other engine says when
		return "localhost/" + imageName(i.ContainerName) + ":" + top.Digest.Encoded()[:12], nil
	}
	return defaultRef(i.ContainerName, i.Checkpointed), nil
}

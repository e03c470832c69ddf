package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/stasis-run/stasis/checkpoint/archive"
	"github.com/stasis-run/stasis/checkpoint/image"
)

func newImportCommand(a *app) *cobra.Command {
	var f formFlags
	cmd := &cobra.Command{
		Use:   "import FILE [REF]",
		Short: "Read a checkpoint from a file",
		Long: `Read a checkpoint from a file, or from stdin if that is "-", and keep it as the
image REF. The file is an archive of Podman, CRI-O or the kubelet, or an image in
an OCI layout, as "stasis export" writes them, compressed or not. From an archive
an image is made in the form of --format; an OCI image stays what it is. Without
REF it keeps its name in the file, if there is one, and is else called by the
container and the time, or the digest if it does not say when it was made. If
another image has that name, the beginning of the digest is added to it: only a REF
that is given replaces a checkpoint.`,
		Example: `  stasis import checkpoint.tar.zst backup/db:1
  stasis import db-image.tar
  ssh other podman container checkpoint -e /dev/stdout db | stasis import - db:1`,
		Args: cobra.RangeArgs(1, 2),
		ValidArgsFunction: firstArgs(1, func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return nil, cobra.ShellCompDirectiveDefault
		}),
		RunE: func(cmd *cobra.Command, args []string) error {
			ref := ""
			if len(args) > 1 {
				var err error
				if ref, err = fullName(args[1]); err != nil {
					return err
				}
			}
			in, err := a.openInput(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			defer in.Close()
			r := bufio.NewReaderSize(in, 64<<10)
			if isOCI(r) {
				return a.importOCI(cmd.Context(), r, ref)
			}
			got, cleanup, err := a.openArchive(cmd.Context(), r)
			defer cleanup()
			if err != nil {
				return err
			}
			name := a.typed
			if ref == "" {
				ref, name = defaultRef(got.Info.ContainerName, got.Info.Checkpointed), a.untyped
			}
			return a.storeAs(cmd.Context(), ref, name, got, f)
		},
	}
	addFormFlags(cmd, &f, "runnable", "index", "podman")
	a.addMaxSize(cmd)
	return cmd
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
func (a *app) importOCI(ctx context.Context, r io.Reader, ref string) error {
	ctx, c, done, err := a.leased(ctx)
	if err != nil {
		return err
	}
	defer done()
	bar := a.progress("image")
	defer bar.Done()
	bar.Stage("import")
	limit, err := a.storeLimit(ctx, c)
	if err != nil {
		return err
	}
	tar, err := archive.Decompress(r)
	if err != nil {
		return fmt.Errorf("import the image: %w", err)
	}
	defer tar.Close()
	tops, err := image.ReadLayout(ctx, c.ContentStore(), tar, limit)
	if err != nil {
		return fmt.Errorf("import the image: %w", err)
	}
	results, err := a.nameCheckpoints(ctx, c, tops, ref)
	if err != nil {
		return err
	}
	if a.json() {
		return printJSON(a.out, results)
	}
	for _, s := range results {
		fmt.Fprintln(a.out, s.Ref)
	}
	return nil
}

// nameCheckpoints makes images of the checkpoints among what an index in a file lists.
// What else there is, containerd collects.
func (a *app) nameCheckpoints(ctx context.Context, c *client.Client, tops []ocispec.Descriptor, ref string) (results []stored, err error) {
	store := c.ContentStore()
	var found []ocispec.Descriptor
	for _, top := range tops {
		form, err := image.Detect(ctx, store, top)
		if err != nil {
			return nil, fmt.Errorf("read %s in the file: %w", top.Digest, err)
		}
		if form != image.None {
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
		name, save := ref, a.typed
		if name == "" {
			save = a.untyped
			if name, err = nameOf(ctx, store, top); err != nil {
				return nil, err
			}
		}
		top.Annotations = nil // of the layout, not of the image
		// containerd then keeps what the checkpoint consists of.
		if err := image.Keep(ctx, store, top); err != nil {
			return nil, fmt.Errorf("label %s: %w", name, err)
		}
		img, err := save(ctx, c, name, top)
		if err != nil {
			return nil, err
		}
		results = append(results, stored{img.Name, top.Digest.String()})
	}
	return results, nil
}

// naming makes the record of a checkpoint that is in the content store.
type naming func(ctx context.Context, c *client.Client, name string, desc ocispec.Descriptor) (images.Image, error)

// typed is the naming for a name that the user has typed: it replaces a checkpoint.
func (a *app) typed(ctx context.Context, c *client.Client, name string, desc ocispec.Descriptor) (images.Image, error) {
	return image.Save(ctx, c.ContentStore(), c.ImageService(), name, desc, nil)
}

// untyped is the naming for a name that comes from a checkpoint: it replaces nothing.
// What it makes is added to a.added.
func (a *app) untyped(ctx context.Context, c *client.Client, name string, desc ocispec.Descriptor) (images.Image, error) {
	img, made, err := image.SaveNew(ctx, c.ContentStore(), c.ImageService(), name, desc)
	if made {
		a.added = append(a.added, img)
	}
	return img, err
}

// removeAdded removes the images that a command has added which then failed.
func (a *app) removeAdded(ctx context.Context, c *client.Client) error {
	ctx = context.WithoutCancel(ctx)
	var failed []error
	for _, img := range a.added {
		// Not one that has got the name since.
		err := c.ImageService().Delete(ctx, img.Name, images.DeleteTarget(&img.Target), images.SynchronousDelete())
		if err != nil && !errdefs.IsNotFound(err) {
			failed = append(failed, fmt.Errorf("remove image %s again: %w", img.Name, err))
		}
	}
	a.added = nil
	return errors.Join(failed...)
}

// nameOf is the name that an image has in the file, or, as Podman gives it none,
// that of a new checkpoint of the container.
func nameOf(ctx context.Context, store content.Provider, top ocispec.Descriptor) (string, error) {
	if name := top.Annotations[images.AnnotationImageName]; name != "" {
		return fullName(name)
	}
	summary, err := image.ReadInfo(ctx, store, top)
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

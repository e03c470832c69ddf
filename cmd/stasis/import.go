package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	ctrarchive "github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

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
container and the time, or the digest if it does not say when it was made.`,
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
			in := a.in
			if args[0] != "-" {
				file, err := os.Open(args[0])
				if err != nil {
					return err
				}
				defer file.Close()
				in = file
			}
			r := bufio.NewReaderSize(in, 64<<10)
			if isOCI(r) {
				return a.importOCI(cmd.Context(), r, ref)
			}
			got, cleanup, err := a.openArchive(cmd.Context(), r)
			defer cleanup()
			if err != nil {
				return err
			}
			if ref == "" {
				ref = defaultRef(got.Info.ContainerName, got.Info.Checkpointed)
			}
			return a.storeAs(cmd.Context(), ref, got, f)
		},
	}
	addFormFlags(cmd, &f, "runnable", "index", "podman")
	return cmd
}

// isOCI tells by the first name in a tar whether it is an image in an OCI layout.
func isOCI(r *bufio.Reader) bool {
	start, _ := r.Peek(r.Size())
	tar, err := compression.DecompressStream(bytes.NewReader(start))
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
	tar, err := compression.DecompressStream(r)
	if err != nil {
		return fmt.Errorf("import the image: %w", err)
	}
	defer tar.Close()
	// Not the client's Import: it replaces whatever image has a name that
	// stands in the file.
	index, err := ctrarchive.ImportIndex(ctx, c.ContentStore(), tar)
	if err != nil {
		return fmt.Errorf("import the image: %w", err)
	}
	results, err := nameCheckpoints(ctx, c, index, ref)
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

// nameCheckpoints makes images of the checkpoints in an index that was imported,
// which is all of it: what else there is, containerd collects.
func nameCheckpoints(ctx context.Context, c *client.Client, index ocispec.Descriptor, ref string) (results []stored, err error) {
	store := c.ContentStore()
	tops, err := images.Children(ctx, store, index)
	if err != nil {
		return nil, fmt.Errorf("read the index in the file: %w", err)
	}
	for _, top := range tops {
		form, err := image.Detect(ctx, store, top)
		if err != nil {
			return nil, fmt.Errorf("read %s in the file: %w", top.Digest, err)
		}
		if form == image.None {
			continue
		}
		name := ref
		if name == "" {
			if name, err = nameOf(ctx, store, top); err != nil {
				return nil, err
			}
		}
		if len(results) > 0 && ref != "" {
			return nil, fmt.Errorf("there are several checkpoints in the file, which cannot all be called %s: give no name: %w", ref, errdefs.ErrInvalidArgument)
		}
		top.Annotations = nil // of the layout, not of the image
		// containerd then keeps what the checkpoint consists of.
		if err := images.Walk(ctx, images.SetChildrenLabels(store, images.ChildrenHandler(store)), top); err != nil {
			return nil, fmt.Errorf("label %s: %w", name, err)
		}
		if _, err := image.Save(ctx, store, c.ImageService(), name, top, nil); err != nil {
			return nil, err
		}
		results = append(results, stored{name, top.Digest.String()})
	}
	if len(results) == 0 {
		return nil, fmt.Errorf("the image in the file is no checkpoint: %w", errdefs.ErrInvalidArgument)
	}
	return results, nil
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

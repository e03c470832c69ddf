package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/containerd/v2/client"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/stasis-run/stasis/checkpoint/capture"
)

// formFlags are those of commands that write a checkpoint in some form.
type formFlags struct {
	format   choice
	compress choice
}

func addFormFlags(cmd *cobra.Command, f *formFlags, formats ...string) {
	f.format = choice{formats[0], formats}
	f.compress = choice{"zstd", []string{"zstd", "gzip", "none"}}
	cmd.Flags().Var(&f.format, "format", "form of the checkpoint")
	cmd.Flags().Var(&f.compress, "compress", "how it is compressed; the form index is always gzip")
	must(cmd.RegisterFlagCompletionFunc("format", f.format.complete))
	must(cmd.RegisterFlagCompletionFunc("compress", f.compress.complete))
}

func newConvertCommand(a *app) *cobra.Command {
	var f formFlags
	cmd := &cobra.Command{
		Use:   "convert SOURCE DESTINATION",
		Short: "Make a checkpoint of another form",
		Long: `Make a checkpoint of another form out of one of any form: an image, an archive, or
a folder of CRIU's images. DESTINATION is the name of an image, or for an archive
a file ("-" is stdout).

The forms runnable and index consist in part of the image that the container was
made from, which is pulled if it is not here.`,
		Example: `  stasis convert checkpoint.tar.zst backup/db:1
  stasis convert backup/db:1 db.tar --format archive --compress none
  stasis convert backup/db:1 backup/db:podman --format podman`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: firstArgs(1, a.completeCheckpoints()),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			ref := args[1]
			if f.format.value != "archive" {
				var err error
				if ref, err = fullName(ref); err != nil {
					return err
				}
			}
			got, cleanup, err := a.openCapture(ctx, args[0])
			defer cleanup()
			if err != nil {
				return err
			}
			if f.format.value == "archive" {
				return a.writeArchiveTo(ctx, ref, got, f)
			}
			return a.storeAs(ctx, ref, a.typed, got, f)
		},
	}
	addFormFlags(cmd, &f, "runnable", "index", "archive", "podman")
	a.addMaxSize(cmd)
	return cmd
}

// storeAs makes an image of a checkpoint and says its name.
func (a *app) storeAs(ctx context.Context, ref string, name naming, got *capture.Capture, f formFlags) (err error) {
	ctx, c, done, err := a.leased(ctx)
	if err != nil {
		return err
	}
	defer done()
	bar := a.progress(ref)
	defer bar.Done()
	desc, err := a.storeWithBase(ctx, c, got, f, bar)
	if err != nil {
		return err
	}
	img, err := name(ctx, c, ref, desc)
	if err != nil {
		return err
	}
	return a.printStored(stored{img.Name, desc.Digest.String()})
}

func (a *app) printStored(s stored) error {
	if a.json() {
		return printJSON(a.out, s)
	}
	_, err := fmt.Fprintln(a.out, s.Ref)
	return err
}

func (a *app) storeWithBase(ctx context.Context, c *client.Client, got *capture.Capture, f formFlags, bar *progress) (ocispec.Descriptor, error) {
	if got.Info.Version == 0 {
		return ocispec.Descriptor{}, errors.New("a folder of CRIU's images does not tell the container's spec and its changed files, so it cannot become an image")
	}
	var base ocispec.Descriptor
	if f.format.value != "podman" {
		var err error
		if base, err = a.findBase(ctx, c, got.Info.Base, false, bar); err != nil {
			return ocispec.Descriptor{}, err
		}
	}
	return storeContent(ctx, c, got, base, f.format.value, a.storeOptions(ctx, c, compressions[f.compress.value], bar))
}

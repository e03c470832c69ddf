package main

import (
	"context"
	"fmt"
	"io"

	ctrarchive "github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/platforms"
	"github.com/spf13/cobra"

	"github.com/stasis-run/stasis/checkpoint/archive"
	"github.com/stasis-run/stasis/checkpoint/capture"
)

func newExportCommand(a *app) *cobra.Command {
	var f formFlags
	cmd := &cobra.Command{
		Use:   "export REF FILE",
		Short: "Write a checkpoint to a file",
		Long: `Write a checkpoint to a file, or to stdout if that is "-". The format archive is
the one of Podman, CRI-O and the kubelet; oci is the image as it is, with all its
layers, in a tar that every tool for images reads. A file is there when all of it is,
for root alone; behind a link its target is replaced. To a device or a FIFO it is
written.`,
		Example: `  stasis export backup/db:1 db.tar.zst
  stasis export backup/db:1 - --compress none | ssh other stasis import - db:1
  stasis export backup/db:1 db-image.tar --format oci`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: firstArgs(1, a.completeCheckpoints()),
		RunE: func(cmd *cobra.Command, args []string) error {
			if f.format.value == "oci" {
				return a.exportOCI(cmd.Context(), args[0], args[1])
			}
			got, cleanup, err := a.openCapture(cmd.Context(), args[0])
			defer cleanup()
			if err != nil {
				return err
			}
			return a.writeArchiveTo(cmd.Context(), args[1], got, f)
		},
	}
	addFormFlags(cmd, &f, "archive", "oci")
	a.addMaxSize(cmd)
	return cmd
}

// writeArchiveTo writes an archive and says where it is.
func (a *app) writeArchiveTo(ctx context.Context, path string, c *capture.Capture, f formFlags) error {
	bar := a.progress(path)
	defer bar.Done()
	bar.Stage("write")
	err := a.writeTo(ctx, path, func(w io.Writer) error {
		return archive.Write(ctx, &counting{w: w, bar: bar}, c, compressions[f.compress.value])
	})
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return a.wroteFile(path)
}

// wroteFile says what file was written, unless that is stdout.
func (a *app) wroteFile(path string) error {
	switch {
	case isStdout(path):
		return nil
	case a.json():
		return printJSON(a.out, map[string]string{"file": path})
	}
	_, err := fmt.Fprintln(a.out, path)
	return err
}

func (a *app) exportOCI(ctx context.Context, ref, path string) error {
	c, err := a.connect(ctx)
	if err != nil {
		return err
	}
	img, err := findCheckpoint(ctx, c, ref)
	if err != nil {
		return err
	}
	bar := a.progress(path)
	defer bar.Done()
	bar.Stage("write")
	err = a.writeTo(ctx, path, func(w io.Writer) error {
		return c.Export(ctx, &counting{w: w, bar: bar}, ctrarchive.WithPlatform(platforms.All), ctrarchive.WithSkipDockerManifest(),
			ctrarchive.WithImage(c.ImageService(), img.Name))
	})
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return a.wroteFile(path)
}

// counting moves a bar with what passes through it.
type counting struct {
	w    io.Writer
	bar  *progress
	done int64
}

func (c *counting) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.done += int64(n)
	c.bar.Set(c.done, 0)
	return n, err
}

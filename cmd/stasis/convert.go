package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/stasis-run/stasis/node"
)

// formatFlags holds --format and --compress.
type formatFlags struct {
	format   choice
	compress choice
}

func addFormatFlags(cmd *cobra.Command, f *formatFlags, formats ...string) {
	f.format = choice{formats[0], formats}
	f.compress = choice{"zstd", []string{"zstd", "gzip", "none"}}
	cmd.Flags().Var(&f.format, "format", "format of the checkpoint")
	cmd.Flags().Var(&f.compress, "compress", "how it is compressed; the format index is always gzip")
	must(cmd.RegisterFlagCompletionFunc("format", f.format.complete))
	must(cmd.RegisterFlagCompletionFunc("compress", f.compress.complete))
}

func newConvertCommand(a *app) *cobra.Command {
	var f formatFlags
	cmd := &cobra.Command{
		Use:   "convert SOURCE DESTINATION",
		Short: "Make a checkpoint of another format",
		Long: `Make a checkpoint of another format out of one of any format: an image, an archive,
or a folder of CRIU's images. DESTINATION is the name of an image, or for an archive
a file ("-" is stdout).

The formats runnable and index consist in part of the image that the container was
made from, which is pulled if it is not here.`,
		Example: `  stasis convert checkpoint.tar.zst backup/db:1
  stasis convert backup/db:1 db.tar --format archive --compress none
  stasis convert backup/db:1 backup/db:podman --format podman`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: firstArgs(1, a.completeCheckpoints()),
		RunE: func(cmd *cobra.Command, args []string) error {
			if f.format.value == node.FormatArchive {
				r := node.ExportRequest{Checkpoint: args[0], Output: a.outputTo(args[1]), Compression: f.compress.value,
					MaxSize: int64(a.maxSize), Progress: a.progress()}
				if err := a.node().Export(cmd.Context(), r); err != nil {
					return err
				}
				return a.wroteFile(args[1])
			}
			img, err := a.node().Convert(cmd.Context(), node.ConvertRequest{Checkpoint: args[0], Ref: args[1], Format: f.format.value,
				Compression: f.compress.value, MaxSize: int64(a.maxSize), Progress: a.progress()})
			if err != nil {
				return err
			}
			return a.printImage(*img)
		},
	}
	addFormatFlags(cmd, &f, "runnable", "index", "archive", "podman")
	a.addMaxSize(cmd)
	return cmd
}

// printImage says what image a command made.
func (a *app) printImage(img node.Image) error {
	if a.json() {
		return printJSON(a.out, img)
	}
	_, err := fmt.Fprintln(a.out, img.Ref)
	return err
}

package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/stasis-run/stasis/node"
)

func newImportCommand(a *app) *cobra.Command {
	var f formatFlags
	cmd := &cobra.Command{
		Use:   "import FILE [REF]",
		Short: "Read a checkpoint from a file",
		Long: `Read a checkpoint from a file, or from stdin if that is "-", and keep it as the
image REF. The file is an archive of Podman, CRI-O or the kubelet, or an image in
an OCI layout, as "stasis export" writes them, compressed or not. From an archive
an image is made in the format of --format; an OCI image stays what it is. Without
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
			r := node.ImportRequest{File: args[0], Format: f.format.value, Compression: f.compress.value, MaxSize: int64(a.maxSize), Progress: a.progress()}
			if args[0] == "-" {
				r.Reader = a.in
			}
			if len(args) > 1 {
				r.Ref = args[1]
			}
			made, err := a.operations().Import(cmd.Context(), r)
			if err != nil {
				return err
			}
			if !made.OCI {
				return a.printImage(made.Images[0])
			}
			if a.json() {
				return printJSON(a.out, made.Images)
			}
			for _, img := range made.Images {
				fmt.Fprintln(a.out, img.Ref)
			}
			return nil
		},
	}
	addFormatFlags(cmd, &f, "runnable", "index", "podman")
	a.addMaxSize(cmd)
	return cmd
}

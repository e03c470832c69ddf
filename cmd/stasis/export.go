package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/stasis-run/stasis/node"
)

func newExportCommand(a *app) *cobra.Command {
	var f formatFlags
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
			r := node.ExportRequest{Checkpoint: args[0], Output: a.outputTo(args[1]), Format: f.format.value, Compression: f.compress.value,
				MaxSize: int64(a.maxSize), Progress: a.progress()}
			if err := a.operations().Export(cmd.Context(), r); err != nil {
				return err
			}
			return a.wroteFile(args[1])
		},
	}
	addFormatFlags(cmd, &f, "archive", "oci")
	a.addMaxSize(cmd)
	return cmd
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

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/node"
)

// newStageCommand copies a checkpoint for the shim; see capture.Fetched.
func newStageCommand(a *app) *cobra.Command {
	var container string
	var fromArchive bool
	cmd := &cobra.Command{
		Use:    "stage DIR [REF]",
		Short:  "Copy a checkpoint for the shim, which is about to restore it",
		Hidden: true,
		Args:   cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			ref := ""
			if len(args) > 1 {
				ref = args[1]
			}
			if fromArchive == (ref != "") {
				return usageError("either REF or --archive")
			}
			r := node.StageRequest{Dir: args[0], Ref: ref, Container: container}
			if fromArchive {
				f := os.NewFile(capture.FetchedArchive, "archive")
				defer f.Close()
				r.Archive = f
			}
			fetched, err := a.node().Stage(cmd.Context(), r)
			if err != nil {
				return err
			}
			if err := json.NewEncoder(a.out).Encode(fetched); err != nil {
				return errors.Join(err, os.RemoveAll(args[0]))
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&container, "container", "", "`ID` of the container that it is for")
	cmd.Flags().BoolVar(&fromArchive, "archive", false, fmt.Sprintf("read an archive from descriptor %d", capture.FetchedArchive))
	return cmd
}

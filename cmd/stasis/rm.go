package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"
)

func newRmCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:     "rm REF...",
		Aliases: []string{"remove"},
		Short:   "Remove checkpoints from containerd's image store",
		Long: `Remove checkpoints from containerd's image store. containerd then frees what no
other image needs; the image that a container was made from stays. An image that
is no checkpoint is refused.`,
		Example:           `  stasis rm backup/db:1 backup/db:2`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: a.completeCheckpoints(),
		RunE: func(cmd *cobra.Command, args []string) error {
			removed, err := a.operations().Remove(cmd.Context(), args...)
			if removed == nil {
				return err
			}
			if a.json() {
				return errors.Join(err, printJSON(a.out, removed))
			}
			for _, name := range removed {
				fmt.Fprintln(a.out, name)
			}
			return err
		},
	}
}

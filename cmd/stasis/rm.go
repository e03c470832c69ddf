package main

import (
	"errors"
	"fmt"

	"github.com/containerd/containerd/v2/core/images"
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
			ctx := cmd.Context()
			c, err := a.connect(ctx)
			if err != nil {
				return err
			}
			var failed []error
			removed := []string{}
			for _, arg := range args {
				img, err := findCheckpoint(ctx, c, arg)
				if err == nil {
					// Returns when the content is gone as well.
					err = c.ImageService().Delete(ctx, img.Name, images.SynchronousDelete())
				}
				if err != nil {
					failed = append(failed, fmt.Errorf("remove %s: %w", arg, err))
					continue
				}
				removed = append(removed, img.Name)
			}
			if a.json() {
				return errors.Join(append(failed, printJSON(a.out, removed))...)
			}
			for _, name := range removed {
				fmt.Fprintln(a.out, name)
			}
			return errors.Join(failed...)
		},
	}
}

package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
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
					err = removeImage(ctx, c, img.Name, img.Target.Digest)
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

// removeImage removes a checkpoint from the image store, and returns when its
// content is gone as well.
func removeImage(ctx context.Context, c *client.Client, name string, target digest.Digest) error {
	records := c.ImageService()
	same, err := records.List(ctx, fmt.Sprintf("target.digest==%q", target))
	if err != nil {
		return err
	}
	same = slices.DeleteFunc(same, func(img images.Image) bool { return img.Name == name })
	// The last name takes the one with it that would keep the content.
	if !slices.ContainsFunc(same, func(img images.Image) bool { return !ofCRI(img) }) {
		for _, img := range same {
			if err := records.Delete(ctx, img.Name); err != nil && !errdefs.IsNotFound(err) {
				return err
			}
		}
	}
	return records.Delete(ctx, name, images.SynchronousDelete())
}

// ofCRI tells whether a record is the second that containerd's CRI makes of each
// image in its namespace, named after the image's ID.
func ofCRI(img images.Image) bool {
	return strings.HasPrefix(img.Name, "sha256:") && img.Labels["io.cri-containerd.image"] != ""
}

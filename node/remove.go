package node

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
)

// Remove removes checkpoints from containerd's image store, and returns when what no
// other image needs is gone. It returns the full names of those that are removed, also if
// there is an error. An image that is no checkpoint is refused.
func (n *Node) Remove(ctx context.Context, refs ...string) ([]string, error) {
	c, err := n.Client(ctx)
	if err != nil {
		return nil, err
	}
	var failed []error
	removed := []string{}
	for _, ref := range refs {
		img, err := findCheckpoint(ctx, c, ref)
		if err == nil {
			err = removeImage(ctx, c, img.Name, img.Target.Digest)
		}
		if err != nil {
			failed = append(failed, fmt.Errorf("remove %s: %w", ref, err))
			continue
		}
		removed = append(removed, img.Name)
	}
	return removed, errors.Join(failed...)
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

package node

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/image-spec/identity"
)

// refused undoes what a restore has fetched and unpacked for a checkpoint that asks
// for too much. Its image and layers go if they were not there before.
type refused struct {
	c           *client.Client
	arg         string
	present     bool // the image, before
	img         client.Image
	snapshotter string
	layers      []string // chain IDs that were not there before, from the bottom up
}

func refusable(ctx context.Context, c *client.Client, arg string) *refused {
	_, err := localImage(ctx, c, arg)
	return &refused{c: c, arg: arg, present: !errdefs.IsNotFound(err)}
}

// unpacking notes which layers are about to be unpacked.
func (r *refused) unpacking(ctx context.Context, img client.Image, snapshotter string) error {
	r.img, r.snapshotter = img, defaultSnapshotter(ctx, r.c, snapshotter)
	diffs, err := img.RootFS(ctx)
	if err != nil {
		return err
	}
	for i := range diffs {
		id := identity.ChainID(diffs[:i+1]).String()
		if _, err := r.c.SnapshotService(r.snapshotter).Stat(ctx, id); errdefs.IsNotFound(err) {
			r.layers = append(r.layers, id)
		}
	}
	return nil
}

// undo returns err, and whatever could not be undone.
func (r *refused) undo(ctx context.Context, err error) error {
	if !errdefs.IsPermissionDenied(err) {
		return err
	}
	ctx = context.WithoutCancel(ctx)
	for i := len(r.layers) - 1; i >= 0; i-- {
		// Another image may have come to share it.
		rerr := r.c.SnapshotService(r.snapshotter).Remove(ctx, r.layers[i])
		if rerr != nil && !errdefs.IsNotFound(rerr) && !errdefs.IsFailedPrecondition(rerr) {
			err = errors.Join(err, fmt.Errorf("remove the unpacked checkpoint: %w", rerr))
		}
	}
	if len(r.layers) > 0 {
		if config, cerr := r.img.Config(ctx); cerr == nil {
			label := "containerd.io/gc.ref.snapshot." + r.snapshotter
			_, cerr = r.c.ContentStore().Update(ctx, content.Info{Digest: config.Digest, Labels: map[string]string{label: ""}}, "labels."+label)
			if cerr != nil {
				err = errors.Join(err, cerr)
			}
		}
	}
	if r.present {
		return err
	}
	img, ierr := localImage(ctx, r.c, r.arg)
	if ierr == nil {
		ierr = r.c.ImageService().Delete(ctx, img.Name)
	}
	if ierr != nil && !errdefs.IsNotFound(ierr) {
		err = errors.Join(err, fmt.Errorf("remove the image again: %w", ierr))
	}
	return err
}

// defaultSnapshotter is containerd's choice if none is named.
func defaultSnapshotter(ctx context.Context, c *client.Client, name string) string {
	if name == "" {
		name, _ = c.GetLabel(ctx, "containerd.io/defaults/snapshotter")
	}
	if name == "" {
		name = "overlayfs"
	}
	return name
}

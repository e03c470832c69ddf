package node

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"

	"github.com/stasis-run/stasis/checkpoint/oci"
	"github.com/stasis-run/stasis/checkpoint/sign"
)

// ListRequest says which checkpoints to list. What is empty does not matter.
type ListRequest struct {
	Container string // its name, its ID, or NAMESPACE/POD/NAME
	Format    string
}

// Listed is a checkpoint in containerd's image store.
type Listed struct {
	Ref    string `json:"ref"`
	Digest string `json:"digest"`
	// Created is when the checkpoint was made; if it does not tell, when the
	// image came here.
	Created time.Time `json:"created"`
	oci.Summary
	// KeyTrusted: SignedBy has a key that is trusted here, and the first is one. What
	// the checkpoint says of its signers is not verified; Verify does that.
	KeyTrusted bool `json:"key_trusted"`
	// Broken says why the checkpoint cannot be read.
	Broken string `json:"broken,omitempty"`
}

// Bytes is what the checkpoint takes besides its base image.
func (l Listed) Bytes() int64 { return l.Checkpoint + l.Layer }

// Owner names the container that a checkpoint is of.
func (l Listed) Owner() string {
	if p := l.Info.Pod; p != nil {
		return p.Namespace + "/" + p.Name + "/" + l.Info.ContainerName
	}
	return l.Info.ContainerName
}

// of tells whether a checkpoint is of the container that a user names: by name,
// with its pod or without, or by ID.
func (l Listed) of(container string) bool {
	return container == l.Info.ContainerName || container == l.Info.ContainerID || container == l.Owner()
}

// List lists the checkpoints in containerd's image store, the newest first.
func (n *Node) List(ctx context.Context, r ListRequest) ([]Listed, error) {
	c, err := n.Client(ctx)
	if err != nil {
		return nil, err
	}
	list, err := n.list(ctx, c)
	return slices.DeleteFunc(list, func(l Listed) bool {
		return r.Container != "" && !l.of(r.Container) || r.Format != "" && string(l.Format) != r.Format
	}), err
}

// list lists the checkpoints in the image store, the newest first.
// Whoever pulled one, it is there: labels are not looked at.
func (n *Node) list(ctx context.Context, c *client.Client) ([]Listed, error) {
	all, err := c.ImageService().List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	trust, err := n.keys.Trust()
	if err != nil {
		return nil, err
	}
	found := []Listed{}
	for _, img := range all {
		if ofCRI(img) {
			continue // it has another name
		}
		l := Listed{Ref: img.Name, Digest: img.Target.Digest.String(), Created: img.CreatedAt}
		l.Summary, err = oci.ReadInfo(ctx, c.ContentStore(), img.Target)
		switch {
		case ctx.Err() != nil:
			return nil, context.Cause(ctx)
		case err != nil && img.Labels[oci.AnnotationCheckpoint] == "":
			continue // some image that is only partly here
		case err != nil:
			l.Format, l.Broken = oci.Format(img.Labels[oci.AnnotationCheckpoint]), err.Error()
			if errdefs.IsNotFound(err) {
				l.Broken = "not all of it is here; pull it again"
			}
		case l.Format == oci.None:
			continue
		}
		if at := l.Info.Checkpointed; !at.IsZero() {
			l.Created = at
		}
		l.KeyTrusted = trustedFirst(l.SignedBy, trust.Keys())
		found = append(found, l)
	}
	slices.SortStableFunc(found, func(a, b Listed) int {
		if n := b.Created.Compare(a.Created); n != 0 {
			return n
		}
		return strings.Compare(a.Ref, b.Ref)
	})
	return found, nil
}

// trustedFirst moves the keys that are trusted to the front, and tells whether there
// are any.
func trustedFirst(ids []string, trusted []sign.Signer) bool {
	rank := func(id string) int {
		if slices.ContainsFunc(trusted, func(s sign.Signer) bool { return s.KeyID == id }) {
			return 0
		}
		return 1
	}
	slices.SortStableFunc(ids, func(a, b string) int { return rank(a) - rank(b) })
	return len(ids) > 0 && rank(ids[0]) == 0
}

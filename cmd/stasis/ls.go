package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/stasis-run/stasis/checkpoint/image"
	"github.com/stasis-run/stasis/checkpoint/sign"
)

// listed is a checkpoint in containerd's image store.
type listed struct {
	Ref    string `json:"ref"`
	Digest string `json:"digest"`
	// Created is when the checkpoint was made; if it does not tell, when the
	// image came here.
	Created time.Time `json:"created"`
	image.Summary
	// KeyTrusted: SignedBy has a key that is trusted here.
	KeyTrusted bool `json:"key_trusted"`
	// Broken says why the checkpoint cannot be read.
	Broken string `json:"broken,omitempty"`
}

// bytes is what the checkpoint takes besides its base image.
func (l listed) bytes() int64 { return l.Checkpoint + l.Layer }

// owner names the container that a checkpoint is of.
func (l listed) owner() string {
	if p := l.Info.Pod; p != nil {
		return p.Namespace + "/" + p.Name + "/" + l.Info.ContainerName
	}
	return l.Info.ContainerName
}

// signer is the key by which a checkpoint says it is signed, for people.
func (l listed) signer() string {
	switch {
	case len(l.SignedBy) == 0:
		return ""
	case l.KeyTrusted:
		return sign.Short(l.SignedBy[0])
	}
	return sign.Short(l.SignedBy[0]) + "?"
}

// of tells whether a checkpoint is of the container that a user names: by name,
// with its pod or without, or by ID.
func (l listed) of(container string) bool {
	return container == l.Info.ContainerName || container == l.Info.ContainerID || container == l.owner()
}

// checkpoints lists the checkpoints in the image store, the newest first.
// Whoever pulled one, it is there: labels are not looked at.
func checkpoints(ctx context.Context, c *client.Client) ([]listed, error) {
	all, err := c.ImageService().List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	trust, err := sign.DefaultDir().Trust()
	if err != nil {
		return nil, err
	}
	found := []listed{}
	for _, img := range all {
		if ofCRI(img) {
			continue // it has another name
		}
		l := listed{Ref: img.Name, Digest: img.Target.Digest.String(), Created: img.CreatedAt}
		l.Summary, err = image.ReadInfo(ctx, c.ContentStore(), img.Target)
		switch {
		case ctx.Err() != nil:
			return nil, context.Cause(ctx)
		case err != nil && img.Labels[image.AnnotationCheckpoint] == "":
			continue // some image that is only partly here
		case err != nil:
			l.Form, l.Broken = image.Form(img.Labels[image.AnnotationCheckpoint]), err.Error()
			if errdefs.IsNotFound(err) {
				l.Broken = "not all of it is here; pull it again"
			}
		case l.Form == image.None:
			continue
		}
		if at := l.Info.Checkpointed; !at.IsZero() {
			l.Created = at
		}
		l.KeyTrusted = slices.ContainsFunc(trust.Keys(), func(s sign.Signer) bool { return slices.Contains(l.SignedBy, s.KeyID) })
		found = append(found, l)
	}
	slices.SortStableFunc(found, func(a, b listed) int {
		if n := b.Created.Compare(a.Created); n != 0 {
			return n
		}
		return strings.Compare(a.Ref, b.Ref)
	})
	return found, nil
}

func newLsCommand(a *app) *cobra.Command {
	var container string
	form := choice{"", []string{"runnable", "index", "podman"}}
	cmd := &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List the checkpoints in containerd's image store",
		Long: `List the checkpoints in containerd's image store, the newest first. SIZE is what
one takes besides the image that its container was made from. SIGNED BY is the key by
which it says it is signed, which "stasis verify" proves: with ? it is not trusted here.`,
		Example: `  stasis ls
  stasis ls --container db
  stasis ls -o json | jq -r '.[].ref'`,
		Args:              cobra.NoArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.connect(cmd.Context())
			if err != nil {
				return err
			}
			list, err := checkpoints(cmd.Context(), c)
			if err != nil {
				return err
			}
			list = slices.DeleteFunc(list, func(l listed) bool {
				return container != "" && !l.of(container) || form.value != "" && string(l.Form) != form.value
			})
			if a.json() {
				return printJSON(a.out, list)
			}
			return printList(a, list, time.Now())
		},
	}
	cmd.Flags().StringVar(&container, "container", "", "only those of this container: name, ID, or NAMESPACE/POD/NAME")
	cmd.Flags().Var(&form, "format", "only those of this form")
	must(cmd.RegisterFlagCompletionFunc("container", a.completeContainers()))
	must(cmd.RegisterFlagCompletionFunc("format", form.complete))
	return cmd
}

func printList(a *app, list []listed, now time.Time) error {
	t := newTable(a.out, "REF", "CONTAINER", "FORM", "SIZE", "CREATED", "SIGNED BY", "BASE")
	for _, l := range list {
		if l.Broken != "" {
			t.row(l.Ref, l.owner(), string(l.Form), "", ago(l.Created, now), "", "("+l.Broken+")")
			continue
		}
		t.row(l.Ref, l.owner(), string(l.Form), size(l.bytes()), ago(l.Created, now), l.signer(), l.Info.Base.Name)
	}
	return t.end()
}

package main

import (
	"time"

	"github.com/spf13/cobra"

	"github.com/stasis-run/stasis/checkpoint/sign"
	"github.com/stasis-run/stasis/node"
)

// signer is the key by which a checkpoint says it is signed, for people: a trusted one
// if it has any.
func signer(l node.Listed) string {
	switch {
	case len(l.SignedBy) == 0:
		return ""
	case l.KeyTrusted:
		return sign.Short(l.SignedBy[0])
	}
	return sign.Short(l.SignedBy[0]) + "?"
}

func newLsCommand(a *app) *cobra.Command {
	var container string
	format := choice{"", []string{"runnable", "index", "podman"}}
	cmd := &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List the checkpoints in containerd's image store",
		Long: `List the checkpoints in containerd's image store, the newest first. SIZE is what
one takes besides the image that its container was made from. SIGNED BY is the key that
a checkpoint names as its signer, or one that is trusted here if it names several; with
? none is. No signature is verified here: "stasis verify" does that.`,
		Example: `  stasis ls
  stasis ls --container db
  stasis ls -o json | jq -r '.[].ref'`,
		Args:              cobra.NoArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			list, err := a.operations().List(cmd.Context(), node.ListRequest{Container: container, Format: format.value})
			if err != nil {
				return err
			}
			if a.json() {
				return printJSON(a.out, list)
			}
			return printList(a, list, time.Now())
		},
	}
	cmd.Flags().StringVar(&container, "container", "", "only those of this container: name, ID, or NAMESPACE/POD/NAME")
	cmd.Flags().Var(&format, "format", "only checkpoints of this format")
	must(cmd.RegisterFlagCompletionFunc("container", a.completeContainers()))
	must(cmd.RegisterFlagCompletionFunc("format", format.complete))
	return cmd
}

func printList(a *app, list []node.Listed, now time.Time) error {
	t := newTable(a.out, "REF", "CONTAINER", "FORMAT", "SIZE", "CREATED", "SIGNED BY", "BASE")
	for _, l := range list {
		if l.Broken != "" {
			t.row(l.Ref, l.Owner(), string(l.Format), "", ago(l.Created, now), "", "("+l.Broken+")")
			continue
		}
		t.row(l.Ref, l.Owner(), string(l.Format), size(l.Bytes()), ago(l.Created, now), signer(l), l.Info.Base.Name)
	}
	return t.end()
}

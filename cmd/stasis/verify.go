package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/stasis-run/stasis/node"
)

func newVerifyCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "verify CHECKPOINT",
		Short: "Tell who signed a checkpoint, and whether it is as it was made",
		Long: `Tell who signed a checkpoint, and whether it is as it was made: all its files are
read and compared with what was signed. CHECKPOINT is an image, an archive, or a
folder of CRIU's images.

The exit code is 0 if a key has signed it that this node trusts, and all is as it was
signed; else 1. What was signed are the processes: CRIU's images, whose they are and
the digest of the container's spec. The files that the container has changed, and those
of its image, are not.`,
		Example: `  stasis verify backup/db:1
  stasis verify checkpoint.tar.zst && stasis restore checkpoint.tar.zst
  stasis verify backup/db:1 -o json | jq -r '.signers[].key'`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: firstArgs(1, a.completeCheckpoints()),
		RunE: func(cmd *cobra.Command, args []string) error {
			v, why := a.operations().Verify(cmd.Context(), args[0])
			if v == nil {
				return why
			}
			if a.json() {
				if err := printJSON(a.out, v); err != nil {
					return err
				}
			} else if err := printVerification(a, v); err != nil {
				return err
			}
			return why
		},
	}
}

func printVerification(a *app, v *node.Verification) error {
	t := newTable(a.out)
	for _, s := range v.Signers {
		t.row("Signed by", s.KeyID+" ("+s.Whose()+")")
	}
	for _, id := range v.Unknown {
		t.row("Signed by", id+" (not trusted here, and not verified)")
	}
	if c := v.Container; c != nil {
		t.row("Container", c.ID)
		t.row("Namespace", c.Namespace)
		if c.Pod != nil {
			t.row("Pod", c.Pod.Namespace+"/"+c.Pod.Name+"/"+c.Name)
		}
		t.row("Image's config", c.BaseConfig)
		t.row("Host", v.Host)
		t.row("Checkpointed", v.Created.Format(time.RFC3339))
		spec := "as it was signed"
		if !v.SpecSigned {
			spec = "another than was signed, or none"
		}
		t.row("Spec", spec)
		t.row("Files", "as they were signed")
	}
	return t.end()
}

// newSignCommand signs what another has made, or what was made before there were
// signatures.
func newSignCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "sign REF",
		Short: "Sign a checkpoint that has no signature of this node",
		Long: `Sign the checkpoint that an image holds with this node's key, and so vouch for it: pods
then restore it wherever that key is trusted, in the namespace that it says it is of.
Look at it before (stasis inspect). It is for checkpoints of other engines, and of
versions of Stasis that did not sign. Signatures of others stay. What its spec asks for
still needs the flags of stasis restore.

The image is written anew, in the same format, and REF names that; other names of the
old image stay with the old one.`,
		Example: `  stasis import checkpoint.tar backup/db:1
  stasis sign backup/db:1`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: firstArgs(1, a.completeCheckpoints()),
		RunE: func(cmd *cobra.Command, args []string) error {
			r := node.SignRequest{Ref: args[0], Progress: a.progress()}
			signed, err := a.node().Sign(cmd.Context(), r)
			if err != nil {
				return err
			}
			if signed.Already {
				fmt.Fprintf(a.err, "stasis: %s has a signature of this node already\n", signed.Ref)
			}
			return a.printImage(signed.Image)
		},
	}
}

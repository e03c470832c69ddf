package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/image"
	"github.com/stasis-run/stasis/checkpoint/sign"
)

// verification is what `stasis verify -o json` prints.
type verification struct {
	Checkpoint string `json:"checkpoint"`
	// Trusted: a key that is trusted here has signed it.
	Trusted bool          `json:"trusted"`
	Signers []sign.Signer `json:"signers"`
	// Unknown are keys that are not trusted, by which it says it is signed.
	Unknown []string `json:"unknown_keys,omitempty"`
	// Container, Host and Created are what was signed.
	Container *checkpoint.Container `json:"container,omitempty"`
	Host      string                `json:"host,omitempty"`
	Created   time.Time             `json:"created,omitzero"`
	// SpecSigned: the spec that comes with it is the one that was signed.
	SpecSigned bool `json:"spec_signed"`
}

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
			c, cleanup, err := a.openCapture(cmd.Context(), args[0])
			defer cleanup()
			if err != nil {
				return err
			}
			v, why := verify(cmd.Context(), c)
			if v == nil {
				return why
			}
			v.Checkpoint = args[0]
			if a.json() {
				if err := printJSON(a.out, v); err != nil {
					return err
				}
			} else if err := v.print(a); err != nil {
				return err
			}
			return why
		},
	}
}

// verify returns what is found, and an error unless it is good: nil and an error if
// something was altered.
func verify(ctx context.Context, c *capture.Capture) (*verification, error) {
	trust, err := sign.DefaultDir().Trust()
	if err != nil {
		return nil, err
	}
	o := checkpoint.OpenOptions{Trust: trust, Reread: true, AnyHost: true}
	img, err := checkpoint.OpenWith(ctx, c.Images, o)
	if err != nil {
		return nil, err
	}
	v := &verification{Signers: append([]sign.Signer{}, img.Verdict().Signers...), Unknown: img.Verdict().Unknown}
	_, v.Trusted = img.Signer()
	if m := img.Manifest(); m != nil && v.Trusted {
		v.Container, v.Host, v.Created = &m.Container, m.Host, m.Created
		v.SpecSigned = img.RanWith(c.Spec)
	}
	return v, img.CheckSigned(trust)
}

func (v *verification) print(a *app) error {
	t := newTable(a.out)
	for _, s := range v.Signers {
		t.row("Signed by", s.KeyID+" ("+whose(s)+")")
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

// signersOf says for people who has signed the checkpoint in a folder, by its manifest
// alone; the files are not read.
func signersOf(dir string) (signers []sign.Signer, says string, err error) {
	trust, err := sign.DefaultDir().Trust()
	if err != nil {
		return nil, "", err
	}
	v, err := checkpoint.SignedBy(dir, trust)
	if err != nil {
		return nil, "not valid: " + err.Error(), nil
	}
	var list []string
	for _, s := range v.Signers {
		list = append(list, sign.Short(s.KeyID)+" ("+whose(s)+")")
	}
	for _, id := range v.Unknown {
		list = append(list, sign.Short(id)+" (not trusted here)")
	}
	if list == nil {
		list = []string{"nobody"}
	}
	return v.Signers, strings.Join(list, ", "), nil
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

The image is written anew, in the same form, and REF names that; other names of the
old image stay with the old one.`,
		Example: `  stasis import checkpoint.tar backup/db:1
  stasis sign backup/db:1`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: firstArgs(1, a.completeCheckpoints()),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.sign(cmd.Context(), args[0])
		},
	}
}

func (a *app) sign(ctx context.Context, ref string) error {
	c, err := a.connect(ctx)
	if err != nil {
		return err
	}
	record, err := findCheckpoint(ctx, c, ref)
	if err != nil {
		return err
	}
	form, err := image.Detect(ctx, c.ContentStore(), record.Target)
	if err != nil {
		return err
	}
	dir := sign.DefaultDir()
	key, err := dir.Key()
	if err != nil {
		return err
	}
	got, cleanup, err := a.unpacked(func(dir string) (*capture.Capture, error) {
		return image.Read(ctx, c.ContentStore(), record.Target, dir)
	})
	defer cleanup()
	if err != nil {
		return err
	}
	signers, _, err := signersOf(got.Images)
	if err != nil {
		return err
	}
	for _, s := range signers {
		if s.Own {
			fmt.Fprintf(a.err, "stasis: %s has a signature of this node already\n", record.Name)
			return a.printStored(stored{record.Name, record.Target.Digest.String()})
		}
	}
	if err := checkpoint.Sign(ctx, got.Images, key, manifestOf(got)); err != nil {
		return err
	}
	var f formFlags
	f.format.value, f.compress.value = string(form), "zstd"
	return a.storeAs(ctx, record.Name, a.typed, got, f)
}

// manifestOf is what a checkpoint without a manifest says of itself.
func manifestOf(c *capture.Capture) checkpoint.Manifest {
	i := c.Info
	m := checkpoint.Manifest{
		Created: i.Checkpointed,
		Container: checkpoint.Container{
			ID: i.ContainerID, Namespace: i.Namespace, Name: i.ContainerName, BaseConfig: i.Base.Config,
		},
		CRIU:         i.CRIU,
		Runtime:      checkpoint.Runtime{Name: i.OCIRuntime.Name, Version: i.OCIRuntime.Version},
		Kernel:       i.Host.Kernel,
		Architecture: i.Host.Architecture,
	}
	if i.Pod != nil {
		m.Container.Pod = &checkpoint.Pod{Name: i.Pod.Name, Namespace: i.Pod.Namespace, UID: i.Pod.UID}
	}
	m.Container.SpecDigest, _ = checkpoint.SpecDigest(c.Spec)
	return m
}

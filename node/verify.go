package node

import (
	"context"
	"time"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/oci"
	"github.com/stasis-run/stasis/checkpoint/sign"
)

// Verification is what Verify has found.
type Verification struct {
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

// Verify tells who signed a checkpoint, which is an image, an archive, or a folder of
// CRIU's images; and whether it is as it was made: all its files are read. It returns an
// error unless a trusted key has signed it and all is as it was signed; and no
// Verification if something was altered.
func (n *Node) Verify(ctx context.Context, ref string) (*Verification, error) {
	c, cleanup, err := n.openCapture(ctx, ref, 0)
	defer cleanup()
	if err != nil {
		return nil, err
	}
	trust, err := n.keys.Trust()
	if err != nil {
		return nil, err
	}
	o := checkpoint.OpenOptions{Trust: trust, Reread: true, AnyHost: true}
	img, err := checkpoint.OpenWith(ctx, c.Images, o)
	if err != nil {
		return nil, err
	}
	v := &Verification{Checkpoint: ref, Signers: append([]sign.Signer{}, img.Verdict().Signers...), Unknown: img.Verdict().Unknown}
	_, v.Trusted = img.Signer()
	if m := img.Manifest(); m != nil && v.Trusted {
		v.Container, v.Host, v.Created = &m.Container, m.Host, m.Created
		v.SpecSigned = img.RanWith(c.Spec)
	}
	return v, img.CheckSigned(trust)
}

// SignRequest says which checkpoint to sign.
type SignRequest struct {
	Ref      string // an image
	Progress Progress
}

// SignResult is the image that holds the signed checkpoint.
type SignResult struct {
	Image
	// Already: this node has signed it before, and nothing was done.
	Already bool
}

// Sign signs the checkpoint that an image holds with this node's key. The image is
// written anew, in the same format, and gets the name of the old one.
func (n *Node) Sign(ctx context.Context, r SignRequest) (*SignResult, error) {
	c, err := n.Client(ctx)
	if err != nil {
		return nil, err
	}
	record, err := findCheckpoint(ctx, c, r.Ref)
	if err != nil {
		return nil, err
	}
	format, err := oci.Detect(ctx, c.ContentStore(), record.Target)
	if err != nil {
		return nil, err
	}
	key, err := n.keys.Key()
	if err != nil {
		return nil, err
	}
	got, cleanup, err := n.unpacked(func(dir string) (*capture.Capture, error) {
		return oci.Read(ctx, c.ContentStore(), record.Target, dir)
	})
	defer cleanup()
	if err != nil {
		return nil, err
	}
	trust, err := n.keys.Trust()
	if err != nil {
		return nil, err
	}
	// Signatures that are not valid are no reason not to add one.
	if verdict, err := checkpoint.SignedBy(got.Images, trust); err == nil {
		for _, s := range verdict.Signers {
			if s.Own {
				return &SignResult{Image{record.Name, record.Target.Digest.String()}, true}, nil
			}
		}
	}
	if err := checkpoint.Sign(ctx, got.Images, key, manifestOf(got)); err != nil {
		return nil, err
	}
	img, err := n.storeAs(ctx, record.Name, typed, got, string(format), "zstd", r.Progress)
	if err != nil {
		return nil, err
	}
	return &SignResult{Image: *img}, nil
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

package node

import (
	"context"
	"os"
	"slices"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/inspect"
	"github.com/stasis-run/stasis/checkpoint/policy/allow"
	"github.com/stasis-run/stasis/checkpoint/sign"
)

// InspectRequest names a checkpoint: an image, an archive, or a folder of CRIU's images.
type InspectRequest struct {
	Checkpoint string
	// Secrets adds the environment of the processes to what is told.
	Secrets bool
	// MaxSize is how many bytes it may have unpacked; 0: half of what is free on the
	// disk.
	MaxSize int64
}

// Inspection is what is in a checkpoint.
type Inspection struct {
	// Info says where the checkpoint came from; nil for a folder of images.
	Info *capture.Info `json:"info,omitempty"`
	// Signers are those that have signed it and are trusted here; the files are not
	// compared with what they have signed, which Verify does.
	Signers []sign.Signer `json:"signers"`
	// Unknown are keys that are not trusted, by which it says it is signed. Invalid
	// says why its signatures are of no use; empty if they may be.
	Unknown []string `json:"unknown_keys,omitempty"`
	Invalid string   `json:"invalid_signature,omitempty"`
	*inspect.Report
	// AsksFor is what its spec asks for beyond an ordinary container, and what
	// becomes of it in a restore without grants; nil if there is no spec.
	AsksFor []allow.Ask `json:"asks_for,omitzero"`
}

// Inspect tells what is in a checkpoint.
func (n *Node) Inspect(ctx context.Context, r InspectRequest) (*Inspection, error) {
	c, cleanup, err := n.openCapture(ctx, r.Checkpoint, r.MaxSize)
	defer cleanup()
	if err != nil {
		return nil, err
	}
	in := &Inspection{Signers: []sign.Signer{}}
	if in.Report, err = inspect.Inspect(ctx, c.Images, inspect.Options{Environment: r.Secrets}); err != nil {
		return nil, err
	}
	if c.Info.Version != 0 {
		in.Info = &c.Info
	}
	trust, err := n.keys.Trust()
	if err != nil {
		return nil, err
	}
	// By its manifest alone; the files are not read.
	verdict, err := checkpoint.SignedBy(c.Images, trust)
	if err != nil {
		in.Invalid = err.Error()
	} else {
		in.Signers, in.Unknown = append(in.Signers, verdict.Signers...), verdict.Unknown
	}
	if c.Spec != nil {
		in.AsksFor = asksFor(ctx, c)
	}
	return in, nil
}

// asksFor lists what the spec of a checkpoint asks for.
func asksFor(ctx context.Context, c *capture.Capture) []allow.Ask {
	asked, unknown, err := allow.Parse(c.Spec)
	if err != nil {
		return []allow.Ask{{Field: "spec", What: err.Error(), Verdict: allow.Never}}
	}
	// The error says the same as the list.
	_, asks, _ := allow.New(asked, unknown, allow.Options{
		Namespace: namespaceOf(ctx), OldNamespace: c.Info.Namespace, Systemd: exists("/run/systemd/system"), Host: allow.ThisHost(),
	})
	return slices.Concat([]allow.Ask{}, asks) // not nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

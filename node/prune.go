package node

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/opencontainers/go-digest"
)

// PruneRequest says which checkpoints to remove: those that all of Keep, OlderThan and
// Container allow. With neither Keep nor OlderThan, none is removed.
type PruneRequest struct {
	// Keep is how many checkpoints of each container stay, the newest; nil: it does not
	// matter.
	Keep *int
	// OlderThan removes only what is older; 0: it does not matter.
	OlderThan time.Duration
	// Container is of whose checkpoints only; see ListRequest.
	Container string
	// DryRun removes nothing.
	DryRun bool
}

// PruneResult is what was removed, or with DryRun would be.
type PruneResult struct {
	Checkpoints []Listed `json:"checkpoints"`
	// Leftovers are folders of operations that did not end.
	Leftovers []string `json:"leftovers"`
	// Leases are those of such operations in containerd, as NAMESPACE/ID.
	Leases []string `json:"leases"`
}

// Prune removes old checkpoints, and what operations that did not end have left in the
// state folder and in all of containerd's namespaces. The result is of what is removed,
// also if there is an error; it is nil if nothing was tried. That containerd cannot be
// reached is an error only if checkpoints are to be removed.
func (n *Node) Prune(ctx context.Context, r PruneRequest) (*PruneResult, error) {
	result := &PruneResult{Checkpoints: []Listed{}, Leftovers: []string{}, Leases: []string{}}
	var failed []error
	choosing := r.Keep != nil || r.OlderThan > 0
	c, err := n.Client(ctx)
	if err != nil && choosing {
		return nil, err
	}
	if choosing {
		all, err := n.list(ctx, c)
		if err != nil {
			return nil, err
		}
		for _, l := range r.choose(all, time.Now()) {
			if err := r.remove(ctx, c, l); err != nil {
				failed = append(failed, fmt.Errorf("remove %s: %w", l.Ref, err))
				continue
			}
			result.Checkpoints = append(result.Checkpoints, l)
		}
	}
	failed = append(failed, n.leftovers(workFolder, func(w *work) error {
		result.Leftovers = append(result.Leftovers, w.dir)
		if r.DryRun {
			w.release()
			return nil
		}
		if err := n.resumeLeft(ctx, w.dir); err != nil {
			w.release()
			return err
		}
		return w.remove()
	}))
	if err != nil {
		// The folders do not need it.
		n.log.Warn("what is left in containerd is not removed: " + err.Error())
	} else {
		result.Leases, err = n.endLeases(ctx, c, r.DryRun)
		failed = append(failed, err)
	}
	return result, errors.Join(failed...)
}

func (r PruneRequest) remove(ctx context.Context, c *client.Client, l Listed) error {
	if r.DryRun {
		return nil
	}
	return removeImage(ctx, c, l.Ref, digest.Digest(l.Digest))
}

// choose returns those of a list, sorted with the newest first, that go.
func (r PruneRequest) choose(all []Listed, now time.Time) (gone []Listed) {
	if r.Keep == nil && r.OlderThan == 0 {
		return nil
	}
	kept := map[string]int{}
	for _, l := range all {
		if r.Container != "" && !l.of(r.Container) {
			continue
		}
		// The same container in two of containerd's namespaces is two, but only
		// one of those is looked at.
		young := r.OlderThan > 0 && now.Sub(l.Created) < r.OlderThan
		if owner := l.Owner(); young || r.Keep != nil && kept[owner] < *r.Keep {
			kept[owner]++
			continue
		}
		gone = append(gone, l)
	}
	return gone
}

package node

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/namespaces"

	"github.com/stasis-run/stasis/checkpoint/oci"
)

// A lease in containerd names its owner: a folder in the state folder that is locked as
// long as the operation goes on. One that is not locked any more is that of an operation
// whose process has died, or that could not end its lease. So it does not matter how long
// a process lives, nor in which namespaces; of a lease whose owner is in another state
// folder, nobody knows.
const ownersFolder = "leases"

// leased is Client with a context that keeps what is stored with it from
// containerd's garbage collector, until done is called.
func (n *Node) leased(ctx context.Context) (_ context.Context, _ *client.Client, done func(), _ error) {
	c, err := n.Client(ctx)
	if err != nil {
		return ctx, nil, nil, err
	}
	ctx, done, err = n.lease(ctx, c.LeasesService())
	return ctx, c, done, err
}

// lease is oci.WithLease with an owner. A context that has a lease stays as it is.
func (n *Node) lease(ctx context.Context, m leases.Manager) (_ context.Context, done func(), err error) {
	if _, ok := leases.FromContext(ctx); ok {
		return ctx, func() {}, nil
	}
	// Without one, it would expire.
	name := ""
	owner, err := n.newLocked(ownersFolder)
	if err == nil {
		name = filepath.Base(owner.dir)
	} else {
		owner = &work{}
	}
	ctx, end, err := oci.WithLease(ctx, m, name)
	if err != nil {
		return ctx, nil, errors.Join(err, owner.remove())
	}
	return ctx, func() {
		if err := end(); err != nil {
			n.log.Debug(err.Error()) // containerd has died, which others say
			owner.release()          // which leaves it to Prune
			return
		}
		if err := owner.remove(); err != nil {
			n.log.Warn(err.Error())
		}
	}, nil
}

// endLeases ends the leases, in all namespaces, of operations that did not end; with
// look, it only tells them, as NAMESPACE/ID.
func (n *Node) endLeases(ctx context.Context, c *client.Client, look bool) (ended []string, err error) {
	// The rest of prune needs no containerd, and has something to say.
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	dead := map[string]*work{}
	failed := []error{n.leftovers(ownersFolder, func(w *work) error {
		dead[filepath.Base(w.dir)] = w
		return nil
	})}
	defer func() {
		for _, w := range dead {
			if look || err != nil {
				w.release()
			} else {
				err = errors.Join(err, w.remove())
			}
		}
	}()
	ended = []string{}
	all, err := c.NamespaceService().List(ctx)
	if err != nil {
		return ended, fmt.Errorf("list the namespaces of containerd: %w", err)
	}
	for _, namespace := range all {
		ids, err := oci.EndLeases(namespaces.WithNamespace(ctx, namespace), c.LeasesService(), func(owner string) bool { return dead[owner] != nil }, look)
		failed = append(failed, err)
		for _, id := range ids {
			ended = append(ended, namespace+"/"+id)
		}
	}
	return ended, errors.Join(failed...)
}

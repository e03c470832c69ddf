package oci

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/errdefs"
)

// leaseTime is when containerd ends a lease by itself. The lease's owner, or EndLeases
// after the owner has died, ends it long before.
const leaseTime = 24 * time.Hour

// labelOwner, on a lease, is the name of its owner.
const labelOwner = "stasis.run/owner"

// WithLease returns a context under which containerd keeps what is written, also
// before it has a name, until done is called. A context that has a lease stays
// as it is. owner, unless it is empty, is what EndLeases knows it by.
func WithLease(ctx context.Context, m leases.Manager, owner string) (_ context.Context, done func() error, err error) {
	if _, ok := leases.FromContext(ctx); ok {
		return ctx, func() error { return nil }, nil
	}
	opts := []leases.Opt{leases.WithRandomID(), leases.WithExpiration(leaseTime)}
	if owner != "" {
		opts = append(opts, leases.WithLabel(labelOwner, owner))
	}
	l, err := m.Create(ctx, opts...)
	if err != nil {
		return nil, nil, fmt.Errorf("make a lease in containerd: %w", err)
	}
	return leases.WithLease(ctx, l.ID), func() error {
		// Also if ctx has ended: what is left would else stay for leaseTime.
		if err := m.Delete(context.WithoutCancel(ctx), l); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("end lease %s: %w", l.ID, err)
		}
		return nil
	}, nil
}

// EndLeases ends the leases in the namespace of ctx whose owners are gone, and with
// each what only that has kept. It returns their IDs. With look, it does not end them.
func EndLeases(ctx context.Context, m leases.Manager, gone func(owner string) bool, look bool) (ids []string, err error) {
	all, err := m.List(ctx, fmt.Sprintf("labels.%q", labelOwner))
	if err != nil {
		return nil, fmt.Errorf("list the leases in containerd: %w", err)
	}
	dead := slices.DeleteFunc(all, func(l leases.Lease) bool { return !gone(l.Labels[labelOwner]) })
	for i, l := range dead {
		if !look {
			var opts []leases.DeleteOpt
			if i == len(dead)-1 {
				opts = append(opts, leases.SynchronousDelete) // which collects all garbage
			}
			switch derr := m.Delete(ctx, l, opts...); {
			case errdefs.IsNotFound(derr):
				continue
			case derr != nil:
				err = errors.Join(err, fmt.Errorf("end lease %s: %w", l.ID, derr))
				continue
			}
		}
		ids = append(ids, l.ID)
	}
	return ids, err
}

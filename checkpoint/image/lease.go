package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/errdefs"
	"github.com/prometheus/procfs"
)

// leaseTime is how long what a killed process has written stays, if nobody calls
// EndLeases.
const leaseTime = 24 * time.Hour

// labelProcess, on a lease, names the process that it is for; see processName.
const labelProcess = "stasis.run/process"

// WithLease returns a context under which containerd keeps what is written, also
// before it has a name, until done is called. A context that has a lease stays
// as it is.
func WithLease(ctx context.Context, m leases.Manager) (_ context.Context, done func(), err error) {
	if _, ok := leases.FromContext(ctx); ok {
		return ctx, func() {}, nil
	}
	opts := []leases.Opt{leases.WithRandomID(), leases.WithExpiration(leaseTime)}
	if name, err := processName(os.Getpid()); err == nil {
		opts = append(opts, leases.WithLabel(labelProcess, name))
	}
	l, err := m.Create(ctx, opts...)
	if err != nil {
		return nil, nil, fmt.Errorf("make a lease in containerd: %w", err)
	}
	return leases.WithLease(ctx, l.ID), func() {
		// Also if ctx has ended: what is left would else stay for leaseTime.
		_ = m.Delete(context.WithoutCancel(ctx), l)
	}, nil
}

// EndLeases ends the leases in the namespace of ctx whose processes have died, and
// with each what only that has kept. It returns their IDs. With look, it does not
// end them.
func EndLeases(ctx context.Context, m leases.Manager, look bool) (ids []string, err error) {
	all, err := m.List(ctx, fmt.Sprintf("labels.%q", labelProcess))
	if err != nil {
		return nil, fmt.Errorf("list the leases in containerd: %w", err)
	}
	dead := slices.DeleteFunc(all, func(l leases.Lease) bool { return !died(l.Labels[labelProcess]) })
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

// processName names a process of this PID namespace for as long as anybody may ask:
// by machine, boot, namespace, PID, and when it began, in ticks since the boot.
func processName(pid int) (string, error) {
	machine, err := os.ReadFile("/etc/machine-id")
	if id := strings.Fields(string(machine)); err == nil && len(id) == 1 {
		machine = []byte(id[0])
	} else {
		name, err := os.Hostname()
		if err != nil || len(strings.Fields(name)) != 1 {
			return "", fmt.Errorf("neither an ID nor a name of this machine: %v", err)
		}
		machine = []byte(name)
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", err
	}
	namespace, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		return "", err
	}
	p, err := procfs.NewProc(pid)
	if err != nil {
		return "", err
	}
	stat, err := p.Stat()
	return fmt.Sprintf("%s %s %s %d %d", machine, strings.TrimSpace(string(boot)), namespace, pid, stat.Starttime), err
}

// died tells that the process of that name is no more. Of one on another machine or
// in another PID namespace, and of what is no name, nobody knows.
func died(name string) bool {
	var machine, boot, namespace string
	var pid int
	var start uint64
	if n, err := fmt.Sscan(name, &machine, &boot, &namespace, &pid, &start); err != nil || n != 5 {
		return false
	}
	self, err := processName(os.Getpid())
	if err != nil {
		return false
	}
	ours := strings.Fields(self)
	if machine != ours[0] || namespace != ours[2] {
		return false
	}
	if boot != ours[1] {
		return true
	}
	now, err := processName(pid)
	return errors.Is(err, os.ErrNotExist) || err == nil && now != name
}

package node

import (
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/leases"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/oci"
)

func TestPruneChooses(t *testing.T) {
	now := time.Date(2026, 1, 10, 0, 0, 0, 0, time.UTC)
	entry := func(ref, container string, days int, pod *capture.Pod) Listed {
		info := capture.Info{ContainerName: container, ContainerID: container + "-id", Pod: pod}
		return Listed{Ref: ref, Created: now.AddDate(0, 0, -days), Summary: oci.Summary{Format: oci.Runnable, Info: info}}
	}
	pod := &capture.Pod{Name: "p", Namespace: "n"}
	// The newest first, as List returns them.
	all := []Listed{
		entry("db:1", "db", 1, nil), entry("web:1", "web", 2, nil), entry("db:3", "db", 3, nil),
		entry("pod:4", "db", 4, pod), entry("db:5", "db", 5, nil), entry("web:6", "web", 6, nil),
	}
	const day = 24 * time.Hour
	keep := func(n int) *int { return &n }
	for _, tc := range []struct {
		name    string
		request PruneRequest
		want    []string
	}{
		{"nothing said", PruneRequest{}, nil},
		{"keep none", PruneRequest{Keep: keep(0)}, []string{"db:1", "web:1", "db:3", "pod:4", "db:5", "web:6"}},
		{"keep one of each", PruneRequest{Keep: keep(1)}, []string{"db:3", "db:5", "web:6"}},
		{"old", PruneRequest{OlderThan: 4 * day}, []string{"pod:4", "db:5", "web:6"}},
		{"old, but keep", PruneRequest{Keep: keep(1), OlderThan: 4 * day}, []string{"db:5", "web:6"}},
		{"by name, not the pod's", PruneRequest{Keep: keep(2), Container: "web"}, nil},
		{"by ID", PruneRequest{Keep: keep(1), Container: "web-id"}, []string{"web:6"}},
		{"by pod", PruneRequest{Keep: keep(0), Container: "n/p/db"}, []string{"pod:4"}},
	} {
		var got []string
		for _, l := range tc.request.choose(all, now) {
			got = append(got, l.Ref)
		}
		if !slices.Equal(got, tc.want) {
			t.Errorf("%s: %v, want %v", tc.name, got, tc.want)
		}
	}
}

// What nobody works at any more is removed, and nothing else.
func TestPruneLeftovers(t *testing.T) {
	n, state := newNode(t)
	busy, err := n.newWork()
	must0(t, err)
	crashed, err := n.newWork()
	must0(t, err)
	must0(t, os.WriteFile(filepath.Join(crashed.dir, "pages-1.img"), []byte("x"), 0o600))
	crashed.release() // as the end of its process does
	must0(t, os.WriteFile(filepath.Join(state, "work", "file"), nil, 0o600))
	for _, want := range []struct {
		dryRun bool
		left   []string
	}{{true, []string{crashed.dir}}, {false, []string{crashed.dir}}, {false, []string{}}} {
		got, err := n.Prune(t.Context(), PruneRequest{DryRun: want.dryRun})
		if err != nil || !slices.Equal(got.Leftovers, want.left) {
			t.Errorf("%+v: %+v, %v", want, got, err)
		}
	}
	if _, err := os.Stat(busy.dir); err != nil {
		t.Error(err)
	}
	must0(t, busy.remove())
}

// fakeLeases is a lease manager that knows of one lease at most.
type fakeLeases struct {
	leases.Manager
	made   *leases.Lease
	broken error
}

func (f *fakeLeases) Create(_ context.Context, opts ...leases.Opt) (leases.Lease, error) {
	f.made = &leases.Lease{}
	for _, o := range opts {
		if err := o(f.made); err != nil {
			return leases.Lease{}, err
		}
	}
	return *f.made, f.broken
}

func (f *fakeLeases) Delete(context.Context, leases.Lease, ...leases.DeleteOpt) error {
	return f.broken
}

// TestLeaseOwner looks at who has a lease while it is held, and when it is not.
func TestLeaseOwner(t *testing.T) {
	n, state := newNode(t)
	ended := func() (names []string) {
		must0(t, n.leftovers(ownersFolder, func(w *work) error {
			w.release()
			names = append(names, filepath.Base(w.dir))
			return nil
		}))
		return names
	}
	owners := func() int {
		found, err := filepath.Glob(filepath.Join(state, ownersFolder, "*"))
		must0(t, err)
		return len(found)
	}
	m := &fakeLeases{}
	ctx, done, err := n.lease(t.Context(), m)
	must0(t, err)
	if names := ended(); len(names) > 0 || owners() != 1 {
		t.Errorf("while it is held: %q of %d have ended", names, owners())
	}
	// What runs under a lease has no other.
	again, nothing, err := n.lease(ctx, m)
	must0(t, err)
	nothing()
	if again != ctx || owners() != 1 {
		t.Error("a lease under a lease")
	}
	done()
	if owners() != 0 {
		t.Error("its owner is left")
	}
	// One that cannot be ended is left to Prune, though this process lives.
	_, done, err = n.lease(t.Context(), m)
	must0(t, err)
	m.broken = errors.New("containerd is gone")
	done()
	names := ended()
	if len(names) != 1 || !slices.Contains(slices.Collect(maps.Values(m.made.Labels)), names[0]) {
		t.Errorf("%q have ended, the lease is %+v", names, m.made)
	}
	if _, _, err := n.lease(t.Context(), m); err == nil || owners() != 1 {
		t.Errorf("%v, %d owners", err, owners())
	}
	// Without a state folder, it expires.
	must0(t, os.Chmod(state, 0o755))
	m.broken = nil
	_, done, err = n.lease(t.Context(), m)
	must0(t, err)
	done()
}

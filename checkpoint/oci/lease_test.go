package oci

import (
	"slices"
	"testing"

	"github.com/containerd/containerd/v2/core/leases"
)

// TestEndLeases ends those whose owners are gone, and no others.
func TestEndLeases(t *testing.T) {
	s := newStore(t)
	for id, labels := range map[string]map[string]string{
		"dead":   {labelOwner: "dead"},
		"theirs": {"containerd.io/gc.expire": "2100-01-01T00:00:00Z"},
		"other":  {labelOwner: "other"},
	} {
		if _, err := s.leases.Create(s.ctx, leases.WithID(id), leases.WithLabels(labels)); err != nil {
			t.Fatal(err)
		}
	}
	_, done, err := WithLease(s.ctx, s.leases, "alive")
	if err != nil {
		t.Fatal(err)
	}
	gone := func(owner string) bool { return owner == "dead" }
	for _, look := range []bool{true, false} {
		if got, err := EndLeases(s.ctx, s.leases, gone, look); err != nil || !slices.Equal(got, []string{"dead"}) {
			t.Errorf("%q, %v", got, err)
		}
	}
	left, err := s.leases.List(s.ctx)
	if err != nil || len(left) != 3 {
		t.Errorf("%v, %v", left, err)
	}
	for range 2 { // that it is gone already is what was wanted
		if err := done(); err != nil {
			t.Error(err)
		}
	}
	if left, err := s.leases.List(s.ctx); err != nil || len(left) != 2 {
		t.Errorf("%v, %v", left, err)
	}
}

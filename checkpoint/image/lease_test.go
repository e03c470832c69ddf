package image

import (
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/leases"
)

// TestDied tells processes that live from those that do not.
func TestDied(t *testing.T) {
	self, err := processName(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	other, err := processName(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if died(other) {
		t.Errorf("%q lives", other)
	}
	cmd.Process.Kill()
	cmd.Wait()
	fields := strings.Fields(self)
	with := func(i int, value string) string {
		f := slices.Clone(fields)
		f[i] = value
		return strings.Join(f, " ")
	}
	for name, want := range map[string]bool{
		self: false, other: true,
		with(0, "another-machine"):              false,
		with(1, "another-boot"):                 true,
		with(4, "1"):                            true, // began at another time
		with(2, "pid:[1]"):                      false,
		"":                                      false,
		strings.Join(fields[:4], " "):           false,
		strings.Join(fields[:3], " ") + " x y":  false,
		strings.Join(fields[:3], " ") + " -1 1": true,
	} {
		if got := died(name); got != want {
			t.Errorf("%q: %v, want %v", name, got, want)
		}
	}
}

// TestEndLeases ends those of dead processes, and no others.
func TestEndLeases(t *testing.T) {
	s := newStore(t)
	self, err := processName(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(self)
	fields[1] = "another-boot"
	for id, labels := range map[string]map[string]string{
		"dead":   {labelProcess: strings.Join(fields, " ")},
		"theirs": {"containerd.io/gc.expire": "2100-01-01T00:00:00Z"},
		"odd":    {labelProcess: "what"},
	} {
		if _, err := s.leases.Create(s.ctx, leases.WithID(id), leases.WithLabels(labels)); err != nil {
			t.Fatal(err)
		}
	}
	_, done, err := WithLease(s.ctx, s.leases)
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	for _, look := range []bool{true, false} {
		if got, err := EndLeases(s.ctx, s.leases, look); err != nil || !slices.Equal(got, []string{"dead"}) {
			t.Errorf("%q, %v", got, err)
		}
	}
	left, err := s.leases.List(s.ctx)
	if err != nil || len(left) != 3 {
		t.Errorf("%v, %v", left, err)
	}
}

package stack

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/pkg/oci"
)

// A ProbeReport is what the program of integration/probe says of itself.
type ProbeReport struct {
	// ID is made when the probe starts; a restored one has the same.
	ID string
	// Items are those that it has.
	Items []string
	// Failed has what is wrong with those that are not as they should be.
	Failed map[string]string
	// Counter advances every ten milliseconds.
	Counter int64
	// Uptimes of the probe by CLOCK_MONOTONIC and CLOCK_BOOTTIME.
	Monotonic, Boottime time.Duration
}

// Err tells if an item is not as it should be.
func (r ProbeReport) Err() error {
	if len(r.Failed) == 0 {
		return nil
	}
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(r.Failed)) {
		fmt.Fprintf(&b, "\n%s: %s", name, r.Failed[name])
	}
	return fmt.Errorf("probe: %d items failed:%s", len(r.Failed), b.String())
}

// ProbeItem is a kind of state that the probe can hold.
type ProbeItem struct {
	Name string
	// Needs names the option of a checkpoint or of CRIU that it needs, if any.
	// With "extra", the item is not part of all items.
	Needs string
}

// ProbeItems returns all items.
func ProbeItems(tb TB) []ProbeItem {
	tb.Helper()
	probe, err := TestProgram("probe")
	if err != nil {
		tb.Fatalf("%v", err)
	}
	out, err := exec.Command(probe, "items").Output()
	if err != nil {
		tb.Fatalf("probe items: %v", err)
	}
	var items []ProbeItem
	for line := range strings.Lines(string(out)) {
		name, needs, _ := strings.Cut(strings.TrimSpace(line), "\t")
		items = append(items, ProbeItem{name, needs})
	}
	return items
}

// ProbeArgs makes a container of the image Probe run the probe, with flags such
// as -items; see its own documentation.
func ProbeArgs(flags ...string) oci.SpecOpts {
	return Args(append([]string{"/probe", "run"}, flags...)...)
}

// StartProbe starts a container whose spec has ProbeArgs and waits until the
// probe is set up.
func (c *Container) StartProbe(ctx context.Context) {
	c.s.tb.Helper()
	c.Start(ctx)
	c.Stdout.WaitFor(ctx, "ready\n")
}

// ProbeErr asks the probe to check all its items.
func (c *Container) ProbeErr(ctx context.Context) (ProbeReport, error) {
	var report ProbeReport
	ctx, cancel := context.WithTimeout(ctx, WaitTimeout())
	defer cancel()
	r, err := c.ExecErr(ctx, "/probe", "check")
	if err != nil {
		return report, err
	}
	if err := json.Unmarshal([]byte(r.Stdout), &report); err != nil {
		return report, fmt.Errorf("probe check: exit code %d: %s%s", r.Code, r.Stdout, r.Stderr)
	}
	return report, nil
}

// Probe asks the probe to check all its items, and fails the test, but does not
// end it, if one is not as it should be.
func (c *Container) Probe(ctx context.Context) ProbeReport {
	c.s.tb.Helper()
	r, err := c.ProbeErr(ctx)
	if err != nil {
		c.s.tb.Fatalf("container %s: %v", c.ID(), err)
	}
	if err := r.Err(); err != nil {
		c.s.tb.Errorf("container %s: %v", c.ID(), err)
	}
	return r
}

// EchoServer starts what the probe's item out wants to connect to: a server at
// an address of this host that sends back what it receives. It returns the
// address with the port.
func EchoServer(tb TB, host string) string {
	tb.Helper()
	l, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		tb.Fatalf("%v", err)
	}
	tb.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				io.Copy(conn, conn)
			}()
		}
	}()
	return l.Addr().String()
}

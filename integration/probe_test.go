package integration

import (
	"context"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/containerd/api/types/runc/options"

	"github.com/stasis-run/stasis/integration/stack"
)

// TestProbe checks that the probe finds all its items in order when nothing has
// happened to it.
func TestProbe(t *testing.T) {
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	c := s.NewContainer(ctx, "c", stack.Probe, stack.ProbeArgs())
	c.StartProbe(ctx)
	before := c.Probe(ctx)
	if len(before.Items) < 30 {
		t.Errorf("only %d items: %v", len(before.Items), before.Items)
	}
	checkSame(t, before, c.Probe(ctx))
}

// criuConfig is what CRIU must be told for the needs of probe items.
var criuConfig = map[string]string{
	"open_tcp":   "tcp-established",
	"file_locks": "file-locks",
	"link_remap": "link-remap",
	"irmap":      "irmap-scan-path /var/probe\nforce-irmap",
}

// TestProbeUpstream finds out which items this CRIU can dump and restore on
// this kernel at all, by means of containerd's own shim: of those that
// TestRestoreItems leaves out.
func TestProbeUpstream(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{Upstream: true})
	for _, item := range stack.ProbeItems(t) {
		if !strings.HasPrefix(item.Needs, "extra") {
			continue
		}
		t.Run(item.Name, func(t *testing.T) {
			if strings.Contains(item.Needs, "CRIU hangs") || strings.Contains(item.Needs, "criu#") {
				t.Skip(item.Needs)
			}
			ctx, cancel := context.WithTimeout(s.Ctx(), stack.WaitTimeout())
			defer cancel()
			// In a network namespace of runc's own making, the loopback device is
			// down after a restore.
			network := s.NewNetns()
			probe := stack.ProbeArgs("-items", item.Name, "-connect", stack.EchoServer(t, network.HostAddr))
			need := strings.TrimPrefix(item.Needs, "extra: ")
			c := s.NewContainer(ctx, item.Name, stack.Probe, probe, network.With(), s.CRIUConfig(criuConfig[need]))
			c.StartProbe(ctx)
			before := c.Probe(ctx)
			dir := filepath.Join(s.Dir, "images", item.Name)
			err := c.CheckpointErr(ctx, dir, &options.CheckpointOptions{Exit: true})
			if need == "CRIU cannot" {
				if err == nil {
					t.Error("CRIU could")
				}
				return
			}
			if err != nil {
				t.Fatalf("%v\n%s", err, c.CRIULog("dump", dir))
			}
			if err := c.RestoreErr(ctx, dir); err != nil {
				t.Fatalf("%v\n%s", err, c.CRIULog("restore", dir))
			}
			checkSame(t, before, c.Probe(ctx))
		})
	}
}

// TestProbeUpstreamAll is TestProbeUpstream for all items at once, time and
// again, leaving the container running or not.
func TestProbeUpstreamAll(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{Upstream: true})
	ctx := s.Ctx()
	network := s.NewNetns()
	c := s.NewContainer(ctx, "c", stack.Probe, network.With(),
		stack.ProbeArgs("-connect", stack.EchoServer(t, network.HostAddr)),
		s.CRIUConfig(criuConfig["open_tcp"], criuConfig["file_locks"]))
	c.StartProbe(ctx)
	before := c.Probe(ctx)
	for i := range 3 {
		c.Checkpoint(ctx, filepath.Join(s.Dir, "running", strconv.Itoa(i)), nil)
		checkSame(t, before, c.Probe(ctx))
		dir := filepath.Join(s.Dir, "exit", strconv.Itoa(i))
		c.Checkpoint(ctx, dir, &options.CheckpointOptions{Exit: true})
		c.Restore(ctx, dir)
		checkSame(t, before, c.Probe(ctx))
	}
}

// checkSame checks that two reports are of the same probe, in this order.
func checkSame(t *testing.T, before, after stack.ProbeReport) {
	t.Helper()
	if after.ID != before.ID {
		t.Errorf("another probe: %+v, after %+v", after, before)
	}
	if after.Counter <= before.Counter || after.Monotonic < before.Monotonic || after.Boottime < before.Boottime {
		t.Errorf("went back in time: %+v, after %+v", after, before)
	}
}

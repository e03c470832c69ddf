package integration

import (
	"context"
	"path/filepath"
	"strings"
	"testing"
	"time"

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
	after := c.Probe(ctx)
	if after.ID != before.ID || after.Counter <= before.Counter {
		t.Errorf("second report: %+v, after %+v", after, before)
	}
}

// TestProbeUpstream finds out which items this CRIU can dump and restore on
// this kernel at all, by means of containerd's own shim.
func TestProbeUpstream(t *testing.T) {
	s := stack.Start(t, stack.Options{Upstream: true})
	ctx := s.Ctx()
	for _, item := range stack.ProbeItems(t) {
		if item.Name == "out" {
			continue // Needs someone to connect to.
		}
		t.Run(item.Name, func(t *testing.T) {
			if strings.Contains(item.Needs, "CRIU hangs") {
				t.Skip(item.Needs)
			}
			ctx, cancel := context.WithTimeout(ctx, time.Minute)
			defer cancel()
			opts := []string{}
			for _, o := range strings.Fields(item.Needs) {
				switch o {
				case "open_tcp":
					opts = append(opts, "tcp-established")
				case "file_locks":
					opts = append(opts, "file-locks")
				case "link_remap":
					opts = append(opts, "link-remap")
				}
			}
			c := s.NewContainer(ctx, item.Name, stack.Probe, stack.ProbeArgs("-items", item.Name), s.CRIUConfig(opts...))
			c.StartProbe(ctx)
			c.Probe(ctx)
			dir := filepath.Join(s.Dir, "images", item.Name)
			if err := c.CheckpointErr(ctx, dir, &options.CheckpointOptions{Exit: true}); err != nil {
				t.Fatalf("%v\n%s", err, c.CRIULog("dump", dir))
			}
			if err := c.RestoreErr(ctx, dir); err != nil {
				t.Fatalf("%v\n%s", err, c.CRIULog("restore", dir))
			}
			r, err := c.ProbeErr(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if err := r.Err(); err != nil {
				t.Error(err)
			}
		})
	}
}

package integration

import (
	"fmt"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/cgroups/v3"
	cgroup1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	cgroup2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/typeurl/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/stasis-run/stasis/integration/stack"
)

// TestStats checks the figures of a container against what it is known to use.
func TestStats(t *testing.T) {
	for name, opts := range map[string]stack.Options{"runc": {}, "crun": {Crun: true}} {
		t.Run(name, func(t *testing.T) {
			s := stack.Start(t, opts)
			ctx := s.Ctx()
			c := s.NewContainer(ctx, "c", stack.Busybox, stack.Args("sh", "-c", "echo up; exec sleep 1000"), oci.WithMemoryLimit(64<<20), oci.WithPidsLimit(50))
			c.Start(ctx)
			// Before that, the threads of the runtime's init may be there still.
			c.Stdout.WaitFor(ctx, "up\n")
			m, err := c.Task.Metrics(ctx)
			if err != nil {
				t.Fatal(err)
			}
			v, err := typeurl.UnmarshalAny(m.Data)
			if err != nil {
				t.Fatal(err)
			}
			var pids, pidsLimit, memory, memoryLimit uint64
			switch v := v.(type) {
			case *cgroup1.Metrics:
				pids, pidsLimit = v.Pids.Current, v.Pids.Limit
				memory, memoryLimit = v.Memory.Usage.Usage, v.Memory.Usage.Limit
			case *cgroup2.Metrics:
				pids, pidsLimit = v.Pids.Current, v.Pids.Limit
				memory, memoryLimit = v.Memory.Usage, v.Memory.UsageLimit
			default:
				t.Fatalf("metrics of type %T", v)
			}
			if pids != 1 || pidsLimit != 50 || memory == 0 || memoryLimit != 64<<20 {
				t.Errorf("%d of %d processes, %d of %d bytes; want 1 of 50, and some of 64 MiB", pids, pidsLimit, memory, memoryLimit)
			}
			// A limit that is changed shows.
			if err := c.Task.Update(ctx, client.WithResources(&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: new(int64(48 << 20))}})); err != nil {
				t.Fatal(err)
			}
			if m, err = c.Task.Metrics(ctx); err != nil {
				t.Fatal(err)
			}
			if v, err = typeurl.UnmarshalAny(m.Data); err != nil {
				t.Fatal(err)
			}
			switch v := v.(type) {
			case *cgroup1.Metrics:
				memoryLimit = v.Memory.Usage.Limit
			case *cgroup2.Metrics:
				memoryLimit = v.Memory.UsageLimit
			}
			if memoryLimit != 48<<20 {
				t.Errorf("limit %d after update, want 48 MiB", memoryLimit)
			}
		})
	}
}

// TestOOM checks that containerd is told of a process that is killed for lack
// of memory, once, and before it is told of its exit.
func TestOOM(t *testing.T) {
	for name, opts := range map[string]stack.Options{"runc": {}, "crun": {Crun: true}, "1.7": {Version: "1.7", DropIn: true}} {
		t.Run(name, func(t *testing.T) {
			s := stack.Start(t, opts)
			ctx := s.Ctx()
			watch := watchEvents(t, s)
			// tail keeps a line, however long, in memory.
			c := s.NewContainer(ctx, "c", stack.Busybox, stack.Args("tail", "/dev/zero"), oci.WithMemoryLimit(32<<20), oci.WithMemorySwap(32<<20))
			c.Start(ctx)
			if code := c.Wait(ctx); code != 137 {
				t.Errorf("exit code %d, want 137", code)
			}
			c.Delete(ctx)
			watch.waitFor(ctx, "/tasks/delete", 1)
			if got, want := topics(t, watch, "c"), "create start oom exit delete"; got != want {
				t.Errorf("events %s, want %s", got, want)
			}
		})
	}
}

// TestOOMOfExec checks that a container lives on whose exec was killed for lack
// of memory, and that the next one is told of too.
func TestOOMOfExec(t *testing.T) {
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	watch := watchEvents(t, s)
	c := s.NewContainer(ctx, "c", stack.Busybox, stack.Args("sleep", "1000"), oci.WithMemoryLimit(32<<20), oci.WithMemorySwap(32<<20))
	c.Start(ctx)
	for i := range 2 {
		if r, err := c.ExecErr(ctx, "tail", "/dev/zero"); err != nil || r.Code != 137 {
			t.Fatalf("exec: %+v, %v; want exit code 137", r, err)
		}
		watch.waitFor(ctx, "/tasks/oom", i+1)
	}
	if status := c.Status(ctx); status != client.Running {
		t.Errorf("the container is %s", status)
	}
}

// TestOOMCount has several processes meet the limit at once, for which the kernel
// signals version 1's eventfd more often than it kills: there is one event for each
// kill that the kernel counted.
func TestOOMCount(t *testing.T) {
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	watch := watchEvents(t, s)
	c := s.NewContainer(ctx, "c", stack.Busybox, stack.Args("sleep", "1000"), oci.WithMemoryLimit(64<<20), oci.WithMemorySwap(64<<20))
	c.Start(ctx)
	const each = 4
	for range 3 {
		c.ExecErr(ctx, "sh", "-c", fmt.Sprintf("for i in $(seq %d); do tail /dev/zero & done; wait", each))
	}
	file := "memory.events"
	if cgroups.Mode() != cgroups.Unified {
		file = "memory.oom_control"
	}
	counters, err := readCgroup(s, "memory", "c", file)
	if err != nil {
		t.Fatal(err)
	}
	kills := 0
	for line := range strings.Lines(counters) {
		_, _ = fmt.Sscanf(line, "oom_kill %d", &kills)
	}
	if kills < 3 {
		t.Fatalf("the kernel killed %d processes: %s", kills, counters)
	}
	c.Kill(ctx, syscall.SIGKILL)
	c.Delete(ctx)
	watch.waitFor(ctx, "/tasks/delete", 1)
	if got := strings.Count(topics(t, watch, "c"), "oom"); got != kills {
		t.Errorf("%d OOM events, the kernel counted %d kills", got, kills)
	}
}

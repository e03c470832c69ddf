package integration

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/cgroups/v3"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/oci"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/stasis-run/stasis/integration/stack"
)

// onlyV2 skips a test of what cgroup v1 has not.
func onlyV2(t *testing.T) {
	t.Helper()
	if cgroups.Mode() != cgroups.Unified {
		t.Skip("this host has cgroup v1; `make test-vm` runs this test on v2")
	}
}

// runtimes are stacks on both OCI runtimes.
var runtimes = map[string]stack.Options{"runc": {}, "crun": {Crun: true}}

// limits are resources of a container, and the files in which they show.
type limits struct {
	memory, pids, quota int64
}

func (l limits) with() oci.SpecOpts {
	return oci.Compose(oci.WithMemoryLimit(uint64(l.memory)), oci.WithMemorySwap(l.memory), oci.WithPidsLimit(l.pids),
		oci.WithCPUCFS(l.quota, 100_000))
}

func (l limits) check(t *testing.T, s *stack.Stack, name string) {
	t.Helper()
	type file struct{ controller, name, want string }
	files := []file{
		{"memory", "memory.limit_in_bytes", fmt.Sprint(l.memory)},
		{"pids", "pids.max", fmt.Sprint(l.pids)},
		{"cpu", "cpu.cfs_quota_us", fmt.Sprint(l.quota)},
	}
	if cgroups.Mode() == cgroups.Unified {
		files[0].name = "memory.max"
		files[2].name, files[2].want = "cpu.max", fmt.Sprintf("%d 100000", l.quota)
	}
	for _, f := range files {
		if got, err := readCgroup(s, f.controller, name, f.name); err != nil || got != f.want {
			t.Errorf("%s of %s is %q, %v; want %q", f.name, name, got, err, f.want)
		}
	}
}

// TestLimitsAfterRestore checks that the limits in force after a restore are those
// of the container that is restored into, and not what the checkpoint had.
func TestLimitsAfterRestore(t *testing.T) {
	t.Parallel()
	for name, opts := range runtimes {
		t.Run(name, func(t *testing.T) {
			s := stack.Start(t, opts)
			ctx := s.Ctx()
			watch := watchEvents(t, s)
			before, after := limits{96 << 20, 50, 150_000}, limits{48 << 20, 40, 120_000}
			c := s.NewContainer(ctx, "c", stack.Busybox, stack.Args("sleep", "1000"), before.with())
			c.Start(ctx)
			before.check(t, s, "c")
			dir := filepath.Join(s.Dir, "checkpoint")
			c.Checkpoint(ctx, dir, &options.CheckpointOptions{Exit: true})
			c.Restore(ctx, dir)
			before.check(t, s, "c")
			c.Kill(ctx, syscall.SIGKILL)
			c.Delete(ctx)

			other := s.NewContainer(ctx, "other", stack.Busybox, stack.Args("sleep", "1000"), after.with())
			other.Restore(ctx, dir)
			after.check(t, s, "other")
			if r, err := other.ExecErr(ctx, "tail", "/dev/zero"); err != nil || r.Code != 137 {
				t.Errorf("a process beyond the limit: %+v, %v; want exit code 137", r, err)
			}
			watch.waitFor(ctx, "/tasks/oom", 1)
			other.Kill(ctx, syscall.SIGKILL)
			other.Delete(ctx)
		})
	}
}

// delegated gives a container its own control groups to see and to write to.
func delegated(_ context.Context, _ oci.Client, _ *containers.Container, spec *oci.Spec) error {
	spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	spec.Mounts = append(slices.DeleteFunc(spec.Mounts, func(m specs.Mount) bool { return m.Type == "cgroup" }),
		specs.Mount{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "rw"}})
	return nil
}

// nest makes sub-groups as an init system in a container does: one for itself, and
// one with limits for a service. That is all that "no internal processes" allows. The
// service is started again if the kernel kills it instead of who takes its memory.
const nest = `exec 2>&1; set -e; cd /sys/fs/cgroup; mkdir main service
echo $$ > main/cgroup.procs
echo "+memory +pids" > cgroup.subtree_control
echo 33554432 > service/memory.max; echo 0 > service/memory.swap.max; echo 20 > service/pids.max
cd /; while true; do (echo 0 > /sys/fs/cgroup/service/cgroup.procs; echo up; while true; do sleep 0.1; done) || true; done`

// TestNestedCgroups restores a container that has made control groups below its
// own: they come back with their processes, controllers and limits, below wherever
// the container's own is now; and what is done to the container is done to all.
func TestNestedCgroups(t *testing.T) {
	t.Parallel()
	onlyV2(t)
	for name, opts := range runtimes {
		t.Run(name, func(t *testing.T) {
			s := stack.Start(t, opts)
			ctx := s.Ctx()
			watch := watchEvents(t, s)
			spec := []oci.SpecOpts{stack.Args("sh", "-c", nest), delegated, oci.WithMemoryLimit(128 << 20)}
			c := s.NewContainer(ctx, "c", stack.Busybox, spec...)
			c.Start(ctx)
			c.Stdout.WaitFor(ctx, "up\n")
			t.Cleanup(func() {
				if t.Failed() {
					t.Logf("the container wrote:\n%s", c.Stdout)
				}
			})
			check := func(c *stack.Container) {
				t.Helper()
				checkNested(t, s, c)
				oom := strings.Count(fmt.Sprint(topics(t, watch, c.ID())), "oom")
				if r, err := c.ExecErr(ctx, "sh", "-c", "echo 0 > /sys/fs/cgroup/service/cgroup.procs && exec tail /dev/zero"); err != nil || r.Code != 137 {
					t.Errorf("a process beyond the service's limit: %+v, %v; want exit code 137", r, err)
				}
				s.Poll(ctx, "an OOM event", func() bool { return strings.Count(topics(t, watch, c.ID()), "oom") > oom })
				for range 2 {
					if err := c.Task.Pause(ctx); err != nil {
						t.Fatal(err)
					}
					stillPaused(t, ctx, c)
					if err := c.Task.Resume(ctx); err != nil {
						t.Fatal(err)
					}
				}
			}
			check(c)
			dir := filepath.Join(s.Dir, "checkpoint")
			c.Checkpoint(ctx, dir, nil) // It runs on, as it was.
			check(c)
			for range 2 {
				c.Checkpoint(ctx, dir, &options.CheckpointOptions{Exit: true})
				c.Restore(ctx, dir)
				check(c)
			}
			c.Checkpoint(ctx, dir, &options.CheckpointOptions{Exit: true})
			other := s.NewContainer(ctx, "other", stack.Busybox, spec...)
			other.Restore(ctx, dir)
			check(other)
			if groups := s.ContainerCgroups("c"); len(groups) > 0 {
				t.Errorf("restored elsewhere, it has made its old control group: %v", groups)
			}
			other.Kill(ctx, syscall.SIGKILL)
			other.Delete(ctx)
			c.Delete(ctx)
		})
	}
}

// checkNested checks the control groups that nest has made.
func checkNested(t *testing.T, s *stack.Stack, c *stack.Container) {
	t.Helper()
	ctx := s.Ctx()
	// Below systemd's scope, crun makes a group for the container.
	own := ""
	if _, err := readCgroup(s, "", c.ID(), "container/cgroup.procs"); err == nil {
		own = "container/"
	}
	group := strings.TrimSuffix(s.Cgroup(c.ID())+"/"+own, "/")
	in := map[string]int{}
	pids, err := c.Task.Pids(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pids {
		if data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", p.Pid)); err == nil {
			in[strings.TrimSpace(string(data))]++
		}
	}
	if in["0::"+group+"/main"] != 1 || in["0::"+group+"/service"] < 1 || len(in) != 2 {
		t.Errorf("processes in %v; want one in %s/main, the others in %[2]s/service", in, group)
	}
	for file, want := range map[string]string{
		own + "cgroup.subtree_control": "memory pids", "memory.max": fmt.Sprint(128 << 20),
		own + "service/memory.max": "33554432", own + "service/memory.swap.max": "0", own + "service/pids.max": "20", own + "main/memory.max": "max",
	} {
		if got, err := readCgroup(s, "", c.ID(), file); err != nil || got != want {
			t.Errorf("%s is %q, %v; want %q", file, got, err, want)
		}
	}
	// What the container itself sees.
	if out := c.Exec(ctx, "cat", "/proc/1/cgroup"); out != "0::/main\n" {
		t.Errorf("init sees itself in %q, want /main", out)
	}
	if m, err := c.Task.Metrics(ctx); err != nil || len(m.Data.GetValue()) == 0 {
		t.Errorf("metrics: %v, %v", m, err)
	}
}

// TestAppArmor restores a container into one with another profile, which is then
// in force; and refuses to lose one.
func TestAppArmor(t *testing.T) {
	t.Parallel()
	if data, err := os.ReadFile("/sys/module/apparmor/parameters/enabled"); err != nil || data[0] != 'Y' {
		t.Skip("this host has no AppArmor; `make test-vm` runs this test on one that has")
	}
	for name, opts := range runtimes {
		t.Run(name, func(t *testing.T) {
			s := stack.Start(t, opts)
			ctx := s.Ctx()
			profile := func(name string, rules ...string) string {
				name += "-" + s.ID
				file := filepath.Join(s.Dir, name)
				text := fmt.Sprintf("profile %s flags=(attach_disconnected,mediate_deleted) {\n file,\n capability,\n network,\n signal,\n ptrace,\n unix,\n umount,\n %s\n}\n",
					name, strings.Join(rules, "\n "))
				must(t, os.WriteFile(file, []byte(text), 0o600))
				if out, err := exec.Command("apparmor_parser", "--replace", "--skip-cache", file).CombinedOutput(); err != nil {
					t.Fatalf("apparmor_parser: %v\n%s", err, out)
				}
				t.Cleanup(func() {
					if out, err := exec.Command("apparmor_parser", "--remove", file).CombinedOutput(); err != nil {
						t.Errorf("apparmor_parser: %v\n%s", err, out)
					}
				})
				return name
			}
			first, second := profile("first"), profile("second", "deny /etc/forbidden r,")
			confined := func(name string) oci.SpecOpts {
				return func(_ context.Context, _ oci.Client, _ *containers.Container, spec *oci.Spec) error {
					spec.Process.ApparmorProfile = name
					return nil
				}
			}
			run := stack.Args("sh", "-c", "echo secret > /etc/forbidden; echo up; while read line; do cat /etc/forbidden; done; sleep 1000")
			check := func(c *stack.Container, want string) {
				t.Helper()
				data, err := os.ReadFile(fmt.Sprintf("/proc/%d/attr/current", c.Task.Pid()))
				if got := strings.TrimRight(string(data), "\x00\n"); err != nil || got != want {
					t.Errorf("init of %s runs under %q, %v; want %q", c.ID(), got, err, want)
				}
			}
			c := s.NewContainer(ctx, "c", stack.Busybox, run, confined(first))
			c.Start(ctx)
			c.Stdout.WaitFor(ctx, "up\n")
			check(c, first+" (enforce)")
			dir := filepath.Join(s.Dir, "checkpoint")
			c.Checkpoint(ctx, dir, &options.CheckpointOptions{Exit: true})
			c.Restore(ctx, dir)
			check(c, first+" (enforce)")
			c.Kill(ctx, syscall.SIGKILL)
			c.Delete(ctx)

			other := s.NewContainer(ctx, "other", stack.Busybox, run, confined(second))
			other.Restore(ctx, dir)
			check(other, second+" (enforce)")
			if r, err := other.ExecErr(ctx, "cat", "/etc/forbidden"); err != nil || r.Code == 0 {
				t.Errorf("an exec reads what the profile forbids: %+v, %v", r, err)
			}
			other.Kill(ctx, syscall.SIGKILL)
			other.Delete(ctx)
		})
	}
}

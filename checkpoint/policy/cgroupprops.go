package policy

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/cgroup"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// hierarchy names a hierarchy by its controllers, in order.
func hierarchy(names []string) string {
	return strings.Join(slices.Sorted(slices.Values(names)), ",")
}

// hostHierarchies are those of this host, mounted wherever; "" is that of version 2.
// CRIU can mount no other without making it.
var hostHierarchies = sync.OnceValues(func() (map[string]bool, error) {
	data, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, err
	}
	all := map[string]bool{}
	for line := range strings.Lines(string(data)) {
		if _, rest, ok := strings.Cut(line, ":"); ok {
			names, _, _ := strings.Cut(rest, ":")
			all[hierarchy(strings.Split(names, ","))] = true
		}
	}
	return all, nil
})

// properties are those of a control group that CRIU keeps (its cgroup-props.c, for
// both versions), and of version 2 those that are limits. All others do something:
// move processes, end them, give access to devices, or run a program.
var properties = sync.OnceValue(func() map[string]bool {
	all := map[string]bool{}
	for name := range strings.FieldsSeq(`
		cpu.shares cpu.cfs_period_us cpu.cfs_quota_us cpu.rt_period_us cpu.rt_runtime_us
		memory.limit_in_bytes memory.memsw.limit_in_bytes memory.swappiness memory.soft_limit_in_bytes
		memory.move_charge_at_immigrate memory.oom_control memory.use_hierarchy memory.kmem.limit_in_bytes memory.kmem.tcp.limit_in_bytes
		cpuset.cpus cpuset.mems cpuset.memory_migrate cpuset.cpu_exclusive cpuset.mem_exclusive cpuset.mem_hardwall
		cpuset.memory_spread_page cpuset.memory_spread_slab cpuset.sched_load_balance cpuset.sched_relax_domain_level
		blkio.weight net_cls.classid net_prio.ifpriomap pids.max devices.list freezer.state
		cgroup.clone_children notify_on_release cgroup.procs tasks
		cgroup.subtree_control cgroup.max.descendants cgroup.max.depth cgroup.freeze cgroup.type
		cpu.weight cpu.max memory.min memory.low memory.high memory.max memory.swap.max io.weight io.max`) {
		all[name] = true
	}
	return all
})

// controllerList is a value of cgroup.subtree_control, as the kernel tells it.
var controllerList = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^[a-z_0-9 ]*\n?$`) })

// checkProperty is for one file of a group. In those that CRIU makes, it writes all;
// in the container's own (top) only if it is told to (cgroups_mode full), which the
// manifest of the checkpoint decides. That the limits are those of then is what the
// mode is for; access to devices beyond the spec's is not.
func (c *checker) checkProperty(prop *cgroup.CgroupPropEntry, top bool) {
	name, value := prop.GetName(), prop.GetValue()
	bad := ""
	switch {
	case !properties()[name]:
		bad = "is no property that a restore may set"
	case len(value) > maxProperty:
		bad = fmt.Sprintf("is of %d bytes", len(value))
	case name == "notify_on_release" && strings.TrimSpace(value) != "0":
		bad = "would have the host run its release agent"
	case (name == "cgroup.procs" || name == "tasks") && strings.TrimSpace(value) != "":
		bad = "would move processes"
	case name == "cgroup.subtree_control" && !controllerList().MatchString(value):
		bad = "lists no controllers"
	}
	if bad != "" {
		c.refuse("cgroup.img: property %s %s", quote(name), bad)
	}
	// CRIU writes that one for the groups at the top only, and as owner and mode
	// whatever was in memory.
	if name != "freezer.state" || !top {
		c.checkCgroupPerms(quote(name), prop.GetPerms(), maxFileMode)
	}
	all := c.ckpt.Options().CgroupsMode == "full" || c.ckpt.Options().CgroupsMode == "strict"
	for line := range strings.Lines(value) {
		line = strings.TrimSpace(line)
		switch {
		case line == "":
		case name == "devices.list" && top && all && !c.mayUseDevices(line):
			// Groups below have no more than those above, in any case.
			c.refuse("cgroup.img: access to devices %s is beyond the spec's", quote(line))
		case (name == "net_cls.classid" || name == "net_prio.ifpriomap") && (!top || all) && !c.mayMarkPackets(name, line):
			c.refuse("cgroup.img: %s of %s is not the spec's", name, quote(line))
		}
	}
}

// mayMarkPackets tells whether the spec has a line of net_cls.classid, which the
// host's firewall and traffic control go by, or of net_prio.ifpriomap.
func (c *checker) mayMarkPackets(name, line string) bool {
	var network specs.LinuxNetwork
	if c.spec.Linux != nil && c.spec.Linux.Resources != nil && c.spec.Linux.Resources.Network != nil {
		network = *c.spec.Linux.Resources.Network
	}
	if name == "net_cls.classid" {
		return line == "0" || network.ClassID != nil && line == fmt.Sprint(*network.ClassID)
	}
	device, priority, _ := strings.Cut(line, " ")
	return priority == "0" || slices.ContainsFunc(network.Priorities, func(p specs.LinuxInterfacePriority) bool {
		return p.Name == device && priority == fmt.Sprint(p.Priority)
	})
}

// maxProperty is a page, the most that the kernel takes.
const maxProperty = 4096

// The modes that the kernel gives the files and folders of control groups, or less.
// (Files that all may write, such as cgroup.event_control, are no properties.)
const (
	maxFileMode   = 0o644
	maxFolderMode = 0o755
)

// checkCgroupPerms compares who may write a group, or a file of it. Who may, can
// take limits off. For a container of root's too: CRIU also sets the mode of the
// container's own group, and all users of the host would come to it.
func (c *checker) checkCgroupPerms(name string, p *cgroup.CgroupPerms, most uint32) {
	if p == nil {
		return
	}
	if p.GetUid() != 0 && !c.grant.uid(p.GetUid()) || p.GetGid() != 0 && !c.grant.gid(p.GetGid()) {
		c.refuse("cgroup.img: %s belongs to %d:%d, which the spec does not grant", name, p.GetUid(), p.GetGid())
	}
	if mode := p.GetMode() & 0o7777; mode&^most != 0 {
		c.refuse("cgroup.img: %s has the mode %04o, at most %04o is allowed", name, mode, most)
	}
}

// runtimeDevices are what the OCI runtimes allow every container.
var runtimeDevices = []string{"c *:* m", "b *:* m", "c 1:3 rwm", "c 1:5 rwm", "c 1:7 rwm", "c 1:8 rwm", "c 1:9 rwm", "c 5:0 rwm",
	"c 5:1 rwm", "c 5:2 rwm", "c 10:200 rwm", "c 136:* rwm"}

// mayUseDevices tells whether the spec has a line of devices.list.
func (c *checker) mayUseDevices(line string) bool {
	if slices.Contains(runtimeDevices, line) || allDevicesOf(c.spec) {
		return true
	}
	if c.spec.Linux == nil || c.spec.Linux.Resources == nil {
		return false
	}
	number := func(n *int64) string {
		if n == nil || *n < 0 {
			return "*"
		}
		return fmt.Sprint(*n)
	}
	kind, rest, _ := strings.Cut(line, " ")
	node, access, _ := strings.Cut(rest, " ")
	for _, r := range c.spec.Linux.Resources.Devices {
		if !r.Allow || r.Type != kind && r.Type != "" && r.Type != "a" {
			continue
		}
		missing := strings.ContainsFunc(access, func(a rune) bool { return !strings.ContainsRune(r.Access, a) })
		if !missing && node == number(r.Major)+":"+number(r.Minor) {
			return true
		}
	}
	return false
}

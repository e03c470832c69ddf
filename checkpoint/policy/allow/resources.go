package allow

import (
	"fmt"
	"maps"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// ordinaryDevices are what every container has (OCI runtime spec), all of them
// character devices.
var ordinaryDevices = map[string][2]int64{
	"/dev/null": {1, 3}, "/dev/zero": {1, 5}, "/dev/full": {1, 7}, "/dev/random": {1, 8}, "/dev/urandom": {1, 9},
	"/dev/tty": {5, 0}, "/dev/console": {5, 1}, "/dev/ptmx": {5, 2},
}

// takeDevices takes over devices and the rules of the control group for them. All
// that is not allowed by a rule is forbidden, whether the spec says that or not.
func (b *builder) takeDevices() {
	granted := b.grantedDevices()
	for i, d := range b.asked.Linux.Devices {
		field := fmt.Sprintf("linux.devices[%d]", i)
		if !plainPath(d.Path) || !slices.Contains([]string{"c", "u", "b", "p"}, d.Type) {
			b.refuse(field, "device %s of type %s", quote(d.Path), quote(d.Type))
			continue
		}
		node, ordinary := ordinaryDevices[path.Clean(d.Path)]
		if !ordinary || node != [2]int64{d.Major, d.Minor} || d.Type != "c" && d.Type != "u" {
			rule := deviceRule(d.Type, &d.Major, &d.Minor, "rwm")
			what := fmt.Sprintf("device %s (%s)", quote(d.Path), rule)
			if !b.ask(granted(rule), "--allow-device", b.deviceName(d, rule), field, "%s", what) {
				continue
			}
		}
		b.spec.Linux.Devices = append(b.spec.Linux.Devices, *clone(&d))
	}
	var from []specs.LinuxDeviceCgroup
	if r := b.asked.Linux.Resources; r != nil {
		from = r.Devices
	}
	deny := specs.LinuxDeviceCgroup{Access: "rwm"}
	rules := []specs.LinuxDeviceCgroup{deny}
	for i, r := range from {
		field := fmt.Sprintf("linux.resources.devices[%d]", i)
		everything := r.Type == "" || r.Type == "a" // whatever the numbers: the kernel does not look at them
		switch {
		case !slices.Contains([]string{"", "a", "b", "c"}, r.Type) || strings.Trim(r.Access, "rwm") != "" || r.Access == "" && !everything:
			b.refuse(field, "access %s to devices of type %s", quote(r.Access), quote(r.Type))
		case !r.Allow && everything:
			rules = []specs.LinuxDeviceCgroup{deny}
		case !r.Allow:
			rules = append(rules, *clone(&r))
		case everything:
			if b.ask(has(b.g.Devices), "--allow-device", All, field, "access to all devices") {
				rules = append(rules, *clone(&r))
			}
		default:
			rule := deviceRule(r.Type, r.Major, r.Minor, r.Access)
			if ordinaryAccess(r) || b.ask(granted(rule), "--allow-device", b.ruleName(r, rule), field, "access to devices %s", quote(rule)) {
				rules = append(rules, *clone(&r))
			}
		}
	}
	if b.spec.Linux.Resources == nil {
		b.spec.Linux.Resources = &specs.LinuxResources{}
	}
	b.spec.Linux.Resources.Devices = rules
}

// deviceRule writes a rule as the kernel and Docker do: c 10:229 rwm.
func deviceRule(kind string, major, minor *int64, access string) string {
	number := func(n *int64) string {
		if n == nil || *n < 0 {
			return "*"
		}
		return fmt.Sprint(*n)
	}
	if kind == "u" {
		kind = "c"
	}
	return fmt.Sprintf("%s %s:%s %s", kind, number(major), number(minor), access)
}

// deviceName is what grants a device: its path if it is the same device on the
// host, as whoever allows /dev/fuse does not mean a disk of that name.
func (b *builder) deviceName(d specs.LinuxDevice, rule string) string {
	if kind, major, minor, ok := b.o.Host.Device(d.Path); ok && kind == d.Type && major == d.Major && minor == d.Minor {
		return d.Path
	}
	return rule
}

// ruleName is what grants a rule: the path of a device of the spec, else the rule.
func (b *builder) ruleName(r specs.LinuxDeviceCgroup, rule string) string {
	for _, d := range b.asked.Linux.Devices {
		if r.Major != nil && r.Minor != nil && d.Type == r.Type && d.Major == *r.Major && d.Minor == *r.Minor {
			return b.deviceName(d, rule)
		}
	}
	return rule
}

// grantedDevices returns a function that tells whether a rule is granted. A grant
// of a path is one of the device that the host has there.
func (b *builder) grantedDevices() func(rule string) bool {
	type device struct{ which, access string }
	var list []device
	for _, g := range b.g.Devices {
		if strings.HasPrefix(g, "/") {
			if kind, major, minor, ok := b.o.Host.Device(g); ok {
				list = append(list, device{fmt.Sprintf("%s %d:%d", kind, major, minor), "rwm"})
			}
		} else if fields := strings.Fields(g); len(fields) == 3 {
			list = append(list, device{fields[0] + " " + fields[1], fields[2]})
		}
	}
	return func(rule string) bool {
		fields := strings.Fields(rule)
		which, access := fields[0]+" "+fields[1], fields[2]
		return has(b.g.Devices) || slices.ContainsFunc(list, func(d device) bool {
			return d.which == which && strings.Trim(access, d.access) == ""
		})
	}
}

// ordinaryAccess tells whether a rule is one of containerd's default: to make any
// node, and to use the ordinary devices and pseudo-terminals.
func ordinaryAccess(r specs.LinuxDeviceCgroup) bool {
	if strings.Trim(r.Access, "m") == "" {
		return true
	}
	if r.Type != "c" || r.Major == nil {
		return false
	}
	if *r.Major == 136 {
		return true
	}
	return r.Minor != nil && slices.Contains(slices.Collect(maps.Values(ordinaryDevices)), [2]int64{*r.Major, *r.Minor})
}

var (
	pageSize    = regexp.MustCompile(`^[0-9]+[KMG]B$`)
	unifiedFile = regexp.MustCompile(`^(memory\.(max|high|low|swap\.max|swap\.high|oom\.group)|cpu\.(max|max\.burst|weight|weight\.nice|idle)|` +
		`cpuset\.(cpus|mems)|io\.(max|weight|latency|bfq\.weight)|pids\.max|hugetlb\.[0-9]+[KMG]B\.(max|rsvd\.max)|rdma\.max|misc\.max)$`)
	rdmaDevice = regexp.MustCompile(`^[A-Za-z0-9_.-]+$`)
)

// takeResources takes over limits: they take something away, compared with an
// ordinary container.
func (b *builder) takeResources() {
	from := b.asked.Linux.Resources
	if from == nil {
		return
	}
	const field = "linux.resources"
	to := b.spec.Linux.Resources
	to.Memory, to.CPU, to.Pids, to.BlockIO = clone(from.Memory), clone(from.CPU), clone(from.Pids), clone(from.BlockIO)
	if m := from.Memory; m != nil && m.DisableOOMKiller != nil && *m.DisableOOMKiller {
		b.ask(has(b.g.Priorities, "oom"), "--allow-priority", "oom", field+".memory", "is not killed when its memory is used up")
	}
	if c := from.CPU; c != nil {
		if c.RealtimeRuntime != nil && *c.RealtimeRuntime != 0 || c.RealtimePeriod != nil && *c.RealtimePeriod != 0 {
			b.ask(has(b.g.Priorities, "cpu"), "--allow-priority", "cpu", field+".cpu", "real-time scheduling")
		}
		if !cpuList.MatchString(c.Cpus) || !cpuList.MatchString(c.Mems) {
			b.refuse(field+".cpu", "no list of processors")
		}
	}
	for _, h := range from.HugepageLimits {
		if !pageSize.MatchString(h.Pagesize) {
			b.refuse(field+".hugepageLimits", "pages of size %s", quote(h.Pagesize))
		}
	}
	to.HugepageLimits = slices.Clone(from.HugepageLimits)
	if n := from.Network; n != nil {
		b.ask(has(b.g.Priorities, "network"), "--allow-priority", "network", field+".network", "a class or priority of its packets on the host")
		to.Network = clone(n)
	}
	for name := range from.Rdma {
		if !rdmaDevice.MatchString(name) {
			b.refuse(field+".rdma", "device %s", quote(name))
		}
	}
	to.Rdma = maps.Clone(from.Rdma)
	for _, name := range slices.Sorted(maps.Keys(from.Unified)) {
		if !unifiedFile.MatchString(name) {
			b.refuse(field+".unified", "file %s of the control group", quote(name))
		}
	}
	to.Unified = maps.Clone(from.Unified)
}

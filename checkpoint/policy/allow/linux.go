package allow

import (
	"maps"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// What engines have masked, or made read-only, in every container for years. They
// mask more by now, which differs between their versions and with the number of
// processors, and tells about the host without letting anybody change it.
var (
	maskedEverywhere = []string{
		"/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats",
		"/proc/sched_debug", "/proc/scsi", "/sys/firmware",
	}
	guardedEverywhere = []string{"/proc/asound", "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
)

// takeLinux takes over what is not a resource, a mount or a namespace.
func (b *builder) takeLinux() {
	from, to := b.asked.Linux, b.spec.Linux
	b.takePaths()
	b.takeSysctls()
	b.takeDevices()
	b.takeResources()
	switch from.RootfsPropagation {
	case "", "private", "rprivate", "slave", "rslave":
		to.RootfsPropagation = from.RootfsPropagation
	default:
		b.refuse("linux.rootfsPropagation", "mounts that the host would share (%s)", quote(from.RootfsPropagation))
	}
	to.MountLabel = from.MountLabel
	b.label("linux.mountLabel", from.MountLabel, "container_file_t")
	if p := from.Personality; p != nil {
		if p.Domain != specs.PerLinux && p.Domain != specs.PerLinux32 || len(p.Flags) > 0 {
			b.refuse("linux.personality", "personality %s with %d flags", quote(string(p.Domain)), len(p.Flags))
		}
		to.Personality = clone(p)
	}
	if p := from.MemoryPolicy; p != nil {
		b.ask(has(b.g.Priorities, "memory"), "--allow-priority", "memory", "linux.memoryPolicy", "memory of chosen NUMA nodes")
		to.MemoryPolicy = clone(p)
	}
	to.TimeOffsets = maps.Clone(from.TimeOffsets)
	to.UIDMappings, to.GIDMappings = slices.Clone(from.UIDMappings), slices.Clone(from.GIDMappings)
}

func (b *builder) takePaths() {
	from, to := b.asked.Linux, b.spec.Linux
	for _, p := range slices.Concat(from.MaskedPaths, from.ReadonlyPaths) {
		if !plainPath(p) {
			b.refuse("linux.maskedPaths", "path %s", quote(p))
		}
	}
	to.MaskedPaths, to.ReadonlyPaths = slices.Clone(from.MaskedPaths), slices.Clone(from.ReadonlyPaths)
	var open []string
	for _, p := range maskedEverywhere {
		if !below(p, from.MaskedPaths) {
			open = append(open, p)
		}
	}
	for _, p := range guardedEverywhere {
		if !below(p, from.MaskedPaths) && !below(p, from.ReadonlyPaths) {
			open = append(open, p)
		}
	}
	if len(open) == len(maskedEverywhere)+len(guardedEverywhere) {
		b.ask(has(b.g.Unmask, All), "--allow-unmask", All, "linux.maskedPaths", "no path of /proc and /sys is masked or read-only")
		return
	}
	for _, p := range open {
		field, what := "linux.maskedPaths", "%s is not masked"
		if slices.Contains(guardedEverywhere, p) {
			field, what = "linux.readonlyPaths", "%s is neither masked nor read-only"
		}
		b.ask(has(b.g.Unmask, p), "--allow-unmask", p, field, what, p)
	}
}

// below tells whether a path is one of a list, or in one.
func below(p string, list []string) bool {
	for ; p != "/"; p = path.Dir(p) {
		if slices.ContainsFunc(list, func(l string) bool { return path.Clean(l) == p }) {
			return true
		}
	}
	return false
}

// sysctlName leaves out slashes, by which the runtimes could be led out of the
// part of the tree that a name begins with.
var sysctlName = regexp.MustCompile(`^[a-zA-Z0-9_-]+(\.[a-zA-Z0-9_-]+)+$`)

func (b *builder) takeSysctls() {
	for _, name := range slices.Sorted(maps.Keys(b.asked.Linux.Sysctl)) {
		value := b.asked.Linux.Sysctl[name]
		switch {
		case !sysctlName.MatchString(name) || !printable(strings.ReplaceAll(value, "\t", " ")):
			b.refuse("linux.sysctl", "kernel setting %s", quote(name))
			continue
		case b.ownSetting(name):
		default:
			b.ask(has(b.g.Sysctls, name), "--allow-sysctl", name, "linux.sysctl", "kernel setting %s, not only for the container, to be %s", name, quote(value))
		}
		if b.spec.Linux.Sysctl == nil {
			b.spec.Linux.Sysctl = map[string]string{}
		}
		b.spec.Linux.Sysctl[name] = value
	}
}

// ownSetting tells whether a kernel setting is of a namespace that is the
// container's alone.
func (b *builder) ownSetting(name string) bool {
	own := func(kind specs.LinuxNamespaceType) bool {
		return slices.ContainsFunc(b.asked.Linux.Namespaces, func(ns specs.LinuxNamespace) bool { return ns.Type == kind && ns.Path == "" })
	}
	switch name {
	case "kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem", "kernel.shmall", "kernel.shmmax", "kernel.shmmni", "kernel.shm_rmid_forced":
		return own(specs.IPCNamespace)
	case "kernel.domainname":
		return own(specs.UTSNamespace)
	}
	return strings.HasPrefix(name, "fs.mqueue.") && own(specs.IPCNamespace) || strings.HasPrefix(name, "net.") && own(specs.NetworkNamespace)
}

// ordinaryNamespaces are what every container has of its own. Those that an
// ordinary one may do without are not in it: cgroup, time, user.
var ordinaryNamespaces = []specs.LinuxNamespaceType{
	specs.PIDNamespace, specs.IPCNamespace, specs.UTSNamespace, specs.MountNamespace, specs.NetworkNamespace,
}

func (b *builder) takeNamespaces() {
	seen := map[specs.LinuxNamespaceType]bool{}
	for _, ns := range b.asked.Linux.Namespaces {
		known := slices.Contains(ordinaryNamespaces, ns.Type) ||
			slices.Contains([]specs.LinuxNamespaceType{specs.CgroupNamespace, specs.TimeNamespace, specs.UserNamespace}, ns.Type)
		if !known || seen[ns.Type] {
			b.refuse("linux.namespaces", "namespace %s, which is unknown or named twice", quote(string(ns.Type)))
			continue
		}
		seen[ns.Type] = true
		if ns.Path != "" {
			ns.Path = b.namespacePath(ns)
		}
		b.spec.Linux.Namespaces = append(b.spec.Linux.Namespaces, ns)
	}
	for _, kind := range ordinaryNamespaces {
		switch {
		case seen[kind]:
		case kind == specs.MountNamespace:
			b.refuse("linux.namespaces", "the host's mount namespace")
		default:
			b.ask(has(b.g.Namespaces, string(kind)) || kind == specs.NetworkNamespace && b.g.Network == "host",
				"--allow-host", string(kind), "linux.namespaces", "the host's %s namespace", kind)
		}
	}
}

// namespacePath is which namespace the container gets whose old one had a path;
// "" for one of its own.
func (b *builder) namespacePath(ns specs.LinuxNamespace) string {
	const field = "linux.namespaces"
	gone := OfProcess(ns.Path) || !b.o.Host.Exists(ns.Path)
	named := has(b.g.Namespaces, ns.Path)
	switch {
	case !plainPath(ns.Path):
		b.refuse(field, "%s namespace %s", ns.Type, quote(ns.Path))
	case ns.Type == specs.MountNamespace:
		b.refuse(field, "the mount namespace %s", quote(ns.Path))
	case ns.Type == specs.NetworkNamespace:
		value := "join=" + ns.Path
		if gone {
			value = "join=ID"
		}
		b.ask(named || b.g.Network != "", "--network", value, field, "a network namespace that was made for it, %s%s", quote(ns.Path), isGone(gone))
		return ns.Path
	case gone || !named && !b.g.Privileged && (ns.Type == specs.IPCNamespace || ns.Type == specs.UTSNamespace):
		joined := b.joined(ns)
		if !gone {
			b.leaveOut(field, "--allow-host "+shellQuote(ns.Path), "the %s namespace %s, which is somebody else's, too; it gets one of its own", ns.Type, quote(ns.Path))
			return ""
		}
		return joined
	default:
		b.ask(named, "--allow-host", ns.Path, field, "the %s namespace %s, which is somebody else's, too", ns.Type, quote(ns.Path))
		return ns.Path
	}
	return ""
}

func isGone(is bool) string {
	if is {
		return ", which is gone"
	}
	return ""
}

// joined is the path of a namespace other than the network's that can be joined
// still, else "": that of a sandbox which is gone.
func (b *builder) joined(ns specs.LinuxNamespace) string {
	switch {
	case ns.Path == "" || !OfProcess(ns.Path) && b.o.Host.Exists(ns.Path):
		return ns.Path
	case ns.Type == specs.PIDNamespace:
		// CRIU would have to know it from outside, like a network's.
		b.refuse("linux.namespaces", "the process IDs of its pod (namespace %s), which is gone", quote(ns.Path))
	}
	return ""
}

// cgroup is where the container's control group goes. It is below the parent of
// the old one only if the caller names that; an engine's parent, or containerd's
// own, is not one that anybody chose.
func (b *builder) cgroup() string {
	old := b.asked.Linux.CgroupsPath
	fresh := path.Join("/", b.o.Namespace, b.o.ID)
	slice := "stasis-" + b.o.Namespace + ":" + b.o.ID
	if b.o.Systemd && len(strings.Split(old, ":")) == 3 {
		fresh = "system.slice:" + slice
	}
	if parent := b.g.CgroupParent; parent != "" {
		if b.o.Systemd && strings.HasSuffix(parent, ".slice") && !strings.Contains(parent, "/") {
			return parent + ":" + slice
		}
		return path.Join("/", parent, b.o.ID)
	}
	parent := cgroupParent(old, b.o.Systemd)
	usual := []string{"/", "/" + b.o.Namespace, "/" + b.o.OldNamespace, "system.slice"}
	if parent == "" || !b.o.Own && (slices.Contains(usual, parent) ||
		!b.ask(false, "--cgroup-parent", parent, "linux.cgroupsPath", "a place in the control group %s", quote(parent))) {
		return fresh
	}
	if parts := strings.Split(old, ":"); len(parts) == 3 && b.o.Systemd {
		return parent + ":" + parts[1] + ":" + b.o.ID
	}
	return path.Join(parent, b.o.ID)
}

// cgroupParent is the parent of a control group that somebody chose, or "". A path
// of systemd's form (slice:prefix:name) means something only where systemd is.
func cgroupParent(old string, systemd bool) string {
	if parts := strings.Split(old, ":"); len(parts) > 1 {
		engine := len(parts) != 3 || strings.Contains(parts[0], "kubepods") || slices.Contains([]string{"cri-containerd", "crio", "libpod"}, parts[1])
		if engine || !systemd {
			return ""
		}
		return parts[0]
	}
	if old == "" || strings.Contains(old, "/kubepods") || strings.Contains(old, "/libpod") {
		return ""
	}
	return path.Dir(path.Join("/", old))
}

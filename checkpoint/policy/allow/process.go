package allow

import (
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/pkg/cap"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// ordinaryCaps are containerd's default; a test compares them.
var ordinaryCaps = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID", "CAP_SETUID",
	"CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
}

// ordinaryNofile is containerd's default limit on open files.
const ordinaryNofile = 1024

func (b *builder) takeProcess() {
	from, to := b.asked.Process, b.spec.Process
	to.Terminal, to.ConsoleSize = from.Terminal, clone(from.ConsoleSize)
	to.User = specs.User{UID: from.User.UID, GID: from.User.GID, Umask: clone(from.User.Umask), AdditionalGids: slices.Clone(from.User.AdditionalGids)}
	to.Args, to.Env, to.Cwd = slices.Clone(from.Args), slices.Clone(from.Env), from.Cwd
	if from.CommandLine != "" || from.User.Username != "" {
		b.refuse("process", "a command line or user name of Windows")
	}
	to.Capabilities = b.capabilities(from.Capabilities)
	b.takeUlimits()
	to.NoNewPrivileges = from.NoNewPrivileges
	if !from.NoNewPrivileges {
		b.ask(b.g.NewPrivileges, "--allow-new-privs", "", "process.noNewPrivileges", "programs may gain privileges (no_new_privs is off)")
	}
	to.ApparmorProfile = from.ApparmorProfile
	if !ordinaryProfile(from.ApparmorProfile) {
		b.ask(has(b.g.Labels, from.ApparmorProfile), "--allow-label", from.ApparmorProfile, "process.apparmorProfile", "AppArmor profile %s", quote(from.ApparmorProfile))
	}
	to.SelinuxLabel = from.SelinuxLabel
	b.label("process.selinuxLabel", from.SelinuxLabel, "container_t")
	to.OOMScoreAdj = clone(from.OOMScoreAdj)
	if n := from.OOMScoreAdj; n != nil && *n < 0 {
		b.ask(has(b.g.Priorities, "oom"), "--allow-priority", "oom", "process.oomScoreAdj", "is killed later than others when memory is short (%d)", *n)
	}
	to.Scheduler = clone(from.Scheduler)
	if s := from.Scheduler; s != nil {
		ordinary := slices.Contains([]specs.LinuxSchedulerPolicy{"", specs.SchedOther, specs.SchedBatch, specs.SchedIdle}, s.Policy)
		if !ordinary || s.Nice < 0 || s.Priority != 0 || len(s.Flags) > 0 || s.Runtime|s.Deadline|s.Period != 0 {
			b.ask(has(b.g.Priorities, "scheduler"), "--allow-priority", "scheduler", "process.scheduler", "scheduling policy %s, nice value %d", quote(string(s.Policy)), s.Nice)
		}
	}
	to.IOPriority = clone(from.IOPriority)
	if p := from.IOPriority; p != nil && p.Class != specs.IOPRIO_CLASS_BE && p.Class != specs.IOPRIO_CLASS_IDLE {
		b.ask(has(b.g.Priorities, "io"), "--allow-priority", "io", "process.ioPriority", "priority %s of disks", quote(string(p.Class)))
	}
	if a := from.ExecCPUAffinity; a != nil {
		if !cpuList.MatchString(a.Initial) || !cpuList.MatchString(a.Final) {
			b.refuse("process.execCPUAffinity", "no list of processors")
		}
		to.ExecCPUAffinity = clone(a)
	}
	b.spec.Root.Readonly = b.asked.Root.Readonly
	b.spec.Hostname, b.spec.Domainname = b.asked.Hostname, b.asked.Domainname
}

var cpuList = regexp.MustCompile(`^[0-9,\-]*$`)

// capabilities takes over those that are ordinary or granted.
func (b *builder) capabilities(from *specs.LinuxCapabilities) *specs.LinuxCapabilities {
	to := &specs.LinuxCapabilities{}
	if from == nil {
		return to // as the runtimes take it: none
	}
	var more []string
	take := func(list []string) (taken []string) {
		for _, name := range list {
			if !slices.Contains(ordinaryCaps, name) && !slices.Contains(more, name) {
				more = append(more, name)
			}
			taken = append(taken, name)
		}
		return taken
	}
	to.Bounding, to.Permitted, to.Effective = take(from.Bounding), take(from.Permitted), take(from.Effective)
	to.Inheritable, to.Ambient = take(from.Inheritable), take(from.Ambient)
	slices.Sort(more)
	// Known returns the library's own list.
	if everything := slices.DeleteFunc(slices.Clone(cap.Known()), func(name string) bool { return slices.Contains(ordinaryCaps, name) }); covers(more, everything) {
		b.ask(has(b.g.Capabilities), "--allow-capability", All, "process.capabilities", "all capabilities")
		return to
	}
	for _, name := range more {
		b.ask(has(b.g.Capabilities, name, strings.TrimPrefix(name, "CAP_")), "--allow-capability", name, "process.capabilities", "capability %s", quote(name))
	}
	return to
}

func covers(list, all []string) bool {
	return !slices.ContainsFunc(all, func(s string) bool { return !slices.Contains(list, s) })
}

func (b *builder) takeUlimits() {
	for _, l := range b.asked.Process.Rlimits {
		name := strings.ToLower(strings.TrimPrefix(l.Type, "RLIMIT_"))
		hard, known := b.o.Host.Ulimit(name)
		switch {
		case !known || l.Type != "RLIMIT_"+strings.ToUpper(name):
			b.refuse("process.rlimits", "resource limit %s, which is none", quote(l.Type))
			continue
		case max(l.Hard, l.Soft) <= hard, name == "nofile" && max(l.Hard, l.Soft) <= ordinaryNofile:
		default:
			b.ask(has(b.g.Ulimits, name), "--allow-ulimit", name, "process.rlimits", "limit %s of %d, above the caller's own %d", name, max(l.Hard, l.Soft), hard)
		}
		b.spec.Process.Rlimits = append(b.spec.Process.Rlimits, l)
	}
}

// ordinaryProfile tells whether an AppArmor profile is an engine's default, or none
// as in containerd's default spec.
func ordinaryProfile(name string) bool {
	return slices.Contains([]string{"", "unconfined", "cri-containerd.apparmor.d", "docker-default", "nerdctl-default", "crio-default"}, name) ||
		strings.HasPrefix(name, "containers-default-") && printable(name)
}

// seLabel is one of a container; its type and its categories.
var seLabel = regexp.MustCompile(`^system_u:(system_r|object_r):([a-z0-9_]+):s0(:[c0-9,.]+)?$`)

// label checks an SELinux label, whose type is ordinarily the one given.
func (b *builder) label(field, label, ordinary string) {
	if label == "" {
		return
	}
	m := seLabel.FindStringSubmatch(label)
	if m == nil {
		b.refuse(field, "SELinux label %s, which is not a container's", quote(label))
	} else if m[2] != ordinary {
		b.ask(has(b.g.Labels, label), "--allow-label", label, field, "SELinux label %s", quote(label))
	}
}

package allow

import (
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/contrib/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// takeSeccomp comes after the capabilities, which containerd's default profile
// depends on.
func (b *builder) takeSeccomp() {
	const field = "linux.seccomp"
	from := b.asked.Linux.Seccomp
	if from == nil {
		b.ask(b.g.Seccomp == "unconfined", "--allow-seccomp", "unconfined", field, "all system calls (no seccomp profile)")
		return
	}
	if from.ListenerPath != "" || from.ListenerMetadata != "" {
		b.refuse(field, "to be supervised by who listens at %s on the host", quote(from.ListenerPath))
	}
	// A call that a capability guards may be in the profile of a container which
	// lacks that.
	caps := &specs.LinuxCapabilities{Bounding: slices.Concat(ordinaryCaps, b.spec.Process.Capabilities.Bounding)}
	usual := seccomp.DefaultProfile(&specs.Spec{Process: &specs.Process{Capabilities: caps}})
	if what := permitsMore(from, usual); what != "" {
		b.ask(b.g.Seccomp != "", "--allow-seccomp", "profile", field, "a seccomp profile that permits more than containerd's default: %s", what)
	}
	b.spec.Linux.Seccomp = clone(from)
}

// permitsMore says what a profile permits that another may not, or "". It finds
// more than there is where rules say the same in different words.
func permitsMore(p, than *specs.LinuxSeccomp) string {
	if permitting(p.DefaultAction) {
		return "what it does not name"
	}
	for _, f := range p.Flags {
		if f != specs.LinuxSeccompFlagLog && f != "SECCOMP_FILTER_FLAG_TSYNC" {
			return "flag " + text(string(f))
		}
	}
	for _, a := range p.Architectures {
		if !slices.Contains(than.Architectures, a) {
			return "architecture " + text(string(a))
		}
	}
	var more []string
	for _, rule := range p.Syscalls {
		for _, name := range rule.Names {
			if permitting(rule.Action) && !permits(than, name, rule.Args) && !slices.Contains(more, name) {
				more = append(more, name)
			}
		}
	}
	slices.Sort(more)
	if n := len(more); n > 8 {
		return text(strings.Join(more[:8], " ")) + " …"
	}
	return text(strings.Join(more, " "))
}

// permits tells whether a profile permits a call with arguments for which the
// conditions hold.
func permits(p *specs.LinuxSeccomp, name string, args []specs.LinuxSeccompArg) bool {
	return slices.ContainsFunc(p.Syscalls, func(rule specs.LinuxSyscall) bool {
		return permitting(rule.Action) && slices.Contains(rule.Names, name) && (len(rule.Args) == 0 || slices.Equal(rule.Args, args))
	})
}

// permitting tells whether a call is made, or may be: a tracer or supervisor
// decides.
func permitting(a specs.LinuxSeccompAction) bool {
	switch a {
	case specs.ActErrno, specs.ActKill, specs.ActKillProcess, specs.ActKillThread, specs.ActTrap:
		return false
	}
	return true
}

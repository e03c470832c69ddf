// Package allow makes the spec of a restored container out of the spec that comes
// with its checkpoint.
//
// Whoever made the checkpoint wrote that spec, so it is a request and not an order.
// New starts from an empty spec and takes over, field by field, what an ordinary
// container has: one with containerd's default spec and seccomp profile. For all
// else the caller has to name a grant. A few things cannot be granted at all: OCI
// hooks, annotations that runtimes obey, sockets and programs of the host.
//
//	asked, unknown, err := allow.Parse(data)
//	spec, asks, err := allow.New(asked, unknown, allow.Options{Grants: grants, Host: allow.ThisHost()})
//
// asks lists what the checkpoint asks for beyond an ordinary container, granted or
// not. err matches errdefs.ErrPermissionDenied if something is missing; it names
// every missing grant as flags of `stasis restore`.
//
// docs/security.md has the rules. TestFields fails if the runtime specification
// has a field without one.
package allow

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"unicode"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/fault"
)

// Verdict says what becomes of an Ask.
type Verdict string

// Verdicts.
const (
	NeedsFlag Verdict = "needs a flag" // the restore is refused without Ask.Flag
	Granted   Verdict = "granted"
	LeftOut   Verdict = "left out" // the restore goes on without it
	Never     Verdict = "refused"  // the restore is refused, whatever is granted
)

// Ask is something that a spec asks for beyond what an ordinary container has.
type Ask struct {
	// Field is the place in the spec: "process.noNewPrivileges", "mounts[3]".
	Field string `json:"field"`
	// What says it to people. Strings of the spec are quoted in it.
	What    string  `json:"what"`
	Verdict Verdict `json:"verdict"`
	// Flag grants it, quoted for a shell; empty if nothing does.
	Flag string `json:"flag,omitempty"`
}

// All is the value of a grant for everything of its kind.
const All = "all"

// Grants are what a caller allows. The zero value is an ordinary container.
type Grants struct {
	Mounts       []string // SRC, SRC:DST or All; for the kernel's file systems SRC is the type
	Devices      []string // a path on the host, a rule of the control group such as "c 10:229 rwm", or All
	Namespaces   []string // pid, network, ipc, uts; the path of one to be joined; or All
	Capabilities []string // CAP_X or, as Docker has it, X; or All
	// Seccomp is "" (a profile that permits no more than containerd's default),
	// "profile" (any profile), or "unconfined" (none, too).
	Seccomp       string
	NewPrivileges bool     // no_new_privs may be off
	Unmask        []string // paths that need be neither masked nor read-only, or All
	Sysctls       []string // names, or All
	Ulimits       []string // nofile, memlock, …, or All
	Labels        []string // of SELinux, profiles of AppArmor, or All
	Priorities    []string // of Priorities, or All
	// CgroupParent is where the new control group goes: a path or a slice.
	CgroupParent string
	// Network is --network: the caller then chooses the network namespace.
	Network string
	// Privileged grants everything that can be granted.
	Privileged bool
}

// Priorities are the values of Grants.Priorities.
var Priorities = []string{"oom", "scheduler", "io", "cpu", "memory", "network"}

// Options are what New goes by.
type Options struct {
	Grants Grants
	// Own: this node made the checkpoint, and nobody has changed it. It gets what
	// it had, without grants.
	Own bool
	// ID and Namespace are the new container's, OldNamespace is the one that the
	// checkpoint was taken in.
	ID, Namespace, OldNamespace string
	Systemd                     bool // the host runs systemd
	Host                        Host
}

// New makes the spec of the new container. unknown are the fields that Parse did
// not know. asks is complete even if there is an error.
//
// A bind mount without a source in the new spec is a file of the engine's (see
// EngineFile), which the caller makes.
func New(asked *specs.Spec, unknown []string, o Options) (_ *specs.Spec, asks []Ask, _ error) {
	b := &builder{asked: asked, o: o, g: o.Grants}
	b.spec = &specs.Spec{Version: specs.Version, Process: &specs.Process{}, Root: &specs.Root{Path: "rootfs"}, Linux: &specs.Linux{}}
	b.never(unknown)
	if o.Own {
		b.takeOwn()
	} else {
		b.takeProcess()
		b.takeNamespaces()
		b.takeMounts()
		b.takeLinux()
		b.takeSeccomp()
	}
	b.spec.Linux.CgroupsPath = b.cgroup()
	return b.spec, b.asks, b.verdict()
}

type builder struct {
	asked, spec *specs.Spec
	o           Options
	g           Grants
	asks        []Ask
}

// takeOwn takes over all but what no checkpoint gets.
func (b *builder) takeOwn() {
	own := clone(b.asked)
	own.Version, own.Hooks = specs.Version, nil
	own.Annotations = b.spec.Annotations
	own.Root.Path = "rootfs"
	own.Linux.IntelRdt, own.Linux.NetDevices = nil, nil
	b.spec = own
	for i, ns := range own.Linux.Namespaces {
		if ns.Type != specs.NetworkNamespace {
			own.Linux.Namespaces[i].Path = b.joined(ns)
		}
	}
}

// clone copies a value of JSON types.
func clone[T any](v *T) *T {
	if v == nil {
		return nil
	}
	data, err := json.Marshal(v)
	c := new(T)
	if err == nil {
		err = json.Unmarshal(data, c)
	}
	if err != nil {
		panic(fmt.Sprintf("copy %T: %v", v, err)) // it came out of JSON
	}
	return c
}

// never is for what no checkpoint gets, whoever made it.
func (b *builder) never(unknown []string) {
	for _, field := range unknown {
		section := func(name string) bool { return strings.HasPrefix(strings.ToLower(field), strings.ToLower(name)+".") }
		if b.o.Own || slices.ContainsFunc([]string{"hooks", "linux.intelRdt", "linux.netDevices"}, section) {
			continue // nobody else wrote it, or it is in what is left out
		}
		b.refuse(text(field), "a field that this version of Stasis does not know")
	}
	if h := b.asked.Hooks; h != nil {
		for _, kind := range []struct {
			name  string
			hooks []specs.Hook
		}{
			{"prestart", h.Prestart}, //lint:ignore SA1019 it is run all the same
			{"createRuntime", h.CreateRuntime}, {"createContainer", h.CreateContainer},
			{"startContainer", h.StartContainer}, {"poststart", h.Poststart}, {"poststop", h.Poststop},
		} {
			for i, hook := range kind.hooks {
				b.leaveOut(fmt.Sprintf("hooks.%s[%d]", kind.name, i), "", "a hook: run program %s on the host", quote(hook.Path))
			}
		}
	}
	for _, key := range slices.Sorted(maps.Keys(b.asked.Annotations)) {
		value := b.asked.Annotations[key]
		if key == checkpoint.AnnotationTCP && checkpoint.CheckTCP(value) == nil || strings.HasPrefix(key, "org.opencontainers.image.") {
			if b.spec.Annotations == nil {
				b.spec.Annotations = map[string]string{}
			}
			b.spec.Annotations[key] = value
			continue
		}
		b.leaveOut("annotations", "", "annotation %s", quote(key))
	}
	for name, is := range map[string]bool{
		"solaris": b.asked.Solaris != nil, "windows": b.asked.Windows != nil, "vm": b.asked.VM != nil,
		"zos": b.asked.ZOS != nil, "freebsd": b.asked.FreeBSD != nil,
	} {
		if is {
			b.refuse(name, "a section that is not for Linux containers")
		}
	}
	if b.asked.Linux.IntelRdt != nil {
		b.leaveOut("linux.intelRdt", "", "shares of the processor's cache and memory bandwidth")
	}
	for _, name := range slices.Sorted(maps.Keys(b.asked.Linux.NetDevices)) {
		b.leaveOut("linux.netDevices", "", "the host's network device %s", quote(name))
	}
}

// ask notes something that a flag grants, and tells whether it is granted. values
// are what the flag takes; the last one says it best.
func (b *builder) ask(granted bool, flag, value, field, format string, args ...any) bool {
	a := Ask{Field: field, What: fmt.Sprintf(format, args...), Verdict: NeedsFlag}
	if value != "" {
		if !printable(value) {
			a.Verdict = Never // no flag can be pasted
			b.asks = append(b.asks, a)
			return false
		}
		flag += " " + shellQuote(value)
	}
	a.Flag = flag
	if granted || b.g.Privileged {
		a.Verdict = Granted
	}
	b.asks = append(b.asks, a)
	return a.Verdict == Granted
}

func (b *builder) refuse(field, format string, args ...any) {
	b.asks = append(b.asks, Ask{Field: field, What: fmt.Sprintf(format, args...), Verdict: Never})
}

func (b *builder) leaveOut(field, flag, format string, args ...any) {
	b.asks = append(b.asks, Ask{Field: field, What: fmt.Sprintf(format, args...), Verdict: LeftOut, Flag: flag})
}

// has tells whether one of the names is granted, or all are.
func has(granted []string, names ...string) bool {
	return slices.ContainsFunc(granted, func(g string) bool { return g == All || slices.Contains(names, g) })
}

// Limits on what an error says.
const (
	maxShown = 100 // asks
	maxText  = 200 // bytes of a string out of a spec
)

// verdict is nil if nothing is missing.
func (b *builder) verdict() error {
	var never, missing, flags []string
	for _, a := range b.asks {
		line := fmt.Sprintf("  %s: %s", a.Field, a.What)
		switch a.Verdict {
		case Never:
			never = append(never, line)
		case NeedsFlag:
			missing = append(missing, line+" ("+a.Flag+")")
			if !slices.Contains(flags, a.Flag) {
				flags = append(flags, a.Flag)
			}
		}
	}
	var t strings.Builder
	if len(never) > 0 {
		fmt.Fprintf(&t, "the spec in the checkpoint asks for what no checkpoint gets:\n%s", shorten(never))
	}
	if len(missing) > 0 {
		if len(never) > 0 {
			t.WriteString("\nand ")
		} else {
			t.WriteString("the spec in the checkpoint asks ")
		}
		fmt.Fprintf(&t, "for more than an ordinary container has:\n%s", shorten(missing))
		if len(never) == 0 {
			fmt.Fprintf(&t, "\nto grant that, add: %s", strings.Join(flags, " "))
		}
	}
	if t.Len() == 0 {
		return nil
	}
	return fault.New(errdefs.ErrPermissionDenied, "%s", t.String())
}

func shorten(lines []string) string {
	if more := len(lines) - maxShown; more > 0 {
		lines = append(slices.Clone(lines[:maxShown]), fmt.Sprintf("  and %d more, which `stasis inspect` shows", more))
	}
	return strings.Join(lines, "\n")
}

// text makes a string of a spec fit for people.
func text(s string) string {
	q := quote(s)
	return q[1 : len(q)-1]
}

func quote(s string) string {
	if len(s) > maxText {
		s = s[:maxText] + "…"
	}
	return fmt.Sprintf("%q", s)
}

func printable(s string) bool {
	return s == strings.ToValidUTF8(s, "") && !strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) })
}

// shellQuote makes one word of a shell's command line of s, which the author of
// the checkpoint chose and people paste.
func shellQuote(s string) string {
	safe := func(r rune) bool {
		return r < unicode.MaxASCII && (unicode.IsLetter(r) || unicode.IsDigit(r)) || strings.ContainsRune("_-./:=,@+", r)
	}
	if s != "" && !strings.ContainsFunc(s, func(r rune) bool { return !safe(r) }) {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// Package seccomp compares seccomp filters with the profile of an OCI runtime spec.
//
// CRIU's images hold the filters that processes had installed, as programs. How a
// libseccomp wrote a profile down differs between its versions, so a program is followed
// for every system call of each architecture, and what it answers is compared with what
// the profile says.
package seccomp

import (
	"fmt"
	"runtime"
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// Profile is a spec's profile.
type Profile struct {
	permits bool // what no rule is about
	rules   map[string][]rule
	abis    []abi // that the profile is about
	others  []abi // of this machine, where nothing is permitted
	// newer: the profile names system calls that this version does not know,
	// whose numbers are beyond its tables.
	newer bool
}

// rule is an alternative of a profile.
type rule struct {
	permits bool
	args    []specs.LinuxSeccompArg // all of them
}

// NewProfile reads a profile. It is an error where the system calls of this machine are
// not known.
func NewProfile(s *specs.LinuxSeccomp) (*Profile, error) {
	p := &Profile{permits: permitting(s.DefaultAction), rules: map[string][]rule{}}
	for _, call := range s.Syscalls {
		// As libseccomp and runc do: conditions on one and the same argument
		// are alternatives, else all must hold.
		perArg := map[uint]int{}
		several := false
		for _, arg := range call.Args {
			perArg[arg.Index]++
			several = several || perArg[arg.Index] > 1
		}
		var rules []rule
		if several {
			for _, arg := range call.Args {
				rules = append(rules, rule{permitting(call.Action), []specs.LinuxSeccompArg{arg}})
			}
		} else {
			rules = []rule{{permitting(call.Action), call.Args}}
		}
		for _, name := range call.Names {
			p.rules[name] = append(p.rules[name], rules...)
			p.newer = p.newer || !knownSyscalls()[name]
		}
	}
	if abisOf(runtime.GOARCH) == nil {
		return nil, fmt.Errorf("seccomp filters cannot be compared on %s", runtime.GOARCH)
	}
	for _, a := range abisOf(runtime.GOARCH) {
		if a.native || slices.Contains(s.Architectures, a.name) {
			p.abis = append(p.abis, a)
		} else {
			p.others = append(p.others, a)
		}
	}
	return p, nil
}

func permitting(a specs.LinuxSeccompAction) bool {
	switch a {
	case specs.ActAllow, specs.ActLog, specs.ActTrace, specs.ActNotify:
		return true
	}
	return false
}

// Beyond says what a filter, as the kernel takes it, permits and the profile does not,
// or "". What is too complex to be compared counts as such.
func (p *Profile) Beyond(filter []byte) string {
	prog, ok := parseBPF(filter)
	if !ok {
		return "a filter is malformed"
	}
	for _, a := range p.abis {
		for nr := range uint32(maxSyscall) {
			if name, bad := p.judgeCall(prog, a, nr); bad != "" {
				return fmt.Sprintf("%s (%s): %s", name, a.name, bad)
			}
		}
	}
	for _, a := range p.others {
		for nr := range uint32(maxSyscall) {
			if out, ok := prog.explore(a.call(nr)); !ok || out.permits {
				return fmt.Sprintf("system calls of %s", a.name)
			}
		}
	}
	return ""
}

// maxSyscall is above the numbers of system calls of today: they go to 472, and
// beyond there is ENOSYS.
const maxSyscall = 1024

// judgeCall compares filter and profile for one system call.
func (p *Profile) judgeCall(prog bpfProgram, a abi, nr uint32) (name, bad string) {
	name, named := a.calls[nr]
	if !named {
		if p.permits || p.newer && nr > a.last {
			return "", ""
		}
		name = fmt.Sprintf("number %d", nr)
	}
	rules := p.rules[name]
	if mayMultiplex(a, name) {
		for _, part := range multiplexed[name] {
			rules = append(rules, p.rules[part]...)
		}
	}
	all, none := p.decided(rules)
	if all {
		return "", ""
	}
	out, ok := prog.explore(a.call(nr))
	switch {
	case !ok:
		return name, "the filter is too complex to be compared"
	case !out.permits:
		return "", ""
	case none:
		return name, "is not permitted by the profile"
	case out.opaque:
		return name, "the filter is too complex to be compared"
	}
	return name, p.compare(prog, a, nr, rules, out.atoms)
}

// decided tells whether the profile permits a call whatever its arguments, or
// with no arguments.
func (p *Profile) decided(rules []rule) (all, none bool) {
	none = !p.permits
	all = p.permits
	for _, r := range rules {
		switch {
		case r.permits && len(r.args) == 0:
			return true, false
		case r.permits:
			none = false
		default:
			all = false
		}
	}
	if p.permits && !all {
		for _, r := range rules {
			if !r.permits && len(r.args) == 0 && !slices.ContainsFunc(rules, func(r rule) bool { return r.permits }) {
				return false, true
			}
		}
	}
	return all, none
}

// compare tries all arguments that make a difference to filter or profile.
func (p *Profile) compare(prog bpfProgram, a abi, nr uint32, rules []rule, atoms []atom) string {
	for _, r := range rules {
		for _, arg := range r.args {
			atoms = append(atoms, atomsOf(arg)...)
		}
	}
	perWord := map[int][]atom{}
	known := a.call(nr)
	for _, q := range atoms {
		if _, is := known[q.word]; !is {
			perWord[q.word] = append(perWord[q.word], q)
		}
	}
	var words []int
	choices := map[int][]uint32{}
	total := 1
	for word, on := range perWord {
		values, ok := cases(on)
		if total *= max(len(values), 1); !ok || total > maxCases {
			return "the filter is too complex to be compared"
		}
		words = append(words, word)
		choices[word] = values
	}
	var data seccompData
	data[wordNumber], data[wordArch] = a.number(nr), a.audit
	for i := range total {
		for _, word := range words {
			values := choices[word]
			data[word] = values[i%len(values)]
			i /= len(values)
		}
		permitted, ok := prog.run(&data)
		if !ok {
			return "the filter is too complex to be compared"
		}
		if permitted && !p.allows(rules, &data) {
			var args [6]uint64
			for n := range args {
				args[n] = data.arg(uint(n))
			}
			return fmt.Sprintf("is not permitted by the profile with arguments %#x", args)
		}
	}
	return ""
}

// allows is what the profile says to a call.
func (p *Profile) allows(rules []rule, data *seccompData) bool {
	denied := false
	for _, r := range rules {
		if slices.ContainsFunc(r.args, func(arg specs.LinuxSeccompArg) bool { return !holds(arg, data.arg(arg.Index)) }) {
			continue
		}
		if r.permits {
			return true
		}
		denied = true
	}
	return p.permits && !denied
}

func (d *seccompData) arg(n uint) uint64 {
	if n > 5 {
		return 0
	}
	return uint64(d[wordArgs+2*n]) | uint64(d[wordArgs+2*n+1])<<32
}

func holds(arg specs.LinuxSeccompArg, v uint64) bool {
	switch arg.Op {
	case specs.OpNotEqual:
		return v != arg.Value
	case specs.OpLessThan:
		return v < arg.Value
	case specs.OpLessEqual:
		return v <= arg.Value
	case specs.OpEqualTo:
		return v == arg.Value
	case specs.OpGreaterEqual:
		return v >= arg.Value
	case specs.OpGreaterThan:
		return v > arg.Value
	case specs.OpMaskedEqual:
		return v&arg.Value == arg.ValueTwo
	}
	return false
}

// atomsOf is what a condition of a profile asks of the two halves of an argument.
func atomsOf(arg specs.LinuxSeccompArg) (atoms []atom) {
	if arg.Index > 5 {
		return nil
	}
	for half := range 2 {
		q := atom{word: wordArgs + 2*int(arg.Index) + half, mask: ^uint32(0), k: uint32(arg.Value >> (32 * half))}
		if arg.Op == specs.OpMaskedEqual {
			q.mask, q.k = q.k, uint32(arg.ValueTwo>>(32*half))
			if q.mask == 0 {
				continue
			}
		}
		atoms = append(atoms, q)
	}
	return atoms
}

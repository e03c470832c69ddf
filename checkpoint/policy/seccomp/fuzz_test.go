package seccomp

import "testing"

// A filter of whatever instructions is judged within bounds, and never better than
// what it does to the calls that a profile forbids.
func FuzzFilter(f *testing.F) {
	_, profile := pod(f)
	p, err := NewProfile(profile)
	must(f, err)
	f.Add(bpfProgram{{ldWord, 0, 0, 0}, {jeq, 0, 1, 246}, {ret, 0, 0, allow}, {ret, 0, 0, eperm}}.bytes(), uint32(246), uint32(0))
	f.Fuzz(func(t *testing.T, data []byte, nr, arg uint32) {
		if len(data) > 1<<10 || p.Beyond(data) != "" {
			return
		}
		prog, ok := parseBPF(data)
		if !ok {
			t.Fatal("a malformed filter was found good")
		}
		a := p.abis[0]
		nr %= maxSyscall
		call := seccompData{a.number(nr), a.audit}
		call[wordArgs] = arg
		permitted, ok := prog.run(&call)
		name := a.calls[nr]
		if permitted && ok && name != "" && !p.allows(p.rules[name], &call) {
			t.Fatalf("%s(%d) is permitted", name, arg)
		}
	})
}

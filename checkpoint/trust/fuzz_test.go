package trust

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// Whatever one of a checkpoint's images holds, Check neither panics nor hangs, and
// what it says is one line of a class that callers know.
func FuzzCheck(f *testing.F) {
	good := newForgery(f)
	entries, err := os.ReadDir(good.dir)
	must(f, err)
	var names []string
	for _, e := range entries {
		if name := e.Name(); !strings.HasPrefix(name, "pages-") {
			names = append(names, name)
		}
	}
	names = append(names, "userns-7.img", "netdev-10.img", "nftables-10.img", "remap-fpath.img", "ghost-file-1.img", "tty-info.img", "memfd.img")
	slices.Sort(names)
	for i, name := range names {
		data, err := os.ReadFile(filepath.Join(good.dir, name))
		if err == nil {
			f.Add(uint8(i), data)
		}
	}
	f.Fuzz(func(t *testing.T, target uint8, data []byte) {
		name := names[int(target)%len(names)]
		path := filepath.Join(good.dir, name)
		before, err := os.ReadFile(path)
		good.t = t
		good.raw(name, data)
		defer func() {
			if err == nil {
				must(t, os.WriteFile(path, before, 0o600))
			} else {
				must(t, os.Remove(path))
			}
		}()
		got := good.check()
		if got == nil {
			return
		}
		if !errdefs.IsPermissionDenied(got) && !errdefs.IsInvalidArgument(got) && !errdefs.IsFailedPrecondition(got) {
			t.Fatalf("%v: of no class", got)
		}
		if text := got.Error(); len(text) > 16<<10 || strings.ContainsAny(text, "\n\r\x00\x1b") {
			t.Fatalf("%q", text)
		}
	})
}

// A filter of whatever instructions is judged within bounds, and never better than
// what it does to the calls that a profile forbids.
func FuzzFilter(f *testing.F) {
	p, err := newPolicy(newForgery(f).spec.Linux.Seccomp)
	must(f, err)
	f.Add(bpfProgram{{ldWord, 0, 0, 0}, {jeq, 0, 1, 246}, {ret, 0, 0, allow}, {ret, 0, 0, eperm}}.bytes(), uint32(246), uint32(0))
	f.Fuzz(func(t *testing.T, data []byte, nr, arg uint32) {
		if len(data) > 1<<10 || p.judge(data) != "" {
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

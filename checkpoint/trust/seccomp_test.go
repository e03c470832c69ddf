package trust

import (
	"encoding/binary"
	"testing"

	core "github.com/checkpoint-restore/go-criu/v8/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

func (p bpfProgram) bytes() (out []byte) {
	for _, in := range p {
		out = binary.NativeEndian.AppendUint16(out, in.code)
		out = append(out, in.jt, in.jf)
		out = binary.NativeEndian.AppendUint32(out, in.k)
	}
	return out
}

const (
	ldWord = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
	jeq    = unix.BPF_JMP | unix.BPF_JEQ
	jset   = unix.BPF_JMP | unix.BPF_JSET
	ja     = unix.BPF_JMP | unix.BPF_JA
	and    = unix.BPF_ALU | unix.BPF_AND
	ret    = unix.BPF_RET
	eperm  = unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)
	allow  = unix.SECCOMP_RET_ALLOW
)

// backdoor puts before a filter that it permits a call if words of its are equal
// to numbers.
func backdoor(filter bpfProgram, words map[uint32]uint32) bpfProgram {
	var p bpfProgram
	for _, word := range []uint32{0, 4, 8, 16, 20, 24, 28} {
		if n, asked := words[word]; asked {
			// A conditional jump reaches 255 at most.
			p = append(p, bpfInsn{ldWord, 0, 0, word}, bpfInsn{jeq, 1, 0, n}, bpfInsn{ja, 0, 0, 0})
		}
	}
	p = append(p, bpfInsn{ret, 0, 0, allow})
	for i := range p {
		if p[i].code == ja {
			p[i].k = uint32(len(p) - i - 1)
		}
	}
	return append(p, filter...)
}

func TestSeccomp(t *testing.T) {
	original := func(f *forgery) (p bpfProgram) {
		one(f, "seccomp.img", "SECCOMP", func(e *seccomp.SeccompEntry) { p, _ = parseBPF(e.SeccompFilters[0].Filter) })
		return p
	}
	replace := func(fn func(bpfProgram) bpfProgram) func(*forgery) {
		return func(f *forgery) {
			p := fn(original(f))
			one(f, "seccomp.img", "SECCOMP", func(e *seccomp.SeccompEntry) { e.SeccompFilters[0].Filter = p.bytes() })
		}
	}
	const amd64, i386 = 0xc000003e, 0x40000003
	for _, tc := range []struct {
		name string
		fn   func(*forgery)
		want string // "" if it passes
	}{
		{"none", func(f *forgery) {
			f.core(func(e *core.CoreEntry) { e.ThreadCore.SeccompMode, e.ThreadCore.SeccompFilter = nil, nil })
		}, "has no seccomp filter, and the spec has a profile"},
		{"mode without a filter", func(f *forgery) {
			f.core(func(e *core.CoreEntry) { e.ThreadCore.SeccompFilter = nil })
		}, "has no seccomp filter"},
		{"strict", func(f *forgery) {
			f.core(func(e *core.CoreEntry) { e.ThreadCore.SeccompMode = core.SeccompMode_strict.Enum() })
		}, ""},
		{"all", replace(func(bpfProgram) bpfProgram { return bpfProgram{{ret, 0, 0, allow}} }), "permit more than the spec's profile"},
		{"nothing", replace(func(bpfProgram) bpfProgram { return bpfProgram{{ret, 0, 0, eperm}} }), ""},
		{"logging", replace(func(bpfProgram) bpfProgram { return bpfProgram{{ret, 0, 0, unix.SECCOMP_RET_LOG}} }), "permit more"},
		{"tracing", replace(func(bpfProgram) bpfProgram { return bpfProgram{{ret, 0, 0, unix.SECCOMP_RET_TRACE}} }), "permit more"},
		{"supervised", replace(func(bpfProgram) bpfProgram { return bpfProgram{{ret, 0, 0, unix.SECCOMP_RET_USER_NOTIF}} }), "permit more"},
		{"one call", replace(func(p bpfProgram) bpfProgram {
			return backdoor(p, map[uint32]uint32{4: amd64, 0: unix.SYS_KEXEC_LOAD})
		}), "kexec_load (SCMP_ARCH_X86_64): is not permitted by the profile"},
		{"one call of 32 bits", replace(func(p bpfProgram) bpfProgram {
			return backdoor(p, map[uint32]uint32{4: i386, 0: 283})
		}), "kexec_load (SCMP_ARCH_X86): is not permitted"},
		{"one call of x32", replace(func(p bpfProgram) bpfProgram {
			return backdoor(p, map[uint32]uint32{4: amd64, 0: x32Bit | 528})
		}), "kexec_load (SCMP_ARCH_X32): is not permitted"},
		{"one call with a secret", replace(func(p bpfProgram) bpfProgram {
			return backdoor(p, map[uint32]uint32{4: amd64, 0: unix.SYS_KEXEC_LOAD, 24: 0xdecade})
		}), "kexec_load (SCMP_ARCH_X86_64): is not permitted"},
		{"one call from one place", replace(func(p bpfProgram) bpfProgram {
			return backdoor(p, map[uint32]uint32{4: amd64, 0: unix.SYS_BPF, 8: 0x1000})
		}), "bpf (SCMP_ARCH_X86_64): is not permitted"},
		{"one argument", replace(func(p bpfProgram) bpfProgram {
			return backdoor(p, map[uint32]uint32{4: amd64, 0: unix.SYS_CLONE, 16: unix.CLONE_NEWUSER | 17, 20: 0})
		}), "clone (SCMP_ARCH_X86_64)"},
		{"one argument of a permitted call", replace(func(p bpfProgram) bpfProgram {
			return backdoor(p, map[uint32]uint32{4: amd64, 0: unix.SYS_READ, 16: 7})
		}), ""},
		{"one socket family", replace(func(p bpfProgram) bpfProgram {
			return backdoor(p, map[uint32]uint32{4: amd64, 0: unix.SYS_SOCKET, 16: unix.AF_VSOCK, 20: 0})
		}), "socket (SCMP_ARCH_X86_64): is not permitted by the profile with arguments [0x28"},
		{"one number of no call", replace(func(p bpfProgram) bpfProgram {
			return backdoor(p, map[uint32]uint32{4: amd64, 0: 400})
		}), "number 400 (SCMP_ARCH_X86_64)"},
		{"architecture", func(f *forgery) { f.spec.Linux.Seccomp.Architectures = []specs.Arch{specs.ArchX86_64} }, "system calls of SCMP_ARCH_X86"},
		{"endless", replace(func(p bpfProgram) bpfProgram { return bpfProgram{{ldWord, 0, 0, 0}} }), "too complex"},
		{"beyond its end", replace(func(p bpfProgram) bpfProgram { return bpfProgram{{ja, 0, 0, 1 << 31}} }), "too complex"},
		{"unaligned", replace(func(p bpfProgram) bpfProgram { return bpfProgram{{ldWord, 0, 0, 1}, {ret, 0, 0, eperm}} }), "too complex"},
		{"malformed", func(f *forgery) {
			one(f, "seccomp.img", "SECCOMP", func(e *seccomp.SeccompEntry) { e.SeccompFilters[0].Filter = []byte("abc") })
		}, "a filter is malformed"},
		{"a further one on top", func(f *forgery) {
			one(f, "seccomp.img", "SECCOMP", func(e *seccomp.SeccompEntry) {
				e.SeccompFilters = append(e.SeccompFilters, &seccomp.SeccompFilter{
					Filter: bpfProgram{{ret, 0, 0, allow}}.bytes(), Prev: proto.Uint32(0)})
			})
			f.core(func(e *core.CoreEntry) { e.ThreadCore.SeccompFilter = proto.Uint32(1) })
		}, ""},
		{"a loop", func(f *forgery) {
			one(f, "seccomp.img", "SECCOMP", func(e *seccomp.SeccompEntry) {
				e.SeccompFilters = []*seccomp.SeccompFilter{{Filter: bpfProgram{{ret, 0, 0, allow}}.bytes(), Prev: proto.Uint32(0)}}
			})
		}, "permit more"},
		{"a listener", func(f *forgery) {
			one(f, "seccomp.img", "SECCOMP", func(e *seccomp.SeccompEntry) {
				e.SeccompFilters[0].Flags = proto.Uint32(unix.SECCOMP_FILTER_FLAG_NEW_LISTENER)
			})
		}, "a filter with flags 0x8"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newForgery(t)
			tc.fn(f)
			f.judged(tc.want)
		})
	}
}

// The profile decides, not what happens to be in the checkpoint.
func TestProfiles(t *testing.T) {
	profile := func(action specs.LinuxSeccompAction, calls ...specs.LinuxSyscall) *specs.LinuxSeccomp {
		return &specs.LinuxSeccomp{DefaultAction: action, Syscalls: calls, Architectures: []specs.Arch{specs.ArchX86, specs.ArchX32}}
	}
	filter := bpfProgram{ // socket(AF_VSOCK) is refused, kexec_load with bit 2 of its flags
		{ldWord, 0, 0, 0}, {jeq, 3, 0, unix.SYS_SOCKET}, {jeq, 4, 0, unix.SYS_KEXEC_LOAD}, {jeq, 0, 7, unix.SYS_BPF}, {ret, 0, 0, eperm},
		{ldWord, 0, 0, 16}, {jeq, 3, 4, unix.AF_VSOCK},
		{ldWord, 0, 0, 40}, {and, 0, 0, 6}, {jset, 0, 1, 2}, {ret, 0, 0, eperm}, {ret, 0, 0, allow},
	}
	masked := specs.LinuxSeccompArg{Index: 3, Value: 2, ValueTwo: 2, Op: specs.OpMaskedEqual}
	for _, tc := range []struct {
		name    string
		profile *specs.LinuxSeccomp
		good    bool
	}{
		{"all", profile(specs.ActAllow), true},
		{"but bpf", profile(specs.ActAllow, specs.LinuxSyscall{Names: []string{"bpf"}, Action: specs.ActErrno}), false}, // not of 32 bits
		{"but a family", profile(specs.ActAllow, specs.LinuxSyscall{Names: []string{"socket"}, Action: specs.ActErrno,
			Args: []specs.LinuxSeccompArg{{Index: 0, Value: unix.AF_INET, Op: specs.OpEqualTo}}}), false},
		{"but an unknown call", profile(specs.ActAllow, specs.LinuxSyscall{Names: []string{"nosuchcall"}, Action: specs.ActErrno,
			Args: []specs.LinuxSeccompArg{masked}}), true},
		{"none", profile(specs.ActErrno), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p, err := newPolicy(tc.profile)
			must(t, err)
			if bad := p.judge(filter.bytes()); (bad == "") != tc.good {
				t.Errorf("judged %q", bad)
			}
		})
	}
	// Of x86_64 alone, the filter does as the profile says.
	p, err := newPolicy(profile(specs.ActAllow,
		specs.LinuxSyscall{Names: []string{"bpf"}, Action: specs.ActErrno},
		specs.LinuxSyscall{Names: []string{"socket"}, Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{{Index: 0, Value: unix.AF_VSOCK, Op: specs.OpEqualTo}}},
		specs.LinuxSyscall{Names: []string{"kexec_load"}, Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{masked}}))
	must(t, err)
	p.abis = p.abis[:1]
	if bad := p.judge(filter.bytes()); bad != "" {
		t.Errorf("judged %q", bad)
	}
}

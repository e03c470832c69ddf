package seccomp

import (
	"encoding/binary"
	"encoding/json"
	"os"
	"runtime"
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/criu/img"
	"github.com/stasis-run/stasis/checkpoint/layout"
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

// pod is the filter and the profile of the container whose checkpoint package policy is
// tested with.
func pod(t testing.TB) (bpfProgram, *specs.LinuxSeccomp) {
	t.Helper()
	if runtime.GOARCH != "amd64" {
		t.Skip("testdata was made on amd64")
	}
	data, err := os.ReadFile("../testdata/pod.config.json")
	must(t, err)
	var spec specs.Spec
	must(t, json.Unmarshal(data, &spec))
	var filters seccomp.SeccompEntry
	must(t, img.EachIn("../testdata/pod", layout.Seccomp, "SECCOMP", func(msg []byte) error { return img.Decode(msg, &filters) }))
	p, ok := parseBPF(filters.SeccompFilters[0].Filter)
	if !ok {
		t.Fatal("the filter is malformed")
	}
	return p, spec.Linux.Seccomp
}

func TestBeyond(t *testing.T) {
	const amd64, i386 = 0xc000003e, 0x40000003
	for _, tc := range []struct {
		name string
		fn   func(bpfProgram) bpfProgram // changes the container's filter
		want string                      // "" if it passes
	}{
		{"its own", func(p bpfProgram) bpfProgram { return p }, ""},
		{"all", func(bpfProgram) bpfProgram { return bpfProgram{{ret, 0, 0, allow}} }, "is not permitted by the profile"},
		{"nothing", func(bpfProgram) bpfProgram { return bpfProgram{{ret, 0, 0, eperm}} }, ""},
		{"logging", func(bpfProgram) bpfProgram { return bpfProgram{{ret, 0, 0, unix.SECCOMP_RET_LOG}} }, "is not permitted by the profile"},
		{"tracing", func(bpfProgram) bpfProgram { return bpfProgram{{ret, 0, 0, unix.SECCOMP_RET_TRACE}} }, "is not permitted by the profile"},
		{"supervised", func(bpfProgram) bpfProgram { return bpfProgram{{ret, 0, 0, unix.SECCOMP_RET_USER_NOTIF}} }, "is not permitted by the profile"},
		{"one call", func(p bpfProgram) bpfProgram {
			return backdoor(p, map[uint32]uint32{4: amd64, 0: unix.SYS_KEXEC_LOAD})
		}, "kexec_load (SCMP_ARCH_X86_64): is not permitted by the profile"},
		{"one call of 32 bits", func(p bpfProgram) bpfProgram {
			return backdoor(p, map[uint32]uint32{4: i386, 0: 283})
		}, "kexec_load (SCMP_ARCH_X86): is not permitted"},
		{"one call of x32", func(p bpfProgram) bpfProgram {
			return backdoor(p, map[uint32]uint32{4: amd64, 0: x32Bit | 528})
		}, "kexec_load (SCMP_ARCH_X32): is not permitted"},
		{"one call with a secret", func(p bpfProgram) bpfProgram {
			return backdoor(p, map[uint32]uint32{4: amd64, 0: unix.SYS_KEXEC_LOAD, 24: 0xdecade})
		}, "kexec_load (SCMP_ARCH_X86_64): is not permitted"},
		{"one call from one place", func(p bpfProgram) bpfProgram {
			return backdoor(p, map[uint32]uint32{4: amd64, 0: unix.SYS_BPF, 8: 0x1000})
		}, "bpf (SCMP_ARCH_X86_64): is not permitted"},
		{"one argument", func(p bpfProgram) bpfProgram {
			return backdoor(p, map[uint32]uint32{4: amd64, 0: unix.SYS_CLONE, 16: unix.CLONE_NEWUSER | 17, 20: 0})
		}, "clone (SCMP_ARCH_X86_64)"},
		{"one argument of a permitted call", func(p bpfProgram) bpfProgram {
			return backdoor(p, map[uint32]uint32{4: amd64, 0: unix.SYS_READ, 16: 7})
		}, ""},
		{"one socket family", func(p bpfProgram) bpfProgram {
			return backdoor(p, map[uint32]uint32{4: amd64, 0: unix.SYS_SOCKET, 16: unix.AF_VSOCK, 20: 0})
		}, "socket (SCMP_ARCH_X86_64): is not permitted by the profile with arguments [0x28"},
		{"one number of no call", func(p bpfProgram) bpfProgram {
			return backdoor(p, map[uint32]uint32{4: amd64, 0: 400})
		}, "number 400 (SCMP_ARCH_X86_64)"},
		{"endless", func(p bpfProgram) bpfProgram { return bpfProgram{{ldWord, 0, 0, 0}} }, "too complex"},
		{"beyond its end", func(p bpfProgram) bpfProgram { return bpfProgram{{ja, 0, 0, 1 << 31}} }, "too complex"},
		{"unaligned", func(p bpfProgram) bpfProgram { return bpfProgram{{ldWord, 0, 0, 1}, {ret, 0, 0, eperm}} }, "too complex"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			filter, profile := pod(t)
			p, err := NewProfile(profile)
			must(t, err)
			got := p.Beyond(tc.fn(filter).bytes())
			if (got == "") != (tc.want == "") || !strings.Contains(got, tc.want) {
				t.Errorf("%q, want %q", got, tc.want)
			}
		})
	}
	filter, profile := pod(t)
	profile.Architectures = []specs.Arch{specs.ArchX86_64}
	p, err := NewProfile(profile)
	must(t, err)
	if got := p.Beyond(filter.bytes()); !strings.Contains(got, "system calls of SCMP_ARCH_X86") {
		t.Errorf("architecture: %q", got)
	}
	if got := p.Beyond([]byte("abc")); got != "a filter is malformed" {
		t.Errorf("malformed: %q", got)
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
			p, err := NewProfile(tc.profile)
			must(t, err)
			if bad := p.Beyond(filter.bytes()); (bad == "") != tc.good {
				t.Errorf("judged %q", bad)
			}
		})
	}
	// Of x86_64 alone, the filter does as the profile says.
	p, err := NewProfile(profile(specs.ActAllow,
		specs.LinuxSyscall{Names: []string{"bpf"}, Action: specs.ActErrno},
		specs.LinuxSyscall{Names: []string{"socket"}, Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{{Index: 0, Value: unix.AF_VSOCK, Op: specs.OpEqualTo}}},
		specs.LinuxSyscall{Names: []string{"kexec_load"}, Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{masked}}))
	must(t, err)
	p.abis = p.abis[:1]
	if bad := p.Beyond(filter.bytes()); bad != "" {
		t.Errorf("judged %q", bad)
	}
}

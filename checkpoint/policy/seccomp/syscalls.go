package seccomp

import (
	_ "embed"
	"strconv"
	"strings"
	"sync"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// syscallTable has the names of system calls and their numbers, of the
// architectures that its first line names. TestSyscallTable writes it.
//
//go:embed syscalls.txt
var syscallTable string

// abi is one of the ways in which a process of this machine can call the kernel.
type abi struct {
	name   specs.Arch
	audit  uint32 // the kernel's number, AUDIT_ARCH_*
	calls  map[uint32]string
	last   uint32 // the highest number of calls
	base   uint32 // what is added to the numbers
	native bool
	narrow bool // arguments have 32 bits
}

// number is that by which a filter sees a system call.
func (a abi) number(nr uint32) uint32 { return nr | a.base }

// call is what a filter knows of a system call with any arguments.
func (a abi) call(nr uint32) map[int]uint32 {
	known := map[int]uint32{wordNumber: a.number(nr), wordArch: a.audit}
	for word := wordArgs + 1; a.narrow && word < dataWords; word += 2 {
		known[word] = 0
	}
	return known
}

// x32Bit marks the system calls of x32.
const x32Bit = 0x40000000

// abisOf returns those of a machine, nil if they are not known. The first is its own.
func abisOf(goarch string) []abi {
	t := syscallNumbers()
	switch goarch {
	case "amd64":
		return []abi{
			newABI(specs.ArchX86_64, 0xc000003e, t["amd64"], true),
			newABI(specs.ArchX86, 0x40000003, t["386"], false),
			x32(t["amd64"]),
		}
	case "arm64":
		return []abi{
			newABI(specs.ArchAARCH64, 0xc00000b7, t["arm64"], true),
			newABI(specs.ArchARM, 0x40000028, t["arm"], false),
		}
	}
	return nil
}

func newABI(name specs.Arch, audit uint32, calls map[uint32]string, native bool) abi {
	a := abi{name: name, audit: audit, calls: calls, native: native, narrow: name == specs.ArchX86 || name == specs.ArchARM}
	for nr := range calls {
		a.last = max(a.last, nr)
	}
	return a
}

// x32Own are the system calls that have numbers of their own in x32, from 512 on.
var x32Own = strings.Fields(`rt_sigaction rt_sigreturn ioctl readv writev recvfrom sendmsg recvmsg execve ptrace
	rt_sigpending rt_sigtimedwait rt_sigqueueinfo sigaltstack timer_create mq_notify kexec_load waitid
	set_robust_list get_robust_list vmsplice move_pages preadv pwritev rt_tgsigqueueinfo recvmmsg sendmmsg
	process_vm_readv process_vm_writev setsockopt getsockopt io_setup io_submit execveat preadv2 pwritev2`)

func x32(native map[uint32]string) abi {
	calls := map[uint32]string{}
	for nr, name := range native {
		calls[nr] = name
	}
	for i, name := range x32Own {
		calls[512+uint32(i)] = name
	}
	a := newABI(specs.ArchX32, 0xc000003e, calls, false)
	a.base = x32Bit
	a.narrow = true // for libseccomp, whose filters do not look at the upper halves
	return a
}

// multiplexed are the system calls of 32-bit x86 that stand for several others:
// libseccomp permits them when it permits one of those.
var multiplexed = map[string][]string{
	"socketcall": strings.Fields(`socket bind connect listen accept getsockname getpeername socketpair send recv sendto
		recvfrom shutdown setsockopt getsockopt sendmsg recvmsg accept4 recvmmsg sendmmsg`),
	"ipc": strings.Fields("semop semget semctl semtimedop msgsnd msgrcv msgget msgctl shmat shmdt shmget shmctl"),
}

func mayMultiplex(a abi, name string) bool {
	return a.name == specs.ArchX86 && multiplexed[name] != nil
}

// syscallNumbers are the names by architecture and number.
var syscallNumbers = sync.OnceValue(func() map[string]map[uint32]string {
	head, rest, _ := strings.Cut(syscallTable, "\n")
	arches := strings.Fields(head)[1:]
	t := map[string]map[uint32]string{}
	for _, arch := range arches {
		t[arch] = map[uint32]string{}
	}
	for line := range strings.Lines(rest) {
		fields := strings.Fields(line)
		for i, arch := range arches {
			if nr, err := strconv.ParseUint(fields[i+1], 10, 32); err == nil {
				t[arch][uint32(nr)] = fields[0]
			}
		}
	}
	return t
})

// knownSyscalls are the names of all architectures of Linux.
var knownSyscalls = sync.OnceValue(func() map[string]bool {
	known := map[string]bool{}
	_, rest, _ := strings.Cut(syscallTable, "\n")
	for line := range strings.Lines(rest) {
		known[strings.Fields(line)[0]] = true
	}
	return known
})

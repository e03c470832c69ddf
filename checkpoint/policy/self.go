package policy

import (
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// What a container gets from the shim where its spec says nothing.

// ownLoginUID is that of this process.
var ownLoginUID = sync.OnceValue(func() uint32 {
	id, err := readNumber("/proc/self/loginuid")
	if err != nil {
		return unsetLoginUID
	}
	return uint32(id)
})

// lowestOOMScore is the lowest score that needs no capability. From 0 on, scores
// depend on the node, and the shim sets the spec's after a restore.
func (c *checker) lowestOOMScore() int32 {
	if p := c.spec.Process; p != nil && p.OOMScoreAdj != nil {
		return min(int32(*p.OOMScoreAdj), 0)
	}
	data, _ := os.ReadFile("/proc/self/oom_score_adj")
	own, _ := strconv.Atoi(strings.TrimSpace(string(data)))
	return min(int32(own), 0)
}

// minAddress is the lowest address that can be mapped without CAP_SYS_RAWIO.
var minAddress = sync.OnceValue(func() uint64 {
	n, err := readNumber("/proc/sys/vm/mmap_min_addr")
	if err != nil {
		return 64 << 10 // Linux's default
	}
	return n
})

// swapTotal is the swap of this host in bytes.
func swapTotal() uint64 {
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) != nil {
		return 0
	}
	return info.Totalswap * uint64(info.Unit)
}

// ownNice is the nice value of this process, or 0 if that is lower.
func ownNice() int32 {
	// The system call returns 20 - nice, lest it be taken for an error.
	prio, err := unix.Getpriority(unix.PRIO_PROCESS, 0)
	if err != nil {
		return 0
	}
	return min(int32(20-prio), 0)
}

func readNumber(path string) (uint64, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(data)), 10, 64)
}

// rlimitNames are Linux's resource limits by their numbers.
var rlimitNames = []string{
	"RLIMIT_CPU", "RLIMIT_FSIZE", "RLIMIT_DATA", "RLIMIT_STACK", "RLIMIT_CORE", "RLIMIT_RSS", "RLIMIT_NPROC", "RLIMIT_NOFILE",
	"RLIMIT_MEMLOCK", "RLIMIT_AS", "RLIMIT_LOCKS", "RLIMIT_SIGPENDING", "RLIMIT_MSGQUEUE", "RLIMIT_NICE", "RLIMIT_RTPRIO", "RLIMIT_RTTIME",
}

// rlimit returns the highest value that a hard limit may have, if there is one:
// the spec's; and of those that the spec does not name, this process's own, for
// the two that let a process take the CPU from the others of the host.
func (c *checker) rlimit(resource int) (most uint64, known bool) {
	if resource >= len(rlimitNames) {
		return 0, false
	}
	if c.spec.Process != nil {
		for _, r := range c.spec.Process.Rlimits {
			if r.Type == rlimitNames[resource] {
				return max(r.Hard, r.Soft), true
			}
		}
	}
	if resource != unix.RLIMIT_NICE && resource != unix.RLIMIT_RTPRIO {
		return 0, false
	}
	var own unix.Rlimit
	if unix.Getrlimit(resource, &own) != nil {
		return 0, true
	}
	return own.Max, true
}

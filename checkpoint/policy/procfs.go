package policy

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// procfs tells what the container's procfs has at a path: the files of its
// processes, which are not there yet, and else the same as this host's.
func procfs(rel string) node {
	parts := strings.Split(rel, "/")
	if isPID(parts[0]) {
		rest := parts[1:]
		if len(rest) >= 2 && rest[0] == "task" {
			rest = rest[2:]
		}
		if len(rest) == 0 {
			return node{mode: unix.S_IFDIR | 0o555}
		}
		switch rest[0] {
		case "cwd", "root", "exe":
			return node{bad: "goes over a link of procfs"}
		case "fd", "map_files", "ns":
			if len(rest) > 1 {
				return node{bad: "goes over a link of procfs"}
			}
		}
		// Each process has the same files, with the same modes.
		rel = path.Join("self", path.Join(rest...))
	} else if slices.Contains([]string{"self", "thread-self", "net", "mounts"}, parts[0]) {
		return node{bad: "goes over a link of procfs"}
	}
	if rel == "" {
		return node{mode: unix.S_IFDIR | 0o555}
	}
	var st unix.Stat_t
	switch err := unix.Lstat("/proc/"+rel, &st); {
	case errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR):
		return node{missing: true}
	case err != nil:
		return node{bad: fmt.Sprintf("cannot be looked up (%v)", err)}
	case st.Mode&unix.S_IFMT == unix.S_IFLNK:
		return node{bad: "goes over a link of procfs"}
	}
	return node{mode: st.Mode}
}

func isPID(s string) bool {
	_, err := strconv.ParseUint(s, 10, 31)
	return err == nil
}

// openersEyes are files that anyone may open, and that show what only the one who
// has opened them may see: addresses of the kernel.
var openersEyes = []string{"kallsyms", "modules", "iomem", "ioports", "kcore", "kmsg", "keys", "timer_list", "sched_debug", "vmallocinfo"}

// ownerOnly are files of a process that anyone may open by their mode, but that the
// kernel opens only for who may trace the process.
var ownerOnly = []string{"maps", "smaps", "smaps_rollup", "numa_maps", "pagemap", "mem", "environ", "auxv", "io", "stack", "syscall",
	"personality", "wchan", "timers", "patch_state", "ksm_stat", "ksm_merging_pages", "seccomp_cache", "arch_status", "timens_offsets"}

// ownWritable are the files that a process may write of its own, where the one who
// writes matters, and not who has opened it.
var ownWritable = []string{"comm", "oom_score_adj", "oom_adj", "coredump_filter", "mem", "clear_refs", "timerslack_ns", "autogroup"}

// mayOpenKernels returns why CRIU, as root, must not open a file of the kernel's own
// file systems in place of the processes that hold it; or "". access are bits as of
// a file's mode for others, and own has the numbers of the checkpoint's processes.
func (c *checker) mayOpenKernels(p place, access uint32, own map[uint32]bool) string {
	if access == 0 {
		return ""
	}
	parts := strings.Split(p.within, "/")
	switch {
	case p.missing:
		return "is not on this host, and cannot be checked"
	case p.fs == unix.CGROUP_SUPER_MAGIC && p.within == "":
		if access&2 != 0 && !c.grant.any("CAP_SYS_ADMIN") {
			return "is a control group's, which needs CAP_SYS_ADMIN to be written"
		}
		return ""
	case p.fs == unix.PROC_SUPER_MAGIC && isPID(parts[0]):
		return mayOpenProcess(parts, p.mode, access, own)
	case p.fs == unix.PROC_SUPER_MAGIC && p.within == "" && p.mode&unix.S_IFMT != unix.S_IFDIR:
		// The host's, in a volume: a process or not, its name tells.
		name := path.Base(p.at)
		if slices.Contains(ownerOnly, name) || slices.Contains(openersEyes, name) {
			return "shows more to root than to others"
		}
	case p.fs == unix.PROC_SUPER_MAGIC && slices.Contains(openersEyes, parts[0]):
		return "shows more to root than to others"
	case p.fs == unix.SYSFS_MAGIC && (path.Base(p.at) == "config" || strings.HasPrefix(p.within, "kernel/debug") || strings.HasPrefix(p.within, "kernel/security")):
		return "shows more to root than to others"
	}
	if p.mode&access != access {
		return fmt.Sprintf("needs privileges to be opened (mode %04o)", p.mode&0o7777)
	}
	return ""
}

// mayOpenProcess is for the files of a process. Of those that are the checkpoint's,
// memory is what its images say; so nothing is shown that its author does not know.
func mayOpenProcess(parts []string, mode, access uint32, own map[uint32]bool) string {
	pid, _ := strconv.ParseUint(parts[0], 10, 31)
	name := ""
	if len(parts) > 1 {
		name = parts[1]
	}
	if name == "task" && len(parts) > 3 {
		name = parts[3]
	}
	switch {
	case access&2 != 0 && !(own[uint32(pid)] && slices.Contains(ownWritable, name)):
		return fmt.Sprintf("needs privileges to be written (mode %04o)", mode&0o7777)
	case !own[uint32(pid)] && (slices.Contains(ownerOnly, name) || mode&access != access):
		return "is of no process of the checkpoint"
	}
	return ""
}

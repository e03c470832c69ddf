package policy

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"unsafe"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/process"
)

// nsFiles are the names of namespaces in /proc, of those that a spec decides.
var nsFiles = map[specs.LinuxNamespaceType]string{
	specs.PIDNamespace: "pid", specs.NetworkNamespace: "net", specs.IPCNamespace: "ipc", specs.UTSNamespace: "uts",
	specs.MountNamespace: "mnt", specs.UserNamespace: "user", specs.CgroupNamespace: "cgroup",
}

// namespaceOf returns the inode of a process's namespace, 0 if the kernel has none of
// that kind.
func namespaceOf(pid, name string) (uint64, error) {
	f, err := fileAt(unix.AT_FDCWD, "/proc/"+pid+"/ns/"+name)
	if os.IsNotExist(err) {
		return 0, nil
	}
	return f.inode, err
}

// hostNamespaces are those of this process.
var hostNamespaces = sync.OnceValue(func() map[uint64]bool {
	own := map[uint64]bool{}
	for _, name := range nsFiles {
		if inode, err := namespaceOf("self", name); err == nil {
			own[inode] = true
		}
	}
	return own
})

// namespaces compares those of each process with the spec's, as checkNamespaces does
// in the images, and notes them as the container's.
func (l *look) namespaces(pids []int) error {
	for kind, name := range nsFiles {
		host, err := namespaceOf("self", name)
		if err != nil {
			return err
		}
		ns, want := l.namespace(kind), host
		if ns != nil && ns.Path != "" {
			f, err := fileAt(unix.AT_FDCWD, ns.Path)
			if err != nil {
				return fmt.Errorf("the spec's %s namespace: %w", kind, err)
			}
			want = f.inode
		}
		first := uint64(0)
		for _, pid := range pids {
			if err := context.Cause(l.ctx); err != nil {
				return err
			}
			have, err := namespaceOf(strconv.Itoa(pid), name)
			if err != nil {
				return err
			}
			if first == 0 {
				first = have
			}
			l.owned[have] = true
			switch own := ns != nil && ns.Path == ""; {
			case own && have == host:
				l.refuse("%s: is in the host's %s namespace, the spec has another", nameOf(pid), kind)
			case !own && have != want:
				l.refuse("%s: is in another %s namespace than the spec's", nameOf(pid), kind)
			case own && have != first && (kind != specs.MountNamespace || !l.grant.any("CAP_SYS_ADMIN")):
				l.refuse("%s: is in another %s namespace than %s", nameOf(pid), kind, nameOf(pids[0]))
			}
		}
	}
	for _, pid := range pids {
		if inode, err := namespaceOf(strconv.Itoa(pid), "time"); err == nil {
			l.owned[inode] = true // CRIU makes one, whatever the spec says
		}
	}
	return nil
}

// mountsOf returns the mounts of a process's namespace, nil if that is the host's and
// the spec says so.
func (l *look) mountsOf(pid int) (map[uint64]bool, error) {
	if l.namespace(specs.MountNamespace) == nil || l.sharesHosts(specs.MountNamespace) {
		return nil, nil
	}
	path := fmt.Sprintf("/proc/%d/ns/mnt", pid)
	f, err := fileAt(unix.AT_FDCWD, path)
	if err != nil {
		return nil, err
	}
	if l.spaces[f.inode] == nil {
		if l.spaces[f.inode], err = mountsIn(l.ctx, path); err != nil {
			return nil, fmt.Errorf("list the mounts of its namespace: %w", err)
		}
	}
	return l.spaces[f.inode], nil
}

// mountsIn returns the IDs of a mount namespace's mounts. A process's own mountinfo
// has only those that it can reach from its root, which need not be the namespace's,
// and the checkpoint decides which it is.
func mountsIn(ctx context.Context, path string) (ids map[uint64]bool, err error) {
	proc, err := os.OpenFile("/proc", unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	defer proc.Close()
	err = process.InNamespace(path, unix.CLONE_NEWNS, func() error {
		fd, err := unix.Openat(int(proc.Fd()), "thread-self/mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return os.NewSyscallError("open mountinfo", err)
		}
		f := os.NewFile(uintptr(fd), "mountinfo")
		defer f.Close()
		ids, err = readMountIDs(ctx, f)
		return err
	})
	return ids, err
}

// readMountIDs reads the first field of each line of a mountinfo (proc(5)).
func readMountIDs(ctx context.Context, f *os.File) (map[uint64]bool, error) {
	ids := map[uint64]bool{}
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		if err := context.Cause(ctx); err != nil {
			return nil, err
		}
		field, _, _ := strings.Cut(lines.Text(), " ")
		id, err := strconv.ParseUint(field, 10, 64)
		if err != nil {
			return nil, fmt.Errorf("mountinfo: %w", err)
		}
		ids[id] = true
	}
	return ids, lines.Err()
}

// internalMounts are mounts of the kernel's own that are in no namespace: what is in
// them has no path by which the host's could be opened.
type internalMounts struct {
	namespaces uint64          // of namespaces
	sockets    uint64          // of sockets; it is among others too
	async      func() uint64   // of the rings of asynchronous I/O; 0 for none
	others     map[uint64]bool // of pipes, sockets, memory, event descriptors, …
}

// kernelMounts finds them by making a file in each. The types of file systems would
// not do: the host's own tmpfs is of the same as the one that shared memory is in.
func kernelMounts() (internalMounts, error) {
	m := internalMounts{others: map[uint64]bool{}}
	var made []int
	defer func() {
		for _, fd := range made {
			unix.Close(fd)
		}
	}()
	add := func(fd int, err error) {
		if err == nil { // else the kernel has none, and no process has one
			made = append(made, fd)
		}
	}
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		return m, err
	}
	made = append(made, pipe[:]...)
	socket, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return m, err
	}
	made = append(made, socket)
	add(unix.Eventfd(0, unix.EFD_CLOEXEC))            // like epoll, inotify, timers, …
	add(unix.MemfdCreate("stasis", unix.MFD_CLOEXEC)) // like anonymous shared memory, System V's
	add(unix.PidfdOpen(os.Getpid(), 0))
	for _, size := range hugePages() {
		add(unix.MemfdCreate("stasis", unix.MFD_CLOEXEC|unix.MFD_HUGETLB|size<<unix.MFD_HUGE_SHIFT))
	}
	for _, fd := range made {
		id, err := mountOf(fd)
		if err != nil {
			return m, err
		}
		m.others[id] = true
	}
	if m.sockets, err = mountOf(socket); err != nil {
		return m, err
	}
	f, err := fileAt(unix.AT_FDCWD, "/proc/self/ns/mnt")
	if err != nil {
		return m, err
	}
	m.namespaces = f.mount
	// To end asynchronous I/O takes the kernel some 30 ms, and few have any.
	m.async = sync.OnceValue(asyncMount)
	return m, nil
}

// asyncMount is that of the rings of asynchronous I/O (io_setup(2)), which are only
// ever mapped.
func asyncMount() uint64 {
	var ring uintptr // both the context and where it is mapped
	if _, _, errno := unix.Syscall(unix.SYS_IO_SETUP, 1, uintptr(unsafe.Pointer(&ring)), 0); errno != 0 {
		return 0
	}
	defer func() { _, _, _ = unix.Syscall(unix.SYS_IO_DESTROY, ring, 0, 0) }()
	maps, _ := filepath.Glob(fmt.Sprintf("/proc/self/map_files/%x-*", ring))
	if len(maps) != 1 {
		return 0
	}
	f, err := fileAt(unix.AT_FDCWD, maps[0])
	if err != nil {
		return 0
	}
	return f.mount
}

// hugePages are the logarithms of the sizes of huge pages that the kernel has.
func hugePages() (sizes []int) {
	dirs, _ := filepath.Glob("/sys/kernel/mm/hugepages/hugepages-*kB")
	for _, dir := range dirs {
		kb := 0
		if _, err := fmt.Sscanf(filepath.Base(dir), "hugepages-%dkB", &kb); err != nil || kb <= 0 {
			continue
		}
		log := 10
		for ; kb > 1; kb >>= 1 {
			log++
		}
		sizes = append(sizes, log)
	}
	return sizes
}

// mountOf returns the mount of an own descriptor.
func mountOf(fd int) (uint64, error) {
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, unix.STATX_MNT_ID, &st); err != nil {
		return 0, os.NewSyscallError("statx", err)
	}
	if st.Mask&unix.STATX_MNT_ID != 0 {
		return st.Mnt_id, nil
	}
	return mountOfDescriptor(fd)
}

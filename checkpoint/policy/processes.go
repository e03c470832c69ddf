package policy

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/fault"
)

// CheckProcesses looks at what CRIU has made, before any of it has run. pids are
// the restored processes, of which the first is init; all of them stand still.
//
// Check has seen names, and CRIU has opened them: while it held descriptors of the
// host's, through links that may have changed. So what matters is what a process
// has in the end. Each descriptor, mapping, working folder, root and executable is
// of a mount of the container's own mount namespace, or of one of the kernel's
// that has no path (pipes, sockets, shared memory).
//
// The error names the process and what it has; it matches
// errdefs.ErrPermissionDenied, or is another if the processes cannot be looked at.
func CheckProcesses(ctx context.Context, spec *specs.Spec, pids []int) error {
	if len(pids) == 0 {
		return errors.New("there is no restored process")
	}
	l := &look{
		checker: &checker{ctx: ctx, spec: spec, grant: grantOf(spec)},
		spaces:  map[uint64]map[uint64]bool{},
		owned:   map[uint64]bool{},
		peeked:  map[uint64]bool{},
	}
	var err error
	if l.kernel, err = kernelMounts(); err != nil {
		return fmt.Errorf("find the kernel's own mounts: %w", err)
	}
	var living []int
	for _, pid := range pids {
		ok, err := alive(pid)
		if err != nil {
			return fmt.Errorf("look at restored process %d: %w", pid, err)
		}
		if ok {
			living = append(living, pid)
		}
	}
	if err := l.namespaces(living); err != nil {
		return err
	}
	for _, pid := range living {
		if err := l.process(pid); err != nil {
			return fmt.Errorf("look at restored process %d: %w", pid, err)
		}
	}
	return l.verdict()
}

// look is one such check.
type look struct {
	*checker
	kernel internalMounts
	spaces map[uint64]map[uint64]bool // the mounts of each mount namespace, by its inode
	owned  map[uint64]bool            // the container's namespaces, by inode
	peeked map[uint64]bool            // sockets whose queues were looked at, by inode

	dirents []byte // of each, which nests but has read all before it calls
}

func (l *look) verdict() error {
	if len(l.found) == 0 {
		return nil
	}
	text := strings.Join(l.found, "; ")
	if l.more > 0 {
		text += fmt.Sprintf("; and %d more", l.more)
	}
	return fault.New(errdefs.ErrPermissionDenied, "the restored processes have what the container's spec does not grant, and were ended before they ran: %s", text)
}

// alive tells whether a process has anything: a zombie has not.
func alive(pid int) (bool, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false, err
	}
	_, rest, ok := strings.Cut(string(data[strings.LastIndexByte(string(data), ')')+1:]), " ")
	return ok && !strings.HasPrefix(rest, "Z"), nil
}

// process is for one of them.
func (l *look) process(pid int) error {
	dir := fmt.Sprintf("/proc/%d", pid)
	mounts, err := l.mountsOf(pid)
	if err != nil {
		return err
	}
	if mounts == nil {
		return nil // the host's, as the spec has it
	}
	name := nameOf(pid)
	see := func(what string, at *os.File, entry string) error {
		_, err := l.see(name+": "+what, at, entry, mounts)
		return err
	}
	if err := l.each(dir+"/map_files", func(d *os.File, entry string) error {
		return see("mapping "+entry, d, entry)
	}); err != nil {
		return err
	}
	if err := links(dir, see, "exe"); err != nil {
		return err
	}
	return l.each(dir+"/task", func(d *os.File, tid string) error {
		// Threads mostly have all of that in common.
		thread, _ := strconv.Atoi(tid)
		if thread == pid || !same(pid, thread, kcmpFiles) {
			if err := l.descriptors(name, pid, thread, mounts); err != nil {
				return err
			}
		}
		if thread == pid || !same(pid, thread, kcmpFS) {
			return links(fmt.Sprintf("%s/task/%s", dir, tid), see, "cwd", "root")
		}
		return nil
	})
}

// descriptors is for those of a thread, and of a process if it is the first.
func (l *look) descriptors(name string, pid, thread int, mounts map[uint64]bool) error {
	dir := fmt.Sprintf("/proc/%d/task/%d", pid, thread)
	return l.each(dir+"/fd", func(d *os.File, entry string) error {
		what := fmt.Sprintf("%s: descriptor %s", name, entry)
		file, err := l.see(what, d, entry, mounts)
		if err != nil || file.mount != l.kernel.sockets {
			return err
		}
		return l.inFlight(what, dir, pid, thread, entry, file, mounts)
	})
}

// links looks at some of a process's links.
func links(dir string, see func(string, *os.File, string) error, names ...string) error {
	d, err := os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer d.Close()
	for _, name := range names {
		if err := see(map[string]string{"exe": "executable", "cwd": "working folder", "root": "root"}[name], d, name); err != nil {
			return err
		}
	}
	return nil
}

// direntBuffer is in bytes. Whenever it is full, the kernel goes through all mappings
// of a process again.
const direntBuffer = 1 << 20

// each calls fn with the entries of a folder of /proc.
func (l *look) each(dir string, fn func(d *os.File, entry string) error) error {
	d, err := os.OpenFile(dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer d.Close()
	if l.dirents == nil {
		l.dirents = make([]byte, direntBuffer)
	}
	var names []string
	for {
		n, err := unix.ReadDirent(int(d.Fd()), l.dirents)
		if err != nil {
			return os.NewSyscallError("getdents", err)
		}
		if n == 0 {
			break
		}
		_, _, names = unix.ParseDirent(l.dirents[:n], -1, names)
	}
	for _, name := range names {
		if err := context.Cause(l.ctx); err != nil {
			return err
		}
		if err := fn(d, name); err != nil {
			return err
		}
	}
	return nil
}

// What kcmp(2) compares.
const (
	kcmpFiles = 2
	kcmpFS    = 3
)

// same tells whether two threads share a resource. If the kernel does not say, they
// do not.
func same(pid, tid, what int) bool {
	r, _, errno := unix.Syscall6(unix.SYS_KCMP, uintptr(pid), uintptr(tid), uintptr(what), 0, 0, 0)
	return errno == 0 && r == 0
}

// nameOf is a process in errors, by the number that it has in the container.
func nameOf(pid int) string {
	inside := strconv.Itoa(pid)
	status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	for line := range strings.Lines(string(status)) {
		if ids, ok := strings.CutPrefix(line, "NSpid:"); ok {
			if fields := strings.Fields(ids); len(fields) > 0 {
				inside = fields[len(fields)-1]
			}
		}
	}
	comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	return fmt.Sprintf("process %s (%s)", inside, strings.Trim(quote(strings.TrimSpace(string(comm))), `"`))
}

// see refuses a file that lies elsewhere than in the mounts. at and entry are a
// magic link to it, which is followed and never opened.
func (l *look) see(what string, at *os.File, entry string, mounts map[uint64]bool) (file, error) {
	f, err := fileAt(int(at.Fd()), entry)
	if err != nil {
		return f, fmt.Errorf("%s: %w", what, err)
	}
	l.judge(what, f, mounts, func() string {
		path, _ := os.Readlink(filepath.Join(at.Name(), entry))
		return path
	})
	return f, nil
}

func (l *look) judge(what string, f file, mounts map[uint64]bool, path func() string) {
	switch {
	case mounts[f.mount]:
	case f.mount == l.kernel.namespaces:
		if !l.owned[f.inode] && !l.mayHold(f.inode) {
			l.refuse("%s is of namespace %s, which is not the container's", what, quote(path()))
		}
	case l.kernel.others[f.mount], f.mount == l.kernel.async():
	default:
		l.refuse("%s leads to %s, outside of the container's mounts", what, quote(path()))
	}
}

// mayHold tells whether a process may hold a namespace that none of the processes is
// in, as one that it has made itself.
func (l *look) mayHold(inode uint64) bool {
	return l.grant.any("CAP_SYS_ADMIN") && !hostNamespaces()[inode]
}

// file is what a magic link leads to.
type file struct{ mount, inode uint64 }

func fileAt(dir int, name string) (file, error) {
	var st unix.Statx_t
	// What the file system knows without asking anyone: it may be a FUSE of the
	// container's.
	if err := unix.Statx(dir, name, unix.AT_STATX_DONT_SYNC, unix.STATX_MNT_ID|unix.STATX_INO, &st); err != nil {
		return file{}, os.NewSyscallError("statx", err)
	}
	if st.Mask&unix.STATX_MNT_ID != 0 {
		return file{st.Mnt_id, st.Ino}, nil
	}
	// Before Linux 5.8.
	fd, err := unix.Openat(dir, name, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return file{}, os.NewSyscallError("open", err)
	}
	defer unix.Close(fd)
	id, err := mountOfDescriptor(fd)
	return file{id, st.Ino}, err
}

// mountOfDescriptor reads what /proc says of an open descriptor.
func mountOfDescriptor(fd int) (uint64, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if value, ok := strings.CutPrefix(line, "mnt_id:"); ok {
			return strconv.ParseUint(strings.TrimSpace(value), 10, 64)
		}
	}
	return 0, errors.New("the kernel does not tell which mount a file is of")
}

package policy

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Descriptors can be on their way through a unix socket (SCM_RIGHTS): CRIU opens
// them and sends them, and then no process has them until one receives.

// maxPeek is in bytes, and more than a message has with the kernel's own settings.
const maxPeek = 256 << 10

// inFlight looks at those in the queue of the socket that is a thread's descriptor.
func (l *look) inFlight(what, dir string, pid, thread int, entry string, socket file, mounts map[uint64]bool) error {
	if l.peeked[socket.inode] {
		return nil // by another descriptor; and a socket can be in flight in itself
	}
	count, err := queued(dir + "/fdinfo/" + entry)
	if err != nil || count == 0 {
		return err
	}
	if pid != thread {
		l.refuse("%s: has descriptors in flight, and is a thread's own", what)
		return nil
	}
	p, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return os.NewSyscallError("pidfd_open", err)
	}
	defer unix.Close(p)
	number, err := strconv.Atoi(entry)
	if err != nil {
		return err
	}
	fd, err := unix.PidfdGetfd(p, number, 0)
	if err != nil {
		return os.NewSyscallError("pidfd_getfd", err)
	}
	defer unix.Close(fd)
	l.peeked[socket.inode] = true
	return l.peek(what, fd, count, mounts)
}

// queued reads how many descriptors wait in a socket (unix_show_fdinfo in Linux). It
// has been there for as long as the system call to look at them, since 5.6.
func queued(fdinfo string) (int, error) {
	data, err := os.ReadFile(fdinfo)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if value, ok := strings.CutPrefix(line, "scm_fds:"); ok {
			return strconv.Atoi(strings.TrimSpace(value))
		}
	}
	return 0, nil // not a unix socket
}

// peek looks at the descriptors in a socket and leaves them there.
func (l *look) peek(what string, fd, count int, mounts map[uint64]bool) error {
	// Each look starts where the one before ended.
	before, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PEEK_OFF)
	if err == nil {
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PEEK_OFF, 0)
	}
	if err != nil {
		return os.NewSyscallError("SO_PEEK_OFF", err)
	}
	defer func() { _ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PEEK_OFF, before) }()
	buf, oob := make([]byte, maxPeek), make([]byte, 8<<10)
	seen, last := 0, false
	for seen < count {
		if err := l.ctx.Err(); err != nil {
			return err
		}
		n, oobn, flags, _, err := unix.Recvmsg(fd, buf, oob, unix.MSG_PEEK|unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
		if err != nil {
			break
		}
		if flags&unix.MSG_TRUNC != 0 {
			// The rest of a packet comes with the same descriptors once more, which
			// would be counted in place of others.
			last = true
		}
		messages, err := unix.ParseSocketControlMessage(oob[:oobn])
		if err != nil {
			return err
		}
		got := 0
		for i := range messages {
			fds, err := unix.ParseUnixRights(&messages[i])
			if err != nil {
				continue // another kind
			}
			got += len(fds)
			for _, held := range fds {
				lerr := l.held(what, held, mounts)
				unix.Close(held)
				if lerr != nil {
					err = lerr
				}
			}
			if err != nil {
				return err
			}
		}
		if seen += got; last || n == 0 && got == 0 {
			break
		}
	}
	if seen != count {
		l.refuse("%s: has %d descriptors in flight, of which %d can be looked at", what, count, seen)
	}
	return nil
}

// held looks at one that is this process's for the moment.
func (l *look) held(what string, fd int, mounts map[uint64]bool) error {
	self := fmt.Sprintf("/proc/self/fd/%d", fd)
	f, err := fileAt(unix.AT_FDCWD, self)
	if err != nil {
		return err
	}
	what += ": a descriptor in flight"
	l.judge(what, f, mounts, func() string {
		path, _ := os.Readlink(self)
		return path
	})
	if f.mount != l.kernel.sockets || l.peeked[f.inode] {
		return nil
	}
	count, err := queued(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
	if err != nil || count == 0 {
		return err
	}
	l.peeked[f.inode] = true
	return l.peek(what, fd, count, mounts)
}

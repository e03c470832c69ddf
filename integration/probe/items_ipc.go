package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// agentStream is what the agent reads at its descriptor 5.
func agentStream(seed string, fd int, a *agent) *stream {
	return &stream{
		seed: seed,
		send: func(b []byte) error { _, err := unix.Write(fd, b); return err },
		recv: func(n int) ([]byte, error) { s, err := a.ask("read 5 %d", n); return []byte(s), err },
	}
}

// fdStream is what is written at one descriptor and read at another.
func fdStream(seed string, w, r int) *stream {
	return &stream{
		seed: seed,
		send: func(b []byte) error { _, err := unix.Write(w, b); return err },
		recv: func(n int) ([]byte, error) {
			buf := make([]byte, n)
			n, err := fdReader(r).Read(buf)
			return buf[:n], err
		},
	}
}

// pipe goes to another process.
func pipe(*probe) (func() error, error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return nil, err
	}
	a, err := startAgent(nil, uintptr(fds[0]))
	if err != nil {
		return nil, err
	}
	unix.Close(fds[0])
	size, err := unix.FcntlInt(uintptr(fds[1]), unix.F_SETPIPE_SZ, 128<<10)
	if err != nil {
		return nil, err
	}
	s := agentStream("pipe", fds[1], a)
	return func() error {
		now, err := unix.FcntlInt(uintptr(fds[1]), unix.F_GETPIPE_SZ, 0)
		return errors.Join(err, equal("size", now, size), s.check())
	}, s.fill()
}

// fifo is a pipe with a name.
func fifo(p *probe) (func() error, error) {
	path := p.dir + "/fifo"
	os.Remove(path)
	if err := unix.Mkfifo(path, 0o600); err != nil {
		return nil, err
	}
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	s := fdStream("fifo", fd, fd)
	return s.check, s.fill()
}

// socketpair goes to another process, and back.
func socketpair(*probe) (func() error, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	a, err := startAgent(nil, uintptr(fds[1]))
	if err != nil {
		return nil, err
	}
	unix.Close(fds[1])
	to := agentStream("socketpair to", fds[0], a)
	from := fdStream("socketpair from", -1, fds[0])
	from.send = func(b []byte) error { return a.expect("ok", "write 5 %s", b) }
	return func() error { return errors.Join(to.check(), from.check()) }, errors.Join(to.fill(), from.fill())
}

// scm is a descriptor in flight: sent over a socket, and not received.
func scm(*probe) (func() error, error) {
	sock, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return nil, err
	}
	w := fds[1]
	send := func(fd int) error {
		defer unix.Close(fd)
		return unix.Sendmsg(sock[0], []byte("x"), unix.UnixRights(fd), nil, 0)
	}
	s := fdStream("scm", w, -1)
	return func() error {
		control := make([]byte, unix.CmsgSpace(4))
		_, n, _, _, err := unix.Recvmsg(sock[1], make([]byte, 1), control, unix.MSG_CMSG_CLOEXEC)
		if err != nil {
			return err
		}
		msgs, err := unix.ParseSocketControlMessage(control[:n])
		if err != nil || len(msgs) != 1 {
			return fmt.Errorf("%d control messages: %w", len(msgs), err)
		}
		got, err := unix.ParseUnixRights(&msgs[0])
		if err != nil {
			return err
		}
		s.recv = fdStream("", -1, got[0]).recv
		return errors.Join(s.check(), send(got[0]))
	}, errors.Join(s.fill(), send(fds[0]))
}

// memfd is a file without a name, mapped by two processes.
func memfd(*probe) (func() error, error) {
	const size = 4096
	fd, err := unix.MemfdCreate("probe", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	if err := unix.Ftruncate(fd, size); err != nil {
		return nil, err
	}
	mem, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	a, err := startAgent(nil, uintptr(fd))
	if err != nil {
		return nil, err
	}
	copy(mem, text("memfd", size))
	return func() error {
		got := bytes.Clone(mem)
		if err := a.expect("ok", "upper 5 %d", size); err != nil {
			return err
		}
		err := errors.Join(same("memory", got, text("memfd", size)), same("shared memory", mem, bytes.ToUpper(got)))
		copy(mem, text("memfd", size))
		return err
	}, nil
}

// sysv is System V's shared memory, semaphores and message queues.
func sysv(*probe) (func() error, error) {
	const size, semaphore, setval, getval = 4096, 42, 16, 12
	shm, err := unix.SysvShmGet(unix.IPC_PRIVATE, size, unix.IPC_CREAT|0o600)
	if err != nil {
		return nil, err
	}
	mem, err := unix.SysvShmAttach(shm, 0, 0)
	if err != nil {
		return nil, err
	}
	copy(mem, text("shm", size))

	sem, err := ipc(unix.SYS_SEMGET, unix.IPC_PRIVATE, 1, unix.IPC_CREAT|0o600)
	if err != nil {
		return nil, err
	}
	if _, err := ipc(unix.SYS_SEMCTL, sem, 0, setval, semaphore); err != nil {
		return nil, err
	}

	queue, err := ipc(unix.SYS_MSGGET, unix.IPC_PRIVATE, unix.IPC_CREAT|0o600)
	if err != nil {
		return nil, err
	}
	// struct msgbuf: a long, the type, and the text.
	type message struct {
		kind int64
		text [inFlight]byte
	}
	s := &stream{
		seed: "msg",
		send: func(b []byte) error {
			m := message{kind: 7}
			copy(m.text[:], b)
			_, err := ipc(unix.SYS_MSGSND, queue, uintptr(unsafe.Pointer(&m)), inFlight, 0)
			return err
		},
		recv: func(int) ([]byte, error) {
			var m message
			n, err := ipc(unix.SYS_MSGRCV, queue, uintptr(unsafe.Pointer(&m)), inFlight, 7, unix.IPC_NOWAIT)
			return m.text[:n], err
		},
	}
	return func() error {
		value, err := ipc(unix.SYS_SEMCTL, sem, 0, getval)
		return errors.Join(err,
			same("shared memory", mem, text("shm", size)),
			equal("semaphore", value, semaphore),
			s.check())
	}, s.fill()
}

func ipc(number uintptr, args ...uintptr) (uintptr, error) {
	var a [6]uintptr
	copy(a[:], args)
	r, _, errno := unix.Syscall6(number, a[0], a[1], a[2], a[3], a[4], a[5])
	if errno != 0 {
		return 0, errno
	}
	return r, nil
}

// pty is a terminal, which another process has as its controlling one.
func pty(*probe) (func() error, error) {
	master, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	n, err := unix.IoctlGetInt(master, unix.TIOCGPTN)
	if err != nil {
		return nil, err
	}
	if err := unix.IoctlSetPointerInt(master, unix.TIOCSPTLCK, 0); err != nil {
		return nil, err
	}
	slave, err := unix.Open(fmt.Sprintf("/dev/pts/%d", n), unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	// Raw: nothing is echoed or translated.
	raw := unix.Termios{Cflag: unix.CS8 | unix.CREAD | unix.B38400}
	raw.Cc[unix.VMIN] = 1
	size := unix.Winsize{Row: 33, Col: 77}
	if err := errors.Join(unix.IoctlSetTermios(slave, unix.TCSETS, &raw), unix.IoctlSetWinsize(slave, unix.TIOCSWINSZ, &size)); err != nil {
		return nil, err
	}
	a, err := startAgent(&syscall.SysProcAttr{Setsid: true, Setctty: true, Ctty: 5}, uintptr(slave))
	if err != nil {
		return nil, err
	}
	unix.Close(slave)
	before, err := unix.IoctlGetTermios(master, unix.TCGETS)
	if err != nil {
		return nil, err
	}
	line := text("pty", 80)
	return func() error {
		if _, err := unix.Write(master, line); err != nil {
			return err
		}
		if err := a.expect("ok", "echo 5 %d", len(line)); err != nil {
			return err
		}
		var got []byte
		for len(got) < len(line) {
			buf := make([]byte, len(line))
			n, err := fdReader(master).Read(buf)
			if err != nil {
				return err
			}
			got = append(got, buf[:n]...)
		}
		termios, err := unix.IoctlGetTermios(master, unix.TCGETS)
		if err != nil {
			return err
		}
		winsize, err := unix.IoctlGetWinsize(master, unix.TIOCGWINSZ)
		if err != nil {
			return err
		}
		session, err := unix.IoctlGetInt(master, unix.TIOCGSID)
		return errors.Join(err,
			same("echo", got, line),
			equal("termios", *termios, *before),
			equal("window size", *winsize, size),
			equal("session", session, a.pid))
	}, nil
}

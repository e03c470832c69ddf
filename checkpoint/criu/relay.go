package criu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/process"
)

// The runtime starts CRIU and asks it for a restore over a socket, and CRIU tells
// the runtime there how far it is (criu/include/action-scripts.h). When all is
// restored, and each thread stands at the end of its last system call, held by
// CRIU's ptrace, it says pre-resume and waits for an answer. That is when the
// processes can be looked at: no instruction of the container has run, and no
// signal can make one run, as it could with processes that are merely stopped (a
// timer whose signal is SIGCONT would do). So the shim is between the two: the
// runtime finds it under the name criu in its PATH (Exec), and a relay hands
// the messages on.

const (
	// Name is the program that runtimes call.
	Name = "criu"
	// relayEnv is the socket of the relay, realEnv the real CRIU.
	relayEnv = "STASIS_CRIU_RELAY"
	realEnv  = "STASIS_CRIU"
	// relayDir is the folder in the bundle that holds both names.
	relayDir = "criu"
)

// Exec becomes the real CRIU, and returns only if it cannot. In a restore it
// gives the socket to the runtime, which the second argument names, to the shim,
// and CRIU one to the shim instead. args are those of the process.
func Exec(args []string) error {
	real, socket := os.Getenv(realEnv), os.Getenv(relayEnv)
	if real == "" || socket == "" {
		return errors.New("this is a stand-in for CRIU, and not called by a restore")
	}
	if len(args) == 3 && args[1] == "swrk" {
		fd, err := strconv.Atoi(args[2])
		if err == nil {
			err = swapSocket(socket, fd)
		}
		if err != nil {
			return fmt.Errorf("hand CRIU's socket to the shim: %w", err)
		}
	}
	var env []string
	for _, v := range os.Environ() {
		if path, ok := strings.CutPrefix(v, "PATH="); ok {
			_, path, _ = strings.Cut(path, string(filepath.ListSeparator)) // relayDir is the first
			v = "PATH=" + path
		}
		if !strings.HasPrefix(v, relayEnv+"=") && !strings.HasPrefix(v, realEnv+"=") {
			env = append(env, v)
		}
	}
	return os.NewSyscallError("exec "+real, syscall.Exec(real, args, env))
}

// swapSocket gives fd away and puts what comes back in its place.
func swapSocket(path string, fd int) error {
	s, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	if err := unix.Connect(s, &unix.SockaddrUnix{Name: path}); err != nil {
		return err
	}
	if err := unix.Sendmsg(s, []byte{0}, unix.UnixRights(fd), nil, 0); err != nil {
		return err
	}
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(s, make([]byte, 1), oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return err
	}
	fds, err := rightsIn(oob[:n])
	if err != nil {
		return err
	}
	if len(fds) != 1 {
		return fmt.Errorf("got %d sockets", len(fds))
	}
	defer unix.Close(fds[0])
	return unix.Dup3(fds[0], fd, 0)
}

// A relay is between the runtime and CRIU for one restore. What it finds out it
// keeps; nobody but CRIU waits for it.
type relay struct {
	check    func(ctx context.Context, pids []int) error
	cgroup   string             // linux.cgroupsPath
	ctx      context.Context    // of the restore
	stop     context.CancelFunc // ends the runtime, and CRIU with it
	listener *net.UnixListener
	dir      *os.File
	serving  sync.WaitGroup

	mu        sync.Mutex
	conns     map[*net.UnixConn]bool // nil once the relay is closed
	init      int                    // once all processes are made; CRIU's end could let them run from then on
	criu      int                    // that one's
	cancelled bool
	passed    bool  // the check has passed, and the processes may run
	refused   error // why they may not
}

// newRelay returns a relay, and the environment with which the runtime is to be
// called, with a context that ends by stop only.
func (r *RestoreRequest) newRelay(ctx context.Context, stop context.CancelFunc) (_ *relay, env []string, err error) {
	real, err := exec.LookPath(Name)
	if err != nil {
		return nil, nil, fmt.Errorf("find CRIU: %w", err)
	}
	if real, err = filepath.Abs(real); err != nil {
		return nil, nil, err
	}
	dir := filepath.Join(r.Bundle, relayDir)
	if err := os.RemoveAll(dir); err != nil { // of a try that was cut short
		return nil, nil, err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, nil, err
	}
	l := &relay{check: r.Check, ctx: ctx, stop: stop, conns: map[*net.UnixConn]bool{}}
	if r.Spec.Linux != nil {
		l.cgroup = r.Spec.Linux.CgroupsPath
	}
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	if err := os.Symlink(r.Self, filepath.Join(dir, Name)); err != nil {
		return nil, nil, err
	}
	if l.dir, err = os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY, 0); err != nil {
		return nil, nil, err
	}
	// The name of a socket has room for 107 bytes, which a bundle may exceed.
	socket := fmt.Sprintf("/proc/%d/fd/%d/socket", os.Getpid(), l.dir.Fd())
	if l.listener, err = net.ListenUnix("unixpacket", &net.UnixAddr{Name: socket, Net: "unixpacket"}); err != nil {
		return nil, nil, err
	}
	l.serving.Go(l.accept)
	return l, []string{
		realEnv + "=" + real, relayEnv + "=" + socket,
		"PATH=" + dir + string(filepath.ListSeparator) + os.Getenv("PATH"),
	}, nil
}

// close ends the relay, whose runtime has ended.
func (l *relay) close() {
	if l.listener != nil {
		l.listener.Close()
	}
	l.mu.Lock()
	for c := range l.conns {
		c.Close()
	}
	l.conns = nil
	l.mu.Unlock()
	l.serving.Wait()
	if l.dir != nil {
		l.dir.Close()
		_ = os.RemoveAll(l.dir.Name())
	}
}

// own makes sure that a connection is closed with the relay.
func (l *relay) own(c *net.UnixConn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conns == nil {
		c.Close()
		return false
	}
	l.conns[c] = true
	return true
}

func (l *relay) accept() {
	for {
		c, err := l.listener.AcceptUnix()
		if err != nil {
			return
		}
		l.serving.Go(func() { l.serve(c) })
	}
}

// serve is for one CRIU: a runtime also asks one for its version.
func (l *relay) serve(c *net.UnixConn) {
	if !l.own(c) {
		return
	}
	runtime, criu, pid, err := l.swap(c)
	if err != nil {
		return // CRIU, and so the restore, fails for want of a socket
	}
	if !l.own(runtime) || !l.own(criu) {
		criu.Close()
		return
	}
	// CRIU's children may have its socket, too, which then does not end with it.
	if alive := onDeath(pid, func() {
		l.ended(pid)
		_ = criu.CloseRead() // what it has said before is read all the same
	}); alive != nil {
		defer alive.Close()
	}
	down := make(chan struct{})
	go func() {
		defer close(down)
		var folders folders
		defer folders.close()
		_ = forward(criu, runtime, func(message []byte) ([]byte, error) { return folders.translate(message, runtime) })
		// The runtime is gone. CRIU takes that for an answer, and would let the
		// processes run.
		l.ended(pid)
		_ = criu.CloseWrite()
	}()
	_ = forward(runtime, criu, func(message []byte) ([]byte, error) { return message, l.heard(message, pid) })
	l.ended(pid)
	// What CRIU has not asked yet, it shall ask for in vain.
	runtime.Close()
	criu.Close()
	<-down
}

// swap is the other end of swapSocket. pid is CRIU's.
func (l *relay) swap(c *net.UnixConn) (runtime, criu *net.UnixConn, pid int, err error) {
	if pid, err = peerOf(c); err != nil {
		return nil, nil, 0, err
	}
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := c.ReadMsgUnix(make([]byte, 1), oob)
	if err != nil {
		return nil, nil, 0, err
	}
	fds, err := rightsIn(oob[:n])
	if err == nil && len(fds) != 1 {
		err = fmt.Errorf("%d sockets", len(fds))
	}
	if err != nil {
		for _, fd := range fds {
			unix.Close(fd)
		}
		return nil, nil, 0, err
	}
	if runtime, err = unixConn(fds[0]); err != nil {
		return nil, nil, 0, err
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		runtime.Close()
		return nil, nil, 0, err
	}
	if criu, err = unixConn(pair[0]); err == nil {
		_, _, err = c.WriteMsgUnix([]byte{0}, unix.UnixRights(pair[1]), nil)
	}
	unix.Close(pair[1])
	c.Close()
	if err != nil {
		runtime.Close()
		if criu != nil {
			criu.Close()
		}
	}
	return runtime, criu, pid, err
}

// peerOf returns the process that has made the other end of a connection.
func peerOf(c *net.UnixConn) (pid int, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	cerr := raw.Control(func(fd uintptr) {
		var peer *unix.Ucred
		if peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid = int(peer.Pid)
		}
	})
	return pid, errors.Join(cerr, err)
}

// onDeath calls fn when a process ends, unless what it returns is closed before. That
// is nil where the kernel does not tell (before 5.3).
func onDeath(pid int, fn func()) *os.File {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil
	}
	_ = unix.SetNonblock(fd, true) // for Go to wait for it
	f := os.NewFile(uintptr(fd), "pidfd")
	raw, err := f.SyscallConn()
	if err != nil {
		return f
	}
	go func() {
		err := raw.Read(func(fd uintptr) bool {
			n, _ := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
			return n > 0
		})
		if err == nil {
			fn()
		}
	}()
	return f
}

// unixConn takes a descriptor over.
func unixConn(fd int) (*net.UnixConn, error) {
	f := os.NewFile(uintptr(fd), "")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, errors.New("not a unix socket")
	}
	return u, nil
}

// heard is called with each message of CRIU's.
func (l *relay) heard(message []byte, criu int) error {
	script, pid, err := notification(message)
	if err != nil {
		return err
	}
	switch script {
	case "post-restore":
		// The last at which CRIU takes a failure for one.
		return l.made(pid, criu)
	case "pre-resume":
		l.restored(criu)
	}
	return nil
}

// made is called when all processes are there, with the pids of the first and of CRIU,
// which is still at work in them.
func (l *relay) made(init, criu int) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cancelled {
		return context.Cause(l.ctx)
	}
	l.init, l.criu = init, criu
	return nil
}

// restored is called while CRIU holds the processes and waits.
func (l *relay) restored(criu int) {
	l.mu.Lock()
	init := l.init
	l.mu.Unlock()
	pids := process.Tree(init)
	err := context.Cause(l.ctx)
	if err == nil {
		err = process.AllTraced(pids, criu)
	}
	// Should CRIU be killed now, or this shim, nothing runs all the same.
	defer process.FreezeCgroup(init, l.cgroup)()
	if err == nil {
		err = l.check(l.ctx, pids)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err == nil {
		err = context.Cause(l.ctx)
	}
	if err != nil {
		l.refused = err
		kill(pids)
		// It would wait for init, init for its children, and they for their tracer.
		kill([]int{criu})
		return
	}
	l.passed = true
}

// ended is called when a CRIU says nothing more: it may be dead.
func (l *relay) ended(criu int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.criu == criu && !l.passed {
		kill(process.Tree(l.init))
	}
}

// cancel ends the restore. CRIU's end would set processes free that it holds, so
// they have to be killed first.
func (l *relay) cancel() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cancelled = true
	if l.init != 0 && !l.passed {
		kill(process.Tree(l.init))
	}
	l.stop()
}

// verdict is what the restore has come to, of which the runtime has returned init
// and err.
func (l *relay) verdict(init int, err error) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.refused != nil:
		err = &refusal{l.refused}
	case err != nil:
	case l.cancelled:
		err = context.Cause(l.ctx)
	case !l.passed || l.init != init:
		kill(process.Tree(init))
		err = errors.New("CRIU has not told when the processes were restored")
	}
	if err != nil {
		return 0, err
	}
	return init, nil
}

// kill ends processes that have not run, of which none can make another, or CRIU.
func kill(pids []int) {
	for _, pid := range pids {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
}

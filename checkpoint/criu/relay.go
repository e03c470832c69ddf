package criu

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/criu/standin"
)

// The runtime starts CRIU and asks it for a dump or a restore over a socket, and CRIU
// tells the runtime there how far it is (criu/include/action-scripts.h), and waits for
// an answer. Some of these moments are the shim's: see dumpRelay and restoreRelay. So it
// is between the two: the runtime finds a stand-in under the name criu in its PATH
// (package standin), and a relay hands the messages on.

// relayDir is the folder in the bundle that holds the stand-in and the relay's socket.
const relayDir = "criu"

// A relay is between the runtime and CRIU for one call of the runtime.
type relay struct {
	listens  listener
	listener *net.UnixListener
	dir      *os.File
	serving  sync.WaitGroup

	mu     sync.Mutex
	conns  map[*net.UnixConn]bool // nil once the relay is closed
	failed error                  // its own first error, by which the runtime or CRIU has lost the other
}

// fail notes an error of the relay's own, and returns it.
func (l *relay) fail(err error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.failed == nil && l.conns != nil {
		l.failed = err
	}
	return err
}

// explain adds the relay's own error, if there is one, to the runtime's.
func (l *relay) explain(err error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err == nil || l.failed == nil {
		return err
	}
	return fmt.Errorf("%w (between the OCI runtime and CRIU: %w)", err, l.failed)
}

// listener is told what CRIU says.
type listener interface {
	// heard is called with each message of the CRIU with that pid, which waits until
	// heard has returned. With an error the message is not handed on, and CRIU hears
	// nothing any more.
	heard(m criuMessage, criu int) error
	// ended is called when a CRIU says nothing more: it may be dead. It may be called
	// more than once.
	ended(criu int)
}

// newRelay returns a relay, and the environment with which the runtime is to be called.
// bundle is a folder for its files, self a program that imports package standin.
func newRelay(bundle, self string, listens listener) (_ *relay, env []string, err error) {
	real, err := exec.LookPath(standin.Name)
	if err != nil {
		return nil, nil, fmt.Errorf("find CRIU: %w", err)
	}
	if real, err = filepath.Abs(real); err != nil {
		return nil, nil, err
	}
	dir := filepath.Join(bundle, relayDir)
	if err := os.RemoveAll(dir); err != nil { // of a try that was cut short
		return nil, nil, err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, nil, err
	}
	l := &relay{listens: listens, conns: map[*net.UnixConn]bool{}}
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	if err := os.Symlink(self, filepath.Join(dir, standin.Name)); err != nil {
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
		standin.RealEnv + "=" + real, standin.RelayEnv + "=" + socket,
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
			if !errors.Is(err, net.ErrClosed) {
				_ = l.fail(err)
			}
			l.listener.Close() // else a CRIU that connects now would hang
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
		_ = l.fail(err)
		c.Close() // CRIU, and so the runtime, fails for want of a socket
		return
	}
	if !l.own(runtime) || !l.own(criu) {
		criu.Close()
		return
	}
	// CRIU's children may have its socket, too, which then does not end with it.
	if alive := onDeath(pid, func() {
		l.listens.ended(pid)
		_ = criu.CloseRead() // what it has said before is read all the same
	}); alive != nil {
		defer alive.Close()
	}
	down := make(chan struct{})
	go func() {
		defer close(down)
		var folders folders
		defer folders.close()
		_ = forward(criu, runtime, func(message []byte) ([]byte, error) {
			translated, err := folders.translate(message, runtime)
			if err != nil {
				_ = l.fail(err)
			}
			return translated, err
		})
		// The runtime is gone. CRIU takes that for an answer, and in a restore would
		// let the processes run.
		l.listens.ended(pid)
		_ = criu.CloseWrite()
	}()
	_ = forward(runtime, criu, func(message []byte) ([]byte, error) {
		m, err := parseMessage(message)
		if err != nil {
			return nil, l.fail(err)
		}
		return message, l.listens.heard(m, pid)
	})
	l.listens.ended(pid)
	// What CRIU has not asked yet, it shall ask for in vain.
	runtime.Close()
	criu.Close()
	<-down
}

// swap is the other end of the stand-in's. pid is CRIU's.
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

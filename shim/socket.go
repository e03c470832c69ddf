package shim

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// socketPath is where the shim of a group listens. The scheme is that of
// containerd's own shims: the same group has the same socket whichever shim
// serves it, so that a node's runtime can be replaced while pods run.
func socketPath(dir, address, namespace, group string) (string, error) {
	sum := sha256.Sum256([]byte(filepath.Join(address, namespace, group)))
	path := filepath.Join(dir, fmt.Sprintf("%x", sum))
	return path, checkSocketPath(path)
}

func checkSocketPath(path string) error {
	// One byte ends the string.
	if limit := len(unix.RawSockaddrUnix{}.Path) - 1; len(path) > limit {
		return fmt.Errorf("socket path %q is longer than the %d bytes that a unix socket can have: "+
			"use a shorter socket directory (socket_dir of containerd's shim manager)", path, limit)
	}
	return nil
}

// groupLock excludes others from binding or removing a group's socket. Without
// it two starters that both find a stale socket would remove each other's.
type groupLock struct {
	file *os.File
}

// lockGroup waits for the lock of the socket at path. The lock dies with its
// process, so it is never stale.
func lockGroup(path string) (*groupLock, error) {
	name := path + ".lock"
	for {
		f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return nil, fmt.Errorf("lock shim socket: %w", err)
		}
		for {
			err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
			if err != unix.EINTR {
				break
			}
		}
		if err != nil {
			f.Close()
			return nil, fmt.Errorf("lock shim socket: flock %s: %w", name, err)
		}
		// The file was removed by the lock's last owner if another one, or
		// none, is there now.
		locked, err := f.Stat()
		if err == nil {
			var current os.FileInfo
			if current, err = os.Lstat(name); err == nil && os.SameFile(locked, current) {
				return &groupLock{file: f}, nil
			}
		}
		f.Close()
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("lock shim socket: %w", err)
		}
	}
}

func (l *groupLock) unlock() {
	// While still locked: a waiter then sees that its file is gone.
	os.Remove(l.file.Name())
	l.file.Close()
}

// listenGroup listens at path, or returns nil if a shim already does. The
// caller holds the group's lock.
func listenGroup(path string) (*net.UnixListener, error) {
	l, err := listen(path)
	if !errors.Is(err, unix.EADDRINUSE) {
		return l, err
	}
	live, err := isLive(path)
	if err != nil {
		return nil, err
	}
	if live {
		return nil, nil
	}
	if err := os.Remove(path); err != nil {
		return nil, fmt.Errorf("remove the socket of a shim that died: %w", err)
	}
	return listen(path)
}

// listen makes a socket for this user only. Closing it leaves the path: whoever
// holds the group's lock removes that.
func listen(path string) (*net.UnixListener, error) {
	if err := checkSocketPath(path); err != nil {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("make shim socket: %w", err)
	}
	l.SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		os.Remove(path)
		return nil, fmt.Errorf("make shim socket: %w", err)
	}
	return l, nil
}

// isLive tells whether a process listens at path. Only a refusal means that
// none does: a shim with a full backlog is alive, and to take its socket away
// would leave its containers without a shim.
func isLive(path string) (bool, error) {
	// Without a time-out: the kernel answers at once, but it may take this process long
	// to be given a CPU.
	conn, err := net.Dial("unix", path)
	switch {
	case err == nil:
		conn.Close()
		return true, nil
	case errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.ENOENT):
		return false, nil
	case errors.Is(err, unix.EAGAIN):
		return true, nil
	}
	return false, fmt.Errorf("connect to the shim at %s: %w", path, err)
}

// removeStaleSocket removes the socket of a shim that died, and no other.
func removeStaleSocket(path string) error {
	lock, err := lockGroup(path)
	if err != nil {
		return err
	}
	defer lock.unlock()
	info, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != os.ModeSocket {
		return fmt.Errorf("%s is not a socket", path)
	}
	if live, err := isLive(path); err != nil || live {
		return err
	}
	return os.Remove(path)
}

package shim

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestSocketPath(t *testing.T) {
	// What containerd's own shims make of the same names.
	const want = "/run/containerd/s/d25aa4ef11a84e954e74a5bcff06557d0b6ea8d0c00243896f29826694bbd888"
	got, err := socketPath("/run/containerd/s", "/run/containerd/containerd.sock", "default", "c1")
	if err != nil {
		t.Fatal(err)
	}
	if got != want {
		t.Errorf("%s, want %s", got, want)
	}
	// containerd allows folders of up to 42 bytes.
	if _, err := socketPath("/"+strings.Repeat("a", 41), "", "ns", "c"); err != nil {
		t.Error(err)
	}
	if _, err := socketPath("/"+strings.Repeat("a", 42), "", "ns", "c"); err == nil {
		t.Error("a path that no socket can have is accepted")
	}
}

func tempSocket(t *testing.T) string {
	return filepath.Join(newNode(t).dir, "sock")
}

// leaveSocket leaves a socket that nobody listens on.
func leaveSocket(t *testing.T, path string) {
	t.Helper()
	l, err := listen(path)
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}

func TestListenGroup(t *testing.T) {
	path := tempSocket(t)
	leaveSocket(t, path)
	l, err := listenGroup(path)
	if err != nil || l == nil {
		t.Fatalf("stale socket: %v, %v", l, err)
	}
	defer l.Close()
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("socket %v, %v", info.Mode(), err)
	}
	if l, err := listenGroup(path); err != nil || l != nil {
		t.Errorf("live socket: %v, %v", l, err)
	}
}

// A shim too busy to accept must not lose its socket.
func TestListenGroupBacklogFull(t *testing.T) {
	path := tempSocket(t)
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	for {
		conn, err := net.DialTimeout("unix", path, 50*time.Millisecond)
		if err != nil {
			break
		}
		defer conn.Close()
	}
	if l, err := listenGroup(path); err != nil || l != nil {
		t.Errorf("%v, %v", l, err)
	}
}

func TestListenGroupRace(t *testing.T) {
	path := tempSocket(t)
	for range 20 {
		leaveSocket(t, path)
		var (
			wg sync.WaitGroup
			mu sync.Mutex
			ls []*net.UnixListener
		)
		for range 16 {
			wg.Go(func() {
				lock, err := lockGroup(path)
				if err != nil {
					t.Error(err)
					return
				}
				defer lock.unlock()
				l, err := listenGroup(path)
				if err != nil {
					t.Error(err)
				}
				if l != nil {
					mu.Lock()
					ls = append(ls, l)
					mu.Unlock()
				}
			})
		}
		wg.Wait()
		if len(ls) != 1 {
			t.Fatalf("%d of 16 listen", len(ls))
		}
		if live, err := isLive(path); err != nil || !live {
			t.Fatalf("the one that listens is not found: %v", err)
		}
		ls[0].Close()
		os.Remove(path)
	}
	if _, err := os.Stat(path + ".lock"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("lock is left: %v", err)
	}
}

func TestRemoveStaleSocket(t *testing.T) {
	path := tempSocket(t)
	if err := removeStaleSocket(path); err != nil {
		t.Errorf("no socket: %v", err)
	}
	leaveSocket(t, path)
	if err := removeStaleSocket(path); err != nil {
		t.Errorf("stale socket: %v", err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("stale socket is left: %v", err)
	}
	l, err := listen(path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := removeStaleSocket(path); err != nil {
		t.Errorf("live socket: %v", err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("live socket is gone: %v", err)
	}
	file := path + ".file"
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := removeStaleSocket(file); err == nil {
		t.Error("a file is removed that is no socket")
	}
}

package node

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func must0(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// That containerd is not there is said in a way that helps.
func TestConnectErrors(t *testing.T) {
	refused := filepath.Join(t.TempDir(), "refused.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: refused})
	must0(t, err)
	l.SetUnlinkOnClose(false)
	must0(t, l.Close())
	for address, part := range map[string]string{
		filepath.Join(t.TempDir(), "x"): "start it, or name its socket with --address",
		refused:                         "is it running?",
		"unix://" + refused:             "is it running?",
	} {
		n := Dial(address, Options{})
		if _, err := n.Client(t.Context()); err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("%s: %v", address, err)
		}
	}
}

// newNode returns a node without containerd, and its state folder.
func newNode(t *testing.T) (n *Node, state string) {
	state = filepath.Join(t.TempDir(), "state")
	return Dial(filepath.Join(t.TempDir(), "none.sock"), Options{State: state}), state
}

func TestStateFolder(t *testing.T) {
	n, state := newNode(t)
	w, err := n.newWork()
	must0(t, err)
	if info, err := os.Stat(state); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", info, err)
	}
	must0(t, w.remove())
	must0(t, os.Chmod(state, 0o755))
	if _, err := n.newWork(); err == nil || !strings.Contains(err.Error(), "chmod 700") {
		t.Errorf("a folder that others can read: %v", err)
	}
}

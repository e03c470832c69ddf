package process

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"
)

func TestGroupOf(t *testing.T) {
	for _, tc := range []struct{ path, want string }{
		{"", "/"},
		{"/", "/"},
		{"..", "/"},
		{"/../..", "/"},
		{"/default/c", "/default/c"},
		{"default/c", "/default/c"},
		{"/a/../../b", "/b"},
		{"system.slice:cri:c", "/system.slice/cri-c.scope"},
		{":cri:c", "/system.slice/cri-c.scope"},
		{"kubepods-burstable-pod1.slice:cri-containerd:abc",
			"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-abc.scope"},
		{"a.slice:x:y.slice", "/a.slice/y.slice"},
	} {
		if got := GroupOf(tc.path); got != tc.want {
			t.Errorf("GroupOf(%q) = %q, want %q", tc.path, got, tc.want)
		}
	}
}

func TestAbove(t *testing.T) {
	for _, tc := range []struct{ group, named, want string }{
		{"/a/c", "/a/c", "/a/c"},
		{"/a/c/init.scope", "/a/c", "/a/c"},
		{"/a/c/deep/er", "/a/c", "/a/c"},
		{"/a/cc", "/a/c", "/a/cc"},
		{"/a", "/a/c", "/a"},
		{"/a/c", "/", "/a/c"},
		{"", "/a", ""},
	} {
		if got := above(tc.group, tc.named); got != tc.want {
			t.Errorf("above(%q, %q) = %q, want %q", tc.group, tc.named, got, tc.want)
		}
	}
}

func TestInCgroup(t *testing.T) {
	for path, want := range map[string]bool{"": false, "/": false, "/no/such/group": false} {
		if got := InCgroup(os.Getpid(), path); got != want {
			t.Errorf("InCgroup(self, %q) = %v", path, got)
		}
	}
	if InCgroup(1<<30, "/x") {
		t.Error("a process that does not exist is in a group")
	}
}

// TestFreezeAndKill needs a host whose control groups can be written to.
func TestFreezeAndKill(t *testing.T) {
	group := fmt.Sprintf("/stasis-test-%d", os.Getpid())
	dir := freezerDir(group)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { _ = RemoveCgroup(group) })
	file := filepath.Join(t.TempDir(), "file")
	cmd := exec.Command("sh", "-c", "while :; do echo >> "+file+"; done")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	size := func() int64 {
		st, err := os.Stat(file)
		if err != nil {
			return 0
		}
		return st.Size()
	}
	grows := func() {
		t.Helper()
		for before := size(); size() == before; {
			if t.Context().Err() != nil {
				t.Fatal("it does not run")
			}
		}
	}
	grows()
	FreezeCgroup(pid, group)() // it is elsewhere
	grows()
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
		t.Fatal(err)
	}
	cg, err := LoadCgroup(pid, group)
	if err != nil {
		t.Skip(err)
	}
	for range 2 {
		thaw := FreezeCgroup(pid, group)
		if err := cg.WaitFrozen(t.Context()); err != nil {
			t.Fatal(err)
		}
		thaw()
		grows()
	}
	FreezeCgroup(pid, group) // by a shim that is gone
	KillCgroup(group)
	for st := statOf(pid); st != nil && st.state != 'Z'; st = statOf(pid) {
		if t.Context().Err() != nil {
			t.Fatal("it lives")
		}
		time.Sleep(time.Millisecond)
	}
	if frozen, err := cg.Frozen(); err != nil || frozen {
		t.Errorf("frozen: %v, %v", frozen, err)
	}
	if err := RemoveCgroup(group); err != nil {
		t.Error(err)
	}
	KillCgroup(group) // which is gone
	KillCgroup("")
}

package process

import (
	"os"
	"path/filepath"
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

func TestParseOOMKills(t *testing.T) {
	for _, tc := range []struct {
		in   string
		want uint64
	}{
		{"", 0},
		{"low 1\nhigh 2\nmax 3\noom 4\noom_kill 5\noom_group_kill 6\n", 5},
		{"oom_kill 7", 7},
		{"oom_kill_disable 0\n", 0},
	} {
		if got, err := parseOOMKills([]byte(tc.in)); err != nil || got != tc.want {
			t.Errorf("parseOOMKills(%q) = %d, %v; want %d", tc.in, got, err, tc.want)
		}
	}
	if _, err := parseOOMKills([]byte("oom_kill many\n")); err == nil {
		t.Error("no error for a count that is no number")
	}
}

// watchMemoryEvents needs no cgroup of version 2, only a file that changes.
func TestWatchMemoryEvents(t *testing.T) {
	path := filepath.Join(t.TempDir(), "memory.events")
	write := func(s string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("oom 0\noom_kill 1\n")
	kills := make(chan struct{}, 10)
	stop, err := watchMemoryEvents(path, func() { kills <- struct{}{} })
	if err != nil {
		t.Fatal(err)
	}
	write("oom 1\noom_kill 1\n") // an OOM that killed nobody
	write("oom 1\noom_kill 2\n")
	select {
	case <-kills:
	case <-time.After(10 * time.Second):
		t.Fatal("an OOM kill was not noticed")
	}
	stop()
	stop() // twice is fine
	write("oom 1\noom_kill 3\n")
	memoryModified(1, 0) // of a watch that is gone
	if len(kills) != 0 {
		t.Error("notified after stop, or twice")
	}
	if _, err := watchMemoryEvents(path+".none", func() {}); err == nil {
		t.Error("no error for a file that does not exist")
	}
}

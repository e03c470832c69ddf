package process

import (
	"os"
	"testing"
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

package task

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
)

// newMarks returns two marks that say nothing yet.
func newMarks(t *testing.T) (own, pod mark) {
	t.Helper()
	rootOnly(t)
	own, pod = mark(t.TempDir()), mark(t.TempDir())
	must(t, own.set(fateBegun))
	must(t, own.set(fateNone))
	return own, pod
}

func TestMarksAgain(t *testing.T) {
	own, pod := newMarks(t)
	for _, tc := range []struct {
		own, pod       fate
		fresh, restore string // what follows by either policy
	}{
		{fateNone, fateNone, "restore", "restore"},
		{fateNone, fateDone, "cold", "restore"},
		{fateNone, fateBegun, "refused", "restore"},
		{fateDone, fateDone, "cold", "refused"},
		{fateDone, fateNone, "cold", "refused"},
		{fateBegun, fateNone, "refused", "refused"},
		{fateBegun, fateBegun, "refused", "refused"},
	} {
		must(t, own.set(tc.own))
		must(t, pod.set(tc.pod))
		m := marks{own: own, pod: pod}
		for policy, want := range map[restartPolicy]string{restartFresh: tc.fresh, restartRestore: tc.restore} {
			again, err := m.again(policy)
			got := map[bool]string{true: "restore", false: "cold"}[again]
			if errdefs.IsFailedPrecondition(err) {
				got = "refused"
			} else if err != nil {
				t.Fatal(err)
			}
			if got != want {
				t.Errorf("own %q, pod %q, %s: %s; want %s", tc.own, tc.pod, policy, got, want)
			}
		}
	}
}

func TestMarksLife(t *testing.T) {
	own, pod := newMarks(t)
	m := marks{own: own, pod: pod}
	is := func(what string, wantOwn, wantPod fate) {
		t.Helper()
		o, err := own.get()
		must(t, err)
		p, err := pod.get()
		must(t, err)
		if o != wantOwn || p != wantPod {
			t.Errorf("%s: own %q, pod %q; want %q, %q", what, o, p, wantOwn, wantPod)
		}
	}
	must(t, m.begin())
	is("begun", fateBegun, fateBegun)
	m.failed("c")
	is("failed", fateNone, fateNone)
	must(t, m.begin())
	m.restored("c")
	is("restored", fateDone, fateDone)
	// The next container of the pod, with the policy restore.
	must(t, own.set(fateNone))
	must(t, m.begin())
	m.failed("c")
	is("failed after a restore", fateNone, fateDone)
	// Without a place for a note there is none.
	none := marks{}
	must(t, none.begin())
	if again, err := none.again(restartFresh); !again || err != nil {
		t.Errorf("without marks: %t, %v", again, err)
	}
	if err := (&marks{own: mark(filepath.Join(string(own), "gone"))}).begin(); err == nil {
		t.Error("a restore began without a note")
	}
}

func TestPodMark(t *testing.T) {
	dir := t.TempDir()
	folder := filepath.Join(dir, "pods", "uid-1", "containers", "app")
	must(t, os.MkdirAll(folder, 0o700))
	must(t, os.MkdirAll(filepath.Join(dir, "pods", "uid-2", "containers", "app"), 0o700))
	must(t, os.Symlink(folder, filepath.Join(dir, "pods", "uid-1", "containers", "link")))
	for source, want := range map[string]bool{
		filepath.Join(folder, "0a1b2c3d"):       true,
		folder + "//0a1b2c3d":                   true,
		folder:                                  false,
		filepath.Join(folder, "deeper", "file"): false,
		filepath.Join(dir, "pods/uid-2/containers/app/file"):   false,
		filepath.Join(dir, "pods/uid-1/containers/other/file"): false,
		filepath.Join(dir, "pods/uid-1/volumes/app/file"):      false,
		"/pods/uid-1/containers/app/file":                      false, // no such folder
		"":                                                     false,
	} {
		c := &config{Annotations: map[string]string{criSandboxUID: "uid-1", criContainerName: "app"}}
		c.Mounts = append(c.Mounts, struct {
			Source string `json:"source"`
		}{source})
		if got := c.podMark(); (got != "") != want || want && got != mark(folder) {
			t.Errorf("%q: %q", source, got)
		}
	}
	c := &config{Annotations: map[string]string{criSandboxUID: "uid-1", criContainerName: "link"}}
	c.Mounts = append(c.Mounts, struct {
		Source string `json:"source"`
	}{filepath.Join(dir, "pods/uid-1/containers/link/file")})
	if got := c.podMark(); got != "" {
		t.Errorf("by a link: %q", got)
	}
}

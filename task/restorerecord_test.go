package task

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
)

// newRecord returns two folders in which nothing is recorded yet.
func newRecord(t *testing.T) (own, pod recordFolder) {
	t.Helper()
	rootOnly(t)
	own, pod = recordFolder(t.TempDir()), recordFolder(t.TempDir())
	must(t, own.set(restoreBegun))
	must(t, own.set(restoreNone))
	return own, pod
}

func TestRestoreAgain(t *testing.T) {
	own, pod := newRecord(t)
	for _, tc := range []struct {
		own, pod       restoreState
		fresh, restore string // what follows by either policy
	}{
		{restoreNone, restoreNone, "restore", "restore"},
		{restoreNone, restoreDone, "cold", "restore"},
		{restoreNone, restoreBegun, "refused", "restore"},
		{restoreDone, restoreDone, "cold", "refused"},
		{restoreDone, restoreNone, "cold", "refused"},
		{restoreBegun, restoreNone, "refused", "refused"},
		{restoreBegun, restoreBegun, "refused", "refused"},
	} {
		must(t, own.set(tc.own))
		must(t, pod.set(tc.pod))
		m := restoreRecord{own: own, pod: pod}
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

func TestRestoreRecord(t *testing.T) {
	own, pod := newRecord(t)
	m := restoreRecord{own: own, pod: pod}
	is := func(what string, wantOwn, wantPod restoreState) {
		t.Helper()
		o, err := own.get()
		must(t, err)
		p, err := pod.get()
		must(t, err)
		if o != wantOwn || p != wantPod {
			t.Errorf("%s: own %q, pod %q; want %q, %q", what, o, p, wantOwn, wantPod)
		}
	}
	begin := func() restoreAttempt {
		t.Helper()
		a, err := m.begin()
		must(t, err)
		return a
	}
	attempt := begin()
	is("begun", restoreBegun, restoreBegun)
	attempt.failed("c")
	is("failed", restoreNone, restoreNone)
	begin().restored("c")
	is("restored", restoreDone, restoreDone)
	// The next container of the pod, with the policy restore.
	must(t, own.set(restoreNone))
	begin().failed("c")
	is("failed after a restore", restoreNone, restoreDone)
	// Without a folder nothing is recorded.
	none := restoreRecord{}
	_, err := none.begin()
	must(t, err)
	if again, err := none.again(restartFresh); !again || err != nil {
		t.Errorf("without folders: %t, %v", again, err)
	}
	if _, err := (restoreRecord{own: recordFolder(filepath.Join(string(own), "gone"))}).begin(); err == nil {
		t.Error("a restore began unrecorded")
	}
}

func TestPodRecord(t *testing.T) {
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
		if got := c.podRecord(); (got != "") != want || want && got != recordFolder(folder) {
			t.Errorf("%q: %q", source, got)
		}
	}
	c := &config{Annotations: map[string]string{criSandboxUID: "uid-1", criContainerName: "link"}}
	c.Mounts = append(c.Mounts, struct {
		Source string `json:"source"`
	}{filepath.Join(dir, "pods/uid-1/containers/link/file")})
	if got := c.podRecord(); got != "" {
		t.Errorf("by a link: %q", got)
	}
}

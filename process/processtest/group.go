package processtest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"testing"

	"github.com/containerd/cgroups/v3"

	"github.com/stasis-run/stasis/process"
)

var groups atomic.Uint64

// NewGroup makes a control group, and returns it as linux.cgroupsPath. It skips the
// test where this host does not let it. The group ends with the test.
func NewGroup(t testing.TB) string {
	t.Helper()
	group := fmt.Sprintf("/stasis-test-%d-%d", os.Getpid(), groups.Add(1))
	t.Cleanup(func() { _ = process.RemoveCgroup(group) })
	if err := makeGroup(group); err != nil {
		t.Skip(err)
	}
	return group
}

func makeGroup(group string) error {
	for _, dir := range folders(group) {
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return nil
}

// folders are those of a group: one, or with version 1 one for each controller that
// package process makes use of.
func folders(group string) []string {
	const root = "/sys/fs/cgroup"
	if cgroups.Mode() == cgroups.Unified {
		return []string{filepath.Join(root, group)}
	}
	var dirs []string
	for _, controller := range []string{"freezer", "devices", "memory"} {
		dirs = append(dirs, filepath.Join(root, controller, group))
	}
	return dirs
}

// joinGroup puts a process into a group, and makes that if need be, as a runtime does.
func joinGroup(group string, pid int) error {
	if group == "" {
		return nil
	}
	if err := makeGroup(group); err != nil {
		return err
	}
	for _, dir := range folders(group) {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
			return err
		}
	}
	return nil
}

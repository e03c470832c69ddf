package process

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/cgroups/v3"
	"github.com/containerd/cgroups/v3/cgroup1"
	"github.com/containerd/cgroups/v3/cgroup2"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// Cgroup is a container's control group, of version 1 or 2.
type Cgroup struct {
	v1 cgroup1.Cgroup
	v2 *cgroup2.Manager
	// freezer and memory are the folders of those controllers; with version 2
	// both are the one folder there is.
	freezer, memory string
}

// LoadCgroup returns the control group of the container whose init is the process
// pid, and whose spec names cgroupsPath (linux.cgroupsPath): the one that the
// process is in, or the named one if that is above it, for a container may make
// groups below its own, and a restored init may be in one of them.
func LoadCgroup(pid int, cgroupsPath string) (*Cgroup, error) {
	named := GroupOf(cgroupsPath)
	if cgroups.Mode() == cgroups.Unified {
		group, err := cgroup2.PidGroupPath(pid)
		if err != nil {
			return nil, fmt.Errorf("find the cgroup of process %d: %w", pid, err)
		}
		group = above(group, named)
		m, err := cgroup2.Load(group)
		if err != nil {
			return nil, fmt.Errorf("load cgroup %s: %w", group, err)
		}
		dir := filepath.Join(unifiedMount, group)
		return &Cgroup{v2: m, freezer: dir, memory: dir}, nil
	}
	paths, err := cgroup1.ParseCgroupFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return nil, fmt.Errorf("find the cgroup of process %d: %w", pid, err)
	}
	own := cgroup1.PidPath(pid)
	cg, err := cgroup1.Load(func(controller cgroup1.Name) (string, error) {
		group, err := own(controller)
		return above(group, named), err
	}, cgroup1.WithHierarchy(hierarchy))
	if err != nil {
		return nil, fmt.Errorf("load the cgroup of process %d: %w", pid, err)
	}
	return &Cgroup{
		v1:      cg,
		freezer: filepath.Join(unifiedMount, "freezer", above(paths["freezer"], named)),
		memory:  filepath.Join(unifiedMount, "memory", above(paths["memory"], named)),
	}, nil
}

// hierarchy are the controllers of version 1. To find them takes 100 KB, of which a
// shim has a pod's many containers.
var hierarchy = sync.OnceValues(cgroup1.Default)

// above returns the named group if the other is below it, else the other.
func above(group, named string) string {
	if named != "/" && strings.HasPrefix(group, named+"/") {
		return named
	}
	return group
}

// unifiedMount is where version 2 is mounted, and the controllers of version 1.
const unifiedMount = "/sys/fs/cgroup"

// IsV1 tells the version.
func (c *Cgroup) IsV1() bool { return c.v2 == nil }

// Stats are the group's figures: *cgroup1/stats.Metrics or
// *cgroup2/stats.Metrics, which is what containerd's clients expect.
func (c *Cgroup) Stats() (any, error) {
	if c.v2 != nil {
		return c.v2.Stat()
	}
	return c.v1.Stat(cgroup1.IgnoreNotExist)
}

// Pids are the processes in the group and below it.
func (c *Cgroup) Pids() ([]uint32, error) {
	var pids []uint32
	if c.v2 != nil {
		procs, err := c.v2.Procs(true)
		for _, pid := range procs {
			pids = append(pids, uint32(pid))
		}
		return pids, err
	}
	procs, err := c.v1.Processes(cgroup1.Devices, true)
	for _, p := range procs {
		pids = append(pids, uint32(p.Pid))
	}
	return pids, err
}

// EnableControllers lets the container's own sub-groups use every controller
// (version 2 only), as upstream's shim does.
func (c *Cgroup) EnableControllers() error {
	if c.v2 == nil {
		return nil
	}
	controllers, err := c.v2.RootControllers()
	if err != nil {
		return err
	}
	return c.v2.ToggleControllers(controllers, cgroup2.Enable)
}

// FreezeIn has Freeze, Thaw, and what tells of them, be about the group that the
// runtime uses for that (Runtime.FreezerGroup), "" for the container's own. With
// version 2, a group is frozen as long as one above it is: CRIU, which thaws the
// group that it was given, would wait for ever.
func (c *Cgroup) FreezeIn(group string) {
	if c.v2 != nil && group != "" {
		c.freezer = filepath.Join(unifiedMount, group)
	}
}

// Frozen tells whether the group is frozen, or on its way to be.
func (c *Cgroup) Frozen() (bool, error) {
	name := "freezer.state"
	if c.v2 != nil {
		name = "cgroup.freeze"
	}
	state, err := os.ReadFile(filepath.Join(c.freezer, name))
	if err != nil {
		return false, err
	}
	s := string(bytes.TrimSpace(state))
	return s != "THAWED" && s != "0", nil
}

// Freeze has the kernel stop the group's processes. It does not wait for them.
func (c *Cgroup) Freeze() error { return c.setFrozen("FROZEN", "1") }

// Thaw lets the group's processes run.
func (c *Cgroup) Thaw() error { return c.setFrozen("THAWED", "0") }

func (c *Cgroup) setFrozen(v1, v2 string) error {
	if c.v2 != nil {
		return os.WriteFile(filepath.Join(c.freezer, "cgroup.freeze"), []byte(v2), 0)
	}
	return os.WriteFile(filepath.Join(c.freezer, "freezer.state"), []byte(v1), 0)
}

// Freezing with version 1 is tried again this often, and after so many tries the
// group runs for a moment.
const (
	freezeInterval = time.Millisecond
	freezeTries    = 50
	freezePause    = 10 * time.Millisecond
)

// WaitFrozen waits until all of the group's processes stand still after Freeze. With
// version 1 the group may run for a moment meanwhile: its freezer misses processes
// that are just being made, and one of several threads that executes a program
// waits for ever for the others' end, which are frozen.
func (c *Cgroup) WaitFrozen(ctx context.Context) error {
	name, want := "freezer.state", "FROZEN"
	if c.v2 != nil {
		name, want = "cgroup.events", "frozen 1"
	}
	for try := 1; ; try++ {
		state, err := os.ReadFile(filepath.Join(c.freezer, name))
		if err != nil {
			return err
		}
		if slices.Contains(strings.Split(string(state), "\n"), want) {
			return nil
		}
		if err := pause(ctx, freezeInterval); err != nil {
			return err
		}
		if c.v2 != nil {
			continue
		}
		if try%freezeTries == 0 {
			if err := c.Thaw(); err != nil {
				return err
			}
			if err := pause(ctx, freezePause); err != nil {
				return err
			}
		}
		if err := c.Freeze(); err != nil {
			return err
		}
	}
}

// pause returns after a time, or with the cause of ctx's end.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}

// RemoveCgroup kills what is left in the control group that a container's spec
// names (linux.cgroupsPath) and removes it. It is for containers that the OCI
// runtime does not know: a restore that was cut short. An empty path and a group
// that is gone are no error.
func RemoveCgroup(cgroupsPath string) error {
	group := GroupOf(cgroupsPath)
	if group == "/" {
		return nil
	}
	KillCgroup(cgroupsPath)
	if cgroups.Mode() == cgroups.Unified {
		return removeTree(filepath.Join(unifiedMount, group))
	}
	controllers, err := os.ReadDir(unifiedMount)
	if err != nil {
		return err
	}
	var errs []error
	for _, c := range controllers {
		if c.IsDir() { // links are second names (cpu → cpu,cpuacct)
			errs = append(errs, removeTree(filepath.Join(unifiedMount, c.Name(), group)))
		}
	}
	return errors.Join(errs...)
}

// KillCgroup kills what is in the control group that a container's spec names, and
// below. None of it runs between the death of one and that of the next: CRIU's death
// would set processes free that it holds.
func KillCgroup(cgroupsPath string) {
	dir := freezerDir(cgroupsPath)
	if dir == "" {
		return
	}
	writeFreezer(dir, "FROZEN", "1")
	defer thawTree(dir)
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			killAll(filepath.Join(path, "cgroup.procs"))
		}
		return nil
	})
}

// FreezeCgroup has nothing run in the control group that a container's spec names
// until thaw is called, if the process pid is in it. What is frozen stays so if this
// process ends.
func FreezeCgroup(pid int, cgroupsPath string) (thaw func()) {
	dir := freezerDir(cgroupsPath)
	if dir == "" || !InCgroup(pid, cgroupsPath) {
		return func() {}
	}
	writeFreezer(dir, "FROZEN", "1")
	return func() { thawTree(dir) }
}

// freezerDir is the folder by which a named control group is frozen, "" for none.
func freezerDir(cgroupsPath string) string {
	group := GroupOf(cgroupsPath)
	switch {
	case group == "/":
		return ""
	case cgroups.Mode() == cgroups.Unified:
		return filepath.Join(unifiedMount, group)
	}
	return filepath.Join(unifiedMount, "freezer", group)
}

// InCgroup tells whether the process pid is in the control group that a
// container's spec names, so that a pid out of a file is known to be still the
// container's.
func InCgroup(pid int, cgroupsPath string) bool {
	group := GroupOf(cgroupsPath)
	if group == "/" {
		return false
	}
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(data)) {
		// hierarchy:controllers:path (cgroups(7))
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(fields) == 3 && (fields[2] == group || strings.HasPrefix(fields[2], group+"/")) {
			return true
		}
	}
	return false
}

// GroupOf is the group that linux.cgroupsPath names, "/" for none: a path, or
// slice:prefix:name for systemd.
func GroupOf(cgroupsPath string) string {
	if slice, rest, ok := strings.Cut(cgroupsPath, ":"); ok {
		prefix, name, _ := strings.Cut(rest, ":")
		cgroupsPath = systemdPath(slice, prefix, name)
	}
	return filepath.Clean("/" + cgroupsPath)
}

// systemdPath is where systemd puts a scope: each dash of a slice's name is a
// level of the tree (systemd.slice(5)).
func systemdPath(slice, prefix, name string) string {
	if slice == "" {
		slice = "system.slice"
	}
	path, parent := "", ""
	for part := range strings.SplitSeq(strings.TrimSuffix(slice, ".slice"), "-") {
		if part == "" {
			continue
		}
		parent += part
		path = filepath.Join(path, parent+".slice")
		parent += "-"
	}
	unit := name
	if !strings.HasSuffix(name, ".slice") {
		unit = prefix + "-" + name + ".scope"
	}
	return filepath.Join(path, unit)
}

// removeTree kills the processes in a cgroup folder and below and removes the
// folders, deepest first. The kernel needs a moment to take a killed process
// out of its group, so this may have to be tried again (EBUSY).
func removeTree(dir string) error {
	var dirs []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return nil // a group that vanishes meanwhile is what we want
	})
	if err != nil || len(dirs) == 0 {
		return err
	}
	thawTree(dir)
	return retry(func() error {
		var errs []error
		for i := len(dirs) - 1; i >= 0; i-- {
			killAll(filepath.Join(dirs[i], "cgroup.procs"))
			if err := unix.Rmdir(dirs[i]); err != nil && err != unix.ENOENT {
				errs = append(errs, fmt.Errorf("remove cgroup %s: %w", dirs[i], err))
			}
		}
		return errors.Join(errs...)
	})
}

// thawTree thaws a group so that its processes can die; the files exist in one
// hierarchy each.
func thawTree(dir string) { writeFreezer(dir, "THAWED", "0") }

func writeFreezer(dir, v1, v2 string) {
	for name, value := range map[string]string{"freezer.state": v1, "cgroup.freeze": v2} {
		if f, err := os.OpenFile(filepath.Join(dir, name), os.O_WRONLY, 0); err == nil {
			_, _ = f.WriteString(value)
			f.Close()
		}
	}
}

func killAll(procs string) {
	data, err := os.ReadFile(procs)
	if err != nil {
		return
	}
	for line := range strings.Lines(string(data)) {
		var pid int
		if _, err := fmt.Sscan(line, &pid); err == nil && pid > 1 {
			if err := unix.Kill(pid, unix.SIGKILL); err != nil && err != unix.ESRCH {
				log.L.WithError(err).WithField("pid", pid).Warn("kill what is left of a container")
			}
		}
	}
}

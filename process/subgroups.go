package process

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/cgroups/v3/cgroup2"
	"golang.org/x/sys/unix"
)

// SubGroup is a control group of version 2 that a container has made below its
// own, or the container's own, as far as that serves those below it.
type SubGroup struct {
	// Path is relative to the container's own group; "." is that itself.
	Path string `json:"path"`
	// Init: the container's init is in this group. CRIU puts it there, and crun takes
	// it out again.
	Init bool `json:"init,omitempty"`
	// Controllers are those that the groups below it may use.
	Controllers []string `json:"controllers,omitempty"`
	// Limits are the files that differ from what a new group has.
	Limits map[string]string `json:"limits,omitempty"`
}

// subGroupLimits are the files of a control group that hold limits, and what a new
// group has in them (Documentation/admin-guide/cgroup-v2.rst). Those that name
// devices (io.max) are left out, as they are others on another host.
var subGroupLimits = map[string]string{
	"cgroup.max.depth": "max", "cgroup.max.descendants": "max",
	"cpu.idle": "0", "cpu.max": "max 100000", "cpu.max.burst": "0", "cpu.weight": "100",
	"cpuset.cpus": "", "cpuset.mems": "",
	"memory.high": "max", "memory.low": "0", "memory.max": "max", "memory.min": "0",
	"memory.oom.group": "0", "memory.swap.high": "max", "memory.swap.max": "max", "memory.zswap.max": "max",
	"pids.max": "max",
}

// Bounds on what CheckSubGroups takes.
const (
	maxSubGroups  = 4096
	maxSubPath    = 4096 // bytes
	maxLimitValue = 4096 // bytes
)

// controllerNames are all those that version 2 has had.
const controllerNames = " cpuset cpu io memory hugetlb pids rdma misc dmem "

// SubGroups returns the control groups that the container has made below its own,
// each after the one that it is in: none with version 1.
func (c *Cgroup) SubGroups(init int) ([]SubGroup, error) {
	if c.v2 == nil {
		return nil, nil
	}
	inits, err := cgroup2.PidGroupPath(init)
	if err != nil {
		return nil, fmt.Errorf("find the control group of process %d: %w", init, err)
	}
	inits = filepath.Join(unifiedMount, inits)
	var groups []SubGroup
	err = filepath.WalkDir(c.memory, func(dir string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // it has just been removed
		}
		if err != nil || !d.IsDir() {
			return err
		}
		path, err := filepath.Rel(c.memory, dir)
		if err != nil {
			return err
		}
		g := SubGroup{Path: path, Init: dir == inits, Controllers: strings.Fields(readLimit(dir, "cgroup.subtree_control"))}
		if path != "." {
			for name, standard := range subGroupLimits {
				if value := readLimit(dir, name); value != "" && value != standard {
					if g.Limits == nil {
						g.Limits = map[string]string{}
					}
					g.Limits[name] = value
				}
			}
		}
		groups = append(groups, g)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list the control groups below %s: %w", c.memory, err)
	}
	if len(groups) == 1 {
		return nil, nil // only its own
	}
	return groups, CheckSubGroups(groups)
}

// readLimit returns "" for a file that a group has not.
func readLimit(dir, name string) string {
	data, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(data))
}

// CheckSubGroups refuses what SetSubGroups must not be called with: groups outside
// of the container's own, or files that hold no limits.
func CheckSubGroups(groups []SubGroup) error {
	if len(groups) > maxSubGroups {
		return fmt.Errorf("%d control groups, at most %d are allowed", len(groups), maxSubGroups)
	}
	for i, g := range groups {
		if !filepath.IsLocal(g.Path) || filepath.Clean(g.Path) != g.Path || len(g.Path) > maxSubPath || strings.ContainsRune(g.Path, 0) {
			return fmt.Errorf("[%d].path: %.80q is no path below a control group", i, g.Path)
		}
		for _, name := range g.Controllers {
			if strings.ContainsRune(name, ' ') || !strings.Contains(controllerNames, " "+name+" ") {
				return fmt.Errorf("[%d].controllers: %.40q is none", i, name)
			}
		}
		for name, value := range g.Limits {
			if _, known := subGroupLimits[name]; !known || g.Path == "." {
				return fmt.Errorf("[%d].limits: %.40q of %.80q is none that can be set", i, name, g.Path)
			}
			if len(value) > maxLimitValue {
				return fmt.Errorf("[%d].limits: %s has %d bytes, at most %d are allowed", i, name, len(value), maxLimitValue)
			}
		}
	}
	return nil
}

// SetSubGroups makes the control groups below the container's own as they were when
// SubGroups listed them. What cannot be had here is an error, after all else is done.
func (c *Cgroup) SetSubGroups(init int, groups []SubGroup) error {
	if len(groups) == 0 {
		return nil
	}
	if c.v2 == nil {
		return errors.New("the container had control groups of version 2 below its own, and this host has version 1")
	}
	// What is in a container's groups are folders of the kernel's and no links,
	// and yet nothing shall be written beside them.
	root, err := os.OpenRoot(c.memory)
	if err != nil {
		return err
	}
	defer root.Close()
	var errs []error
	write := func(path, value string) {
		f, err := root.OpenFile(path, os.O_WRONLY, 0)
		if err == nil {
			_, err = f.WriteString(value)
			f.Close()
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("set %s to %q: %w", filepath.Join(c.memory, path), value, err))
		}
	}
	// A group with processes in it cannot enable controllers for those below it.
	for _, g := range groups {
		if g.Init && g.Path != "." {
			write(filepath.Join(g.Path, "cgroup.procs"), fmt.Sprint(init))
		}
	}
	for _, g := range groups {
		if err := root.Mkdir(g.Path, 0o755); g.Path != "." && err != nil && !errors.Is(err, unix.EEXIST) {
			errs = append(errs, fmt.Errorf("make control group %s: %w", filepath.Join(c.memory, g.Path), err))
			continue
		}
		for name, value := range g.Limits {
			write(filepath.Join(g.Path, name), value)
		}
		for _, controller := range g.Controllers {
			write(filepath.Join(g.Path, "cgroup.subtree_control"), "+"+controller)
		}
	}
	return errors.Join(errs...)
}

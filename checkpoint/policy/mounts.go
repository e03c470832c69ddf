package policy

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/mnt"
	"github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/layout"
)

// CheckMounts compares the mounts of a checkpoint with the spec's, and follows the
// paths of its files in them, where rootfs is the container's root filesystem as it
// is going to be. It needs it, because a
// mount of the spec on /var/run is one of the checkpoint on /run where the one is
// a link to the other. Errors are as those of Check.
//
// CRIU mounts what the images say, and nothing else. A mount of the spec that the
// checkpoint lacks is missing in the container, and so is a path that would be
// masked or read-only.
func CheckMounts(ctx context.Context, ckpt *checkpoint.Checkpoint, spec *specs.Spec, rootfs string) error {
	c := newChecker(ctx, ckpt, spec)
	for _, step := range []func() error{
		func() error { return c.checkMounts(rootfs) },
		c.checkTmpfs,
		func() error { return c.checkHandles(rootfs) },
		func() error { return c.checkPaths(rootfs) },
	} {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		if err := step(); err != nil {
			return fmt.Errorf("checkpoint %s: %w", ckpt.Dir(), err)
		}
	}
	return c.verdict()
}

// mountEntry is one mount of the checkpoint.
type mountEntry struct {
	*mnt.MntEntry
	at string // where, in the container
}

func (m mountEntry) virtual() bool { return virtualTypes[m.GetFstype()] != "" }

// virtualTypes are the file systems that CRIU may mount itself: what is in them
// belongs to the container's namespaces, and their options give nothing away.
var virtualTypes = map[uint32]string{
	uint32(mnt.Fstype_PROC): "proc", uint32(mnt.Fstype_SYSFS): "sysfs", uint32(mnt.Fstype_TMPFS): "tmpfs",
	uint32(mnt.Fstype_DEVPTS): "devpts", uint32(mnt.Fstype_MQUEUE): "mqueue",
	uint32(mnt.Fstype_CGROUP): "cgroup", uint32(mnt.Fstype_CGROUP2): "cgroup2",
}

// maxMounts bounds the mounts of a checkpoint.
const maxMounts = 20_000

// maxMountPaths bounds their paths together, in bytes: each folder on the way to a
// mount is kept.
const maxMountPaths = 4 << 20

func (c *checker) readMounts() error {
	if c.mounts != nil {
		return nil
	}
	c.mounts = map[string][]mountEntry{}
	var names []string
	for _, name := range c.ckpt.Names() {
		if layout.Mounts.Begins(name) {
			names = append(names, name)
		}
	}
	if len(names) > 1 && !c.grant.any("CAP_SYS_ADMIN") {
		return fault.New(errdefs.ErrPermissionDenied, "the processes are in %d mount namespaces, which needs CAP_SYS_ADMIN", len(names))
	}
	total, length := 0, 0
	for _, name := range names {
		err := c.each(name, "MNTS", func(msg []byte) error {
			e := &mnt.MntEntry{}
			if err := c.decode(msg, e); err != nil {
				return err
			}
			for _, p := range []string{e.GetMountpoint(), e.GetRoot(), e.GetExtKey()} {
				if climbs(p) {
					c.refuse("%s: path %s climbs with ..", name, quote(p))
				}
			}
			at := path.Clean("/" + strings.TrimPrefix(e.GetMountpoint(), "."))
			if p := strings.TrimPrefix(e.GetMountpoint(), "."); !strings.HasPrefix(p, "/") {
				c.refuse("%s: path %s is not absolute", name, quote(p))
			} else if p != at || len(p) > maxPath {
				// CRIU compares them as they are.
				c.refuse("%s: path %s is not as the kernel tells paths", name, quote(p))
			}
			if e.GetDeleted() && e.ExtKey == nil && !c.grant.any("CAP_SYS_ADMIN") {
				c.refuse("%s: the mount at %s is of a folder that a restore would make", name, quote(at))
			}
			if total++; total > maxMounts {
				return fault.Invalid("more than %d mounts", maxMounts)
			}
			if length += len(e.GetMountpoint()); length > maxMountPaths {
				return fault.Invalid("paths of mounts of more than %d bytes", maxMountPaths)
			}
			c.mounts[name] = append(c.mounts[name], mountEntry{e, at})
			return nil
		})
		if err != nil {
			return err
		}
	}
	if len(c.mounts) == 0 && c.namespace(specs.MountNamespace) != nil {
		return fault.Invalid("mountpoints-*.img: missing")
	}
	return nil
}

// wanted is what the spec has on one path.
type wanted struct {
	specs.Mount
	why      string // "", or what of the spec it is besides a mount
	optional bool   // the path is not there
}

func (c *checker) checkMounts(rootfs string) error {
	if err := c.readMounts(); err != nil {
		return err
	}
	want, err := c.wantedMounts(rootfs)
	if err != nil {
		return err
	}
	c.wanted = want
	ids := map[uint32]bool{}
	for _, name := range slices.Sorted(maps.Keys(c.mounts)) {
		c.compareMounts(newMountTree(c.mounts[name]), want)
		c.checkTree(c.mounts[name], ids)
	}
	return c.checkKinds(rootfs)
}

// wantedMounts returns the mounts of the spec by the paths that they have in the
// root filesystem.
func (c *checker) wantedMounts(rootfs string) (map[string]wanted, error) {
	want := map[string]wanted{}
	for _, m := range c.spec.Mounts {
		at, err := resolve(rootfs, m.Destination)
		if err != nil {
			return nil, fmt.Errorf("mount %s of the spec: %w", m.Destination, err)
		}
		want[at] = wanted{Mount: m}
	}
	if c.spec.Linux == nil {
		return want, nil
	}
	for _, list := range []struct {
		why   string
		paths []string
	}{{"masked", c.spec.Linux.MaskedPaths}, {"read-only", c.spec.Linux.ReadonlyPaths}} {
		for _, p := range list.paths {
			at, err := resolve(rootfs, p)
			if err != nil {
				return nil, fmt.Errorf("%s path %s of the spec: %w", list.why, p, err)
			}
			if _, mounted := want[at]; !mounted {
				want[at] = wanted{specs.Mount{Destination: p}, list.why, !onThisHost(rootfs, at)}
			}
		}
	}
	return want, nil
}

// resolve follows links in a path, within the root filesystem.
func resolve(rootfs, p string) (string, error) {
	full, err := fs.RootPath(rootfs, path.Clean("/"+p))
	if err != nil {
		return "", err
	}
	return path.Clean("/" + strings.TrimPrefix(full, filepath.Clean(rootfs))), nil
}

// onThisHost tells whether a path will be in the container. Runtimes pass over
// paths to be masked that are not there. What is in /proc and /sys is the same
// for all.
func onThisHost(rootfs, at string) bool {
	if isBelow(at, "/proc") || isBelow(at, "/sys") {
		rootfs = "/"
	}
	_, err := os.Lstat(filepath.Join(rootfs, at))
	return err == nil
}

// Mount flags that the spec's options ask for.
var mountFlags = []struct {
	option string
	flag   uint32
}{{"ro", unix.MS_RDONLY}, {"rro", unix.MS_RDONLY}, {"nosuid", unix.MS_NOSUID}, {"nodev", unix.MS_NODEV}, {"noexec", unix.MS_NOEXEC}}

func (c *checker) compareMounts(have *mountTree, want map[string]wanted) {
	seen := map[string]bool{}
	devices := map[uint32]string{} // whose file system, by its number: a type, or the path of an external one
	for _, m := range have.all {
		switch {
		case seen[m.at]:
			c.refuse("mount %s is there twice", quote(m.at))
			continue
		case m.GetWithPlugin():
			c.refuse("mount %s needs a plugin of CRIU's", quote(m.at))
			continue
		}
		seen[m.at] = true
		c.checkMount(m, have, want)
		c.checkFileSystem(m, devices)
	}
	if _, root := have.at["/"]; !root {
		c.refuse("there is no root mount")
	}
	for _, at := range slices.Sorted(maps.Keys(want)) {
		switch w := want[at]; {
		case seen[at], w.optional:
		case w.why != "":
			c.refuse("%s is not %s in the checkpoint, as the spec has it", w.Destination, w.why)
		default:
			c.refuse("the checkpoint has no mount at %s, where the spec has one", w.Destination)
		}
	}
}

// checkMount is for one mount of the checkpoint.
func (c *checker) checkMount(m mountEntry, all *mountTree, want map[string]wanted) {
	w, listed := want[m.at]
	switch {
	case m.at == "/":
		if c.spec.Root != nil && c.spec.Root.Readonly && m.GetFlags()&unix.MS_RDONLY == 0 {
			c.refuse("the root filesystem is writable, the spec has it read-only")
		}
	case w.why == "masked":
		c.checkMask(m)
	case w.why == "read-only":
		c.checkReadonly(m, all)
	case listed:
		c.checkListed(m, w.Mount)
	case c.ofCgroups(m, want), c.ofDevice(m, all):
	case (isBelow(m.at, "/proc/") || isBelow(m.at, "/sys/")) && (m.masks() || all.onItself(m)):
		// The spec of then took more away than this one.
	case m.external() == "" && c.grant.any("CAP_SYS_ADMIN") && (m.virtual() || all.shares(m)):
		// Its processes can mount that themselves.
	default:
		c.refuse("the checkpoint has a mount at %s, where the spec has none", quote(m.at))
	}
}

// external is the name by which the runtime gives CRIU a mount from outside.
func (m mountEntry) external() string {
	if m.ExtKey != nil {
		return m.GetExtKey()
	}
	if m.GetExtMount() {
		return m.at
	}
	return ""
}

// checkListed compares a mount with the spec's on the same path.
func (c *checker) checkListed(m mountEntry, w specs.Mount) {
	if isBind(w) {
		switch key := m.external(); {
		case key == "":
			c.refuse("the mount at %s is one of the checkpoint's own, the spec has %s there", quote(m.at), w.Source)
			return
		case path.Clean("/"+key) != m.at:
			c.refuse("the mount at %s is that of %s", quote(m.at), quote(key))
			return
		}
		if m.GetSharedId() != 0 && !slices.Contains(w.Options, "shared") && !slices.Contains(w.Options, "rshared") {
			c.refuse("the mount at %s is shared with the host, which the spec does not have", quote(m.at))
		}
	} else {
		kind := virtualTypes[m.GetFstype()]
		cgroups := w.Type == "cgroup" && (kind == "tmpfs" || kind == "cgroup2") || w.Type == "cgroup2" && kind == "cgroup2"
		switch {
		case m.external() != "" && !cgroups:
			c.refuse("the mount at %s is one from outside (%s), the spec has a %s", quote(m.at), quote(m.external()), w.Type)
			return
		case kind != w.Type && !cgroups:
			c.refuse("the mount at %s is a %s, the spec has a %s", quote(m.at), quote(c.typeOf(m)), w.Type)
			return
		case kind == "tmpfs" && cgroups:
			return // the spec's options are for the mounts in it
		case m.GetRoot() != "/" && !cgroups:
			c.refuse("the mount at %s shows only %s of its file system", quote(m.at), quote(m.GetRoot()))
			return
		}
	}
	c.checkFlags(m, w)
}

func (c *checker) checkFlags(m mountEntry, w specs.Mount) {
	for _, f := range mountFlags {
		if slices.Contains(w.Options, f.option) && m.GetFlags()&f.flag == 0 {
			c.refuse("the mount at %s is not %s, as the spec has it", quote(m.at), f.option)
		}
	}
}

func (c *checker) typeOf(m mountEntry) string {
	if kind := virtualTypes[m.GetFstype()]; kind != "" {
		return kind
	}
	return strings.ToLower(mnt.Fstype(m.GetFstype()).String())
}

func (c *checker) checkMask(m mountEntry) {
	if !m.masks() {
		c.refuse("%s is not masked in the checkpoint, as the spec has it", quote(m.at))
	}
}

func (c *checker) checkReadonly(m mountEntry, all *mountTree) {
	if !all.onItself(m) {
		c.refuse("%s is not read-only in the checkpoint, as the spec has it", quote(m.at))
	}
}

// masks: runtimes put /dev/null on a file, and an empty read-only tmpfs on a folder.
// runc gives CRIU the former by its own name, crun by that of the file.
func (m mountEntry) masks() bool {
	return m.external() == "/dev/null" || m.external() != "" && m.external() == m.at ||
		m.external() == "" && m.GetFstype() == uint32(mnt.Fstype_TMPFS) && m.GetFlags()&unix.MS_RDONLY != 0
}

// ofCgroups tells whether a mount is a hierarchy below the spec's mount of cgroup v1.
func (c *checker) ofCgroups(m mountEntry, want map[string]wanted) bool {
	dir := path.Dir(m.at)
	w, listed := want[dir]
	kind := virtualTypes[m.GetFstype()]
	if !listed || w.Type != "cgroup" || kind != "cgroup" && kind != "cgroup2" {
		return false
	}
	// Without a namespace it is a part of the host's, which the runtime gives.
	if key := m.external(); key != "" && path.Clean("/"+key) != m.at || key == "" && c.namespace(specs.CgroupNamespace) == nil {
		return false
	}
	c.checkFlags(m, w.Mount)
	return true
}

// ofDevice tells whether a mount is a device of the spec, as in a user namespace,
// or the container's terminal.
func (c *checker) ofDevice(m mountEntry, all *mountTree) bool {
	if c.grant.devices[m.at] && m.external() == m.at {
		return true
	}
	if m.at != "/dev/console" || !c.hasTerminal() || m.GetFstype() != uint32(mnt.Fstype_DEVPTS) {
		return false
	}
	return m.external() == "" && all.shares(m)
}

// checkFileSystem refuses what looks like another mount of a file system from
// outside: CRIU makes those by binding a folder of the first, flags as it likes.
func (c *checker) checkFileSystem(m mountEntry, devices map[uint32]string) {
	whose := "outside"
	if m.external() == "" {
		whose = "inside"
	} else if m.external() == "/dev/null" || c.grant.devices[m.external()] {
		return // of the container's own /dev
	}
	if m.at == "/" {
		return // the runtime's, on what file system ever
	}
	if before, known := devices[m.GetRootDev()]; known && before != whose {
		c.refuse("the mount at %s is of the same file system as one from outside", quote(m.at))
	}
	devices[m.GetRootDev()] = whose
}

// checkKinds refuses a folder to be mounted on a file, and a file on a folder: the
// runtime would say so less clearly.
func (c *checker) checkKinds(rootfs string) error {
	for _, m := range c.spec.Mounts {
		if !isBind(m) {
			continue
		}
		at, err := fs.RootPath(rootfs, m.Destination)
		if err != nil {
			return err
		}
		source, err := os.Stat(m.Source)
		there, err2 := os.Lstat(at)
		if err != nil || err2 != nil || source.IsDir() == there.IsDir() {
			continue // what is not there, the runtime makes, or says
		}
		kind := map[bool]string{true: "folder", false: "file"}
		c.refuse("the mount at %s is a %s in the spec and a %s in the checkpoint", m.Destination, kind[source.IsDir()], kind[there.IsDir()])
	}
	return nil
}

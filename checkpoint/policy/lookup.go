package policy

import (
	"errors"
	"fmt"
	"path"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// CRIU opens the paths of an image by open(2), in mounts that it has made, while it
// holds descriptors of the host's: /proc/self/fd leads to all of the host. The mounts
// are not there yet when a checkpoint is checked. So paths are followed here as the
// kernel will, component by component: through the checkpoint's mounts, in each of
// which the files are those of the root filesystem, of a volume, of an archive of a
// tmpfs, or of procfs. No link within procfs is followed.

// view is the files of a mount namespace that is going to be.
type view struct {
	c      *checker
	tree   *mountTree
	rootfs string
	bases  map[string]int // descriptors of folders of this host
	cache  map[string]node
}

func (c *checker) newView(all []mountEntry, rootfs string) *view {
	return &view{c: c, tree: newMountTree(all), rootfs: rootfs, bases: map[string]int{}, cache: map[string]node{}}
}

func (v *view) close() {
	for _, fd := range v.bases {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
}

// node is what a name of the container stands for.
type node struct {
	missing bool
	link    string // where it leads, or ""
	mode    uint32 // of the file, with its type; 0 if only the restore makes it
	fs      int64  // the magic number of its file system, if that is one of the kernel's own
	within  string // its path in that file system, "" where that is not known
	bad     string // why it must not be opened
}

// place is where a path leads.
type place struct {
	node
	at     string // in the container, without links
	linked bool   // there were links on the way
}

// maxCached bounds the memory for what was looked up.
const maxCached = 100_000

// maxLinks is the kernel's MAXSYMLINKS.
const maxLinks = 40

// follow resolves a path. last says whether a link at the end is followed.
func (v *view) follow(p string, last bool) (place, error) {
	if len(p) > maxPath {
		return place{node: node{bad: "is too long"}}, nil
	}
	rest := strings.Split(p, "/")
	at, out, links := "/", place{at: "/", node: v.lookup("/")}, 0
	for len(rest) > 0 {
		if err := v.c.budget.step(); err != nil {
			return out, err
		}
		name := rest[0]
		rest = rest[1:]
		switch name {
		case "", ".":
			continue
		case "..":
			at = path.Dir(at)
			out.at, out.node = at, v.lookup(at)
			continue
		}
		if out.missing { // and all that is in it, but a mount: the runtime makes the way to it
			at = path.Join(at, name)
			out.at = at
			if _, mounted := v.tree.at[at]; mounted {
				out.node = v.lookup(at)
			}
			continue
		}
		next := path.Join(at, name)
		n := v.lookup(next)
		if n.bad != "" {
			out.node, out.at = n, next
			return out, nil
		}
		if n.link != "" && (last || len(rest) > 0) {
			if links++; links > maxLinks || len(n.link) > maxPath {
				out.bad = "goes over too many links"
				return out, nil
			}
			out.linked = true
			rest = append(strings.Split(n.link, "/"), rest...)
			if len(rest) > maxPath {
				out.bad = "is too long"
				return out, nil
			}
			if strings.HasPrefix(n.link, "/") {
				at = "/"
			}
			out.at, out.node = at, v.lookup(at)
			continue
		}
		at, out.at, out.node = next, next, n
	}
	return out, nil
}

// lookup returns what is at a path of the container whose parent has no links.
func (v *view) lookup(at string) node {
	if n, known := v.cache[at]; known {
		return n
	}
	if len(at) > maxPath { // over links one comes deeper than one path can tell
		return node{bad: "is too long"}
	}
	m, ok := v.tree.at[at]
	if !ok {
		m, ok = v.tree.over(at)
	}
	n := node{}
	if ok {
		n = v.in(m, strings.TrimPrefix(at[len(trimRoot(m.at)):], "/"))
	}
	if n.bad == "" && n.link != "" && at == m.at {
		n.bad = "is a mount on a link"
	}
	if len(v.cache) < maxCached {
		v.cache[at] = n
	}
	return n
}

// in returns what a mount has at a path. Whatever the image says of the mount has
// been compared with the spec.
func (v *view) in(m mountEntry, rel string) node {
	root := v.tree.at["/"]
	inside := strings.TrimPrefix(path.Join("/", m.GetRoot(), rel), "/")
	w, listed := v.c.wanted[m.at]
	switch kind := virtualTypes[m.GetFstype()]; {
	case m.at == "/":
		return v.onHost(v.rootfs, rel)
	case m.external() != "" && listed && w.why == "" && isBind(w.Mount):
		if !filepath.IsAbs(w.Source) {
			return node{bad: "is in a mount whose source is not absolute"}
		}
		return v.onHost(w.Source, rel)
	case m.external() != "" && kind != "cgroup" && kind != "cgroup2":
		return node{} // a device, or what masks a file
	case kind == "proc":
		n := procfs(inside)
		n.fs, n.within = unix.PROC_SUPER_MAGIC, inside
		return n
	case kind == "sysfs":
		n := v.onHost("/sys", inside)
		n.fs, n.within = unix.SYSFS_MAGIC, inside
		return n
	case kind == "cgroup" || kind == "cgroup2":
		return node{fs: unix.CGROUP_SUPER_MAGIC, mode: unix.S_IFREG | 0o644}
	case kind == "tmpfs":
		for _, number := range m.archives() {
			if link, ok := v.c.tmpfsLinks[number][inside]; ok {
				return node{link: link}
			}
		}
		return node{}
	case kind != "":
		return node{} // devpts, mqueue: no links
	case m.fileSystem() == root.fileSystem():
		// A part of the root filesystem, which is perhaps a part itself.
		if at := "/" + inside; isBelow(at, root.GetRoot()) {
			return v.onHost(v.rootfs, strings.TrimPrefix(at[len(trimRoot(root.GetRoot())):], "/"))
		}
	}
	return node{bad: "is in a mount whose files cannot be checked"}
}

// onHost looks a path up in a folder (or file) of this host, without following any
// link.
func (v *view) onHost(base, rel string) node {
	dir, known := v.bases[base]
	if !known {
		var err error
		if dir, err = unix.Open(base, unix.O_PATH|unix.O_CLOEXEC, 0); err != nil {
			dir = -1
		}
		v.bases[base] = dir
	}
	if dir < 0 {
		return node{missing: true} // as what the runtime is going to say
	}
	fd := dir
	if rel != "" {
		var err error
		fd, err = unix.Openat2(dir, rel, &unix.OpenHow{Flags: unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC,
			Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS})
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
			return node{missing: true}
		}
		if err != nil {
			return node{bad: fmt.Sprintf("cannot be looked up (%v)", err)}
		}
		defer unix.Close(fd)
	}
	var st unix.Stat_t
	var fs unix.Statfs_t
	if err := errors.Join(unix.Fstat(fd, &st), unix.Fstatfs(fd, &fs)); err != nil {
		return node{bad: fmt.Sprintf("cannot be looked up (%v)", err)}
	}
	n := node{mode: st.Mode}
	if kernelOwn[int64(fs.Type)] {
		n.fs = int64(fs.Type)
	}
	if st.Mode&unix.S_IFMT == unix.S_IFLNK && rel != "" {
		if n.fs == unix.PROC_SUPER_MAGIC {
			return node{bad: "goes over a link of procfs"}
		}
		target := make([]byte, maxPath+1)
		size, err := unix.Readlinkat(fd, "", target)
		if err != nil || size == 0 {
			return node{bad: fmt.Sprintf("cannot be looked up (%v)", err)}
		}
		n.link = string(target[:size])
	}
	return n
}

// kernelOwn are the file systems that show what the kernel has, where files are
// opened by root for more than they show to others.
var kernelOwn = map[int64]bool{
	unix.PROC_SUPER_MAGIC: true, unix.SYSFS_MAGIC: true, unix.DEBUGFS_MAGIC: true, unix.TRACEFS_MAGIC: true, unix.SECURITYFS_MAGIC: true,
	unix.BPF_FS_MAGIC: true, unix.EFIVARFS_MAGIC: true, unix.PSTOREFS_MAGIC: true, unix.SELINUX_MAGIC: true, unix.SMACK_MAGIC: true,
	unix.CGROUP_SUPER_MAGIC: true, unix.CGROUP2_SUPER_MAGIC: true, unix.BINFMTFS_MAGIC: true, configfsMagic: true, resctrlMagic: true,
}

// Of Linux's magic.h and resctrl.h, which the library does not have.
const (
	configfsMagic = 0x62656570
	resctrlMagic  = 0x7655821
)

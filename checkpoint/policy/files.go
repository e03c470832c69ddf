package policy

import (
	"path"
	"regexp"
	"strings"
	"sync"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fsnotify"
	ghost "github.com/checkpoint-restore/go-criu/v8/crit/images/ghost-file"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/memfd"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/regfile"
	remap "github.com/checkpoint-restore/go-criu/v8/crit/images/remap-file-path"
	skunix "github.com/checkpoint-restore/go-criu/v8/crit/images/sk-unix"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/tty"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/layout"
)

// checkFiles looks at everything that is open. CRIU opens it as root, in the
// container's mount namespace and device cgroup.
func (c *checker) checkFiles() error {
	regular := map[uint32]string{}
	c.unnamed, c.parts = map[uint32]bool{}, map[part]uint32{}
	err := c.each(layout.RemapFilePaths, "REMAP_FPATH", func(msg []byte) error {
		var e remap.RemapFilePathEntry
		err := c.decode(msg, &e)
		c.unnamed[e.GetOrigId()] = e.RemapType != nil && e.GetRemapType() == remap.RemapType_GHOST
		if name := layout.GhostFile.Hex(e.GetRemapId()); c.names[name] {
			c.parts[part{image: name}] = e.GetOrigId()
		}
		return err
	})
	if err != nil {
		return err
	}
	err = c.each(layout.Files, "FILES", func(msg []byte) error {
		var e fdinfo.FileEntry
		if err := c.decode(msg, &e); err != nil {
			return err
		}
		if reg := e.GetReg(); reg != nil {
			regular[e.GetId()] = reg.GetName()
			regular[reg.GetId()] = reg.GetName()
		}
		if e.Tty != nil {
			c.parts[part{layout.Terminals, e.GetTty().GetTtyInfoId()}] = e.GetId()
		}
		if e.Memfd != nil {
			c.parts[part{layout.Memfds, e.GetMemfd().GetInodeId()}] = e.GetId()
		}
		c.checkFile(&e)
		return nil
	})
	if err != nil {
		return err
	}
	for _, step := range []func() error{
		func() error { return c.checkRemaps(regular) }, c.checkGhosts, c.checkTerminals, c.checkMemfds, c.checkLabels,
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// checkFile is for one entry of files.img. What it has besides its type is looked
// at as well.
func (c *checker) checkFile(e *fdinfo.FileEntry) {
	g := &c.grant
	who := opened{c, e.GetId()}
	switch e.GetType() {
	case fdinfo.FdTypes_REG, fdinfo.FdTypes_PIPE, fdinfo.FdTypes_FIFO, fdinfo.FdTypes_INETSK, fdinfo.FdTypes_UNIXSK,
		fdinfo.FdTypes_EVENTFD, fdinfo.FdTypes_EVENTPOLL, fdinfo.FdTypes_INOTIFY, fdinfo.FdTypes_SIGNALFD, fdinfo.FdTypes_PACKETSK,
		fdinfo.FdTypes_TTY, fdinfo.FdTypes_FANOTIFY, fdinfo.FdTypes_NETLINKSK, fdinfo.FdTypes_NS, fdinfo.FdTypes_TUNF,
		fdinfo.FdTypes_TIMERFD, fdinfo.FdTypes_MEMFD, fdinfo.FdTypes_BPFMAP, fdinfo.FdTypes_PIDFD:
	default:
		c.refuse("%s: is of kind %s, which comes from outside of the container", who, e.GetType())
	}
	if reg := e.GetReg(); reg != nil {
		c.checkRegular(who, reg)
	}
	if e.Ext != nil {
		c.refuse("%s: is external", who)
	}
	if sk := e.GetUsk(); sk != nil {
		c.checkUnixSocket(who, sk)
		c.checkSocketNamespace(who, sk.NsId)
	}
	if sk := e.GetIsk(); sk != nil {
		c.checkSocketNamespace(who, sk.NsId)
		c.checkPort(who, sk)
		if sk.GetType() == unix.SOCK_RAW && !g.any("CAP_NET_RAW") {
			c.refuse("%s: raw socket of protocol %d needs CAP_NET_RAW", who, sk.GetProto())
		}
		if name := sk.GetIfname(); strings.ContainsAny(name, "/") {
			c.refuse("%s: network device %s has no valid name", who, quote(name))
		}
	}
	if sk := e.GetPsk(); sk != nil {
		c.checkSocketNamespace(who, sk.NsId)
		if !g.any("CAP_NET_RAW") {
			c.refuse("%s: packet socket needs CAP_NET_RAW", who)
		}
	}
	if sk := e.GetNlsk(); sk != nil {
		c.checkSocketNamespace(who, sk.NsId)
		switch sk.GetProtocol() {
		case unix.NETLINK_ROUTE, unix.NETLINK_SOCK_DIAG, unix.NETLINK_KOBJECT_UEVENT, unix.NETLINK_GENERIC, unix.NETLINK_CRYPTO:
		default:
			if !g.any("CAP_NET_ADMIN") {
				c.refuse("%s: netlink socket of protocol %d needs CAP_NET_ADMIN", who, sk.GetProtocol())
			}
		}
	}
	if ns := e.GetNsf(); ns != nil {
		c.checkNamespaceFile(who, ns.GetNsId())
	}
	if e.Tunf != nil && !g.any("CAP_NET_ADMIN") {
		c.refuse("%s: tun device %s needs CAP_NET_ADMIN", who, quote(e.GetTunf().GetNetdev()))
	}
	if e.Bpf != nil && !g.any("CAP_BPF", "CAP_SYS_ADMIN") {
		c.refuse("%s: eBPF map needs CAP_BPF", who)
	}
	if e.Ffy != nil && !g.any("CAP_SYS_ADMIN") {
		c.refuse("%s: fanotify needs CAP_SYS_ADMIN", who)
	}
	c.checkOtherFlags(who, e)
	for _, wd := range e.GetIfy().GetWd() {
		c.checkWatch(who, wd)
	}
}

// checkOtherFlags is for what else CRIU opens with the flags of an image.
func (c *checker) checkOtherFlags(who opened, e *fdinfo.FileEntry) {
	for _, f := range []struct {
		kind  string
		flags uint32
	}{
		{"terminal", e.GetTty().GetFlags()}, {"memory file", e.GetMemfd().GetFlags()}, {"pipe", e.GetPipe().GetFlags()},
		{"namespace", e.GetNsf().GetFlags()},
	} {
		if bad := badFlags(f.flags); bad != "" {
			c.refuse("%s: %s %s", who, f.kind, bad)
		}
	}
}

func (c *checker) checkRegular(who opened, reg *regfile.RegFileEntry) {
	name := reg.GetName()
	if bad := inRoot(name); bad != "" {
		c.refuse("%s: %s", who, bad)
		return
	}
	flags := reg.GetFlags()
	if c.unnamed[reg.GetId()] {
		flags &^= tempFlag
	}
	if bad := badFlags(flags); bad != "" {
		c.refuse("%s: %s %s", who, quote(name), bad)
	}
	if reg.GetExt() {
		c.refuse("%s: %s is external", who, quote(name))
	}
	switch reg.GetMode() & unix.S_IFMT {
	case unix.S_IFCHR, unix.S_IFBLK:
		if !c.mayOpenDevice(name) {
			c.refuse("%s: %s is a device that the spec does not have", who, quote(name))
		}
	}
}

// mayOpenDevice is about the name only. What is behind it when CRIU opens it, the
// device cgroup decides, as for any process of the container.
func (c *checker) mayOpenDevice(name string) bool {
	if c.grant.devices[name] || strings.HasPrefix(name, "/dev/pts/") {
		return true
	}
	for _, m := range c.spec.Mounts {
		if isBind(m) && isBelow(name, m.Destination) {
			return true
		}
	}
	return c.spec.Linux != nil && c.spec.Linux.Resources != nil && allDevices(c.spec.Linux.Resources.Devices)
}

// allDevices tells whether a container is privileged: the last rule that is about
// all devices allows them.
func allDevices(rules []specs.LinuxDeviceCgroup) (all bool) {
	for _, r := range rules {
		if (r.Type == "" || r.Type == "a") && r.Major == nil && r.Minor == nil {
			all = r.Allow
		}
	}
	return all
}

func isBind(m specs.Mount) bool {
	if m.Type == "bind" {
		return true
	}
	for _, o := range m.Options {
		if o == "bind" || o == "rbind" {
			return true
		}
	}
	return false
}

// isBelow tells whether a path is a folder or in it.
func isBelow(name, dir string) bool {
	dir = path.Clean(dir)
	return name == dir || strings.HasPrefix(name, strings.TrimSuffix(dir, "/")+"/")
}

// checkSocketNamespace refuses sockets of another network namespace.
func (c *checker) checkSocketNamespace(who opened, id *uint32) {
	if id != nil && *id != 0 && *id != c.init().ids.GetNetNsId() {
		c.refuse("%s: is a socket of network namespace %d, the processes are in %d", who, *id, c.init().ids.GetNetNsId())
	}
}

// checkNamespaceFile refuses a descriptor of one of the host's namespaces.
func (c *checker) checkNamespaceFile(who opened, id uint32) {
	for _, ns := range namespaceKinds {
		if id == ns.id(c.inventory.root) && c.namespace(ns.kind) != nil {
			c.refuse("%s: is the host's %s namespace", who, ns.kind)
		}
	}
}

// unixExternal marks the other end of a socket, which is outside of the
// container: USK_EXTERN, CRIU's sk-unix.c.
const unixExternal = 1 << 0

func (c *checker) checkUnixSocket(who opened, sk *skunix.UnixSkEntry) {
	name := strings.TrimRight(string(sk.GetName()), "\x00")
	abstract := strings.HasPrefix(string(sk.GetName()), "\x00")
	if !abstract && (climbs(name) || strings.ContainsRune(name, 0)) {
		c.refuse("%s: unix socket %s climbs with ..", who, quote(name))
	}
	if climbs(sk.GetNameDir()) {
		c.refuse("%s: unix socket in %s, which climbs with ..", who, quote(sk.GetNameDir()))
	}
	if p := sk.GetFilePerms(); p != nil && !abstract && !(c.grant.uid(p.GetUid()) && c.grant.gid(p.GetGid())) {
		c.refuse("%s: unix socket %s belongs to %d:%d, which the spec does not grant", who, quote(name), p.GetUid(), p.GetGid())
	}
	if sk.GetUflags()&unixExternal == 0 {
		return
	}
	switch ns := c.namespace(specs.NetworkNamespace); {
	case abstract && (ns == nil || ns.Path != ""):
		return // it is in the namespace that the spec has
	case !abstract:
		for _, m := range c.spec.Mounts {
			if isBind(m) && isBelow(name, m.Destination) {
				return
			}
		}
	}
	c.refuse("%s: is connected to unix socket %s, which is in none of the spec's mounts", who, quote(strings.TrimLeft(name, "\x00")))
}

// checkWatch is for an inotify watch. Without a path CRIU opens the file by its
// handle, which finds any file of the file system, also outside of what of it is
// mounted; CheckMounts looks at those.
func (c *checker) checkWatch(who opened, wd *fsnotify.InotifyWdEntry) {
	if p := wd.GetFHandle().Path; p != nil && climbs(*p) {
		c.refuse("%s: watches %s, which climbs with ..", who, quote(*p))
	}
}

// linkRemap is how CRIU names the second name of a file whose first was deleted.
// It deletes it when the file is open again.
var linkRemap = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^link_remap\.\d+$`) })

func (c *checker) checkRemaps(regular map[uint32]string) error {
	return c.each(layout.RemapFilePaths, "REMAP_FPATH", func(msg []byte) error {
		var e remap.RemapFilePathEntry
		if err := c.decode(msg, &e); err != nil {
			return err
		}
		if e.RemapType != nil && e.GetRemapType() != remap.RemapType_LINKED {
			return nil
		}
		if e.RemapType == nil && c.names[layout.GhostFile.Hex(e.GetRemapId())] {
			return nil // the old form
		}
		if name := regular[e.GetRemapId()]; !linkRemap().MatchString(path.Base(name)) {
			c.refuse("%s: remap-fpath.img: a restore would delete %s", opened{c, e.GetOrigId()}, quote(name))
		}
		return nil
	})
}

// checkGhosts looks at deleted files, which CRIU makes again for a moment.
func (c *checker) checkGhosts() error {
	for _, name := range c.ckpt.Names() {
		if !layout.GhostFile.Begins(name) {
			continue
		}
		var e ghost.GhostFileEntry
		if err := c.firstOnly(name, "GHOST_FILE", &e); err != nil {
			return err
		}
		who := c.of(part{image: name})
		switch e.GetMode() & unix.S_IFMT {
		case unix.S_IFCHR, unix.S_IFBLK:
			c.refuse("%s: a deleted file that is a device", who)
		case unix.S_IFLNK:
			// It is there for a moment, in which CRIU opens other files.
			c.refuse("%s: a deleted file that is a link", who)
		}
		if !c.grant.uid(e.GetUid()) || !c.grant.gid(e.GetGid()) {
			c.refuse("%s: a deleted file of %d:%d, which the spec does not grant", who, e.GetUid(), e.GetGid())
		}
	}
	return nil
}

func (c *checker) checkTerminals() error {
	return c.each(layout.Terminals, "TTY_INFO", func(msg []byte) error {
		var e tty.TtyInfoEntry
		if err := c.decode(msg, &e); err != nil {
			return err
		}
		switch e.GetType() {
		case tty.TtyType_PTY, tty.TtyType_CTTY, tty.TtyType_UNKNOWN:
		default:
			if !c.hasTerminal() && !allDevicesOf(c.spec) {
				c.refuse("%s: terminal %d is of kind %s, which the spec does not have", c.of(part{layout.Terminals, e.GetId()}), e.GetId(), e.GetType())
			}
		}
		return nil
	})
}

func (c *checker) hasTerminal() bool { return c.spec.Process != nil && c.spec.Process.Terminal }

func allDevicesOf(spec *specs.Spec) bool {
	return spec.Linux != nil && spec.Linux.Resources != nil && allDevices(spec.Linux.Resources.Devices)
}

func (c *checker) checkMemfds() error {
	return c.each(layout.Memfds, "MEMFD_INODE", func(msg []byte) error {
		var e memfd.MemfdInodeEntry
		if err := c.decode(msg, &e); err != nil {
			return err
		}
		if !c.grant.uid(e.GetUid()) || !c.grant.gid(e.GetGid()) {
			c.refuse("%s: memory file %s belongs to %d:%d, which the spec does not grant", c.of(part{layout.Memfds, uint32(e.GetInodeId())}), quote(e.GetName()), e.GetUid(), e.GetGid())
		}
		return nil
	})
}

// checkLabels looks at the SELinux labels of sockets.
func (c *checker) checkLabels() error {
	for _, name := range c.ckpt.Names() {
		if !strings.HasPrefix(name, "fdinfo-") {
			continue
		}
		err := c.each(name, "FDINFO", func(msg []byte) error {
			var e fdinfo.FdinfoEntry
			if err := c.decode(msg, &e); err != nil {
				return err
			}
			if label := e.GetXattrSecuritySelinux(); label != "" && (c.spec.Process == nil || label != c.spec.Process.SelinuxLabel) {
				c.refuse("%s: descriptor %d in %s has the label %s, which is not the spec's", opened{c, e.GetId()}, e.GetFd(), name, quote(label))
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

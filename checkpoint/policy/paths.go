package policy

import (
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	remap "github.com/checkpoint-restore/go-criu/v8/crit/images/remap-file-path"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/layout"
)

// paths are what a restore opens, binds, makes and deletes by name.
type paths struct {
	regular  []regular
	sockets  []socket
	watches  []watch
	fifos    map[uint32]bool   // the entries of regular that are opened as such
	others   map[uint32]uint32 // further accesses to them, as bits of a mode
	makes    map[uint32]bool   // those whose name CRIU makes, and deletes again
	procfs   map[uint32]bool   // those of processes that had ended
	existing map[uint32]bool   // those that are links to files that CRIU gave a name
}

// regular and socket are what matters of their messages, of which there can be many.
type regular struct {
	id, flags uint32
	mount     int32
	name      string
}

type socket struct {
	id    uint32
	mount int32
	peer  bool // the name is another's
	name  string
}

type watch struct {
	file uint32
	path string
}

// checkPaths follows every path that CRIU opens, binds, makes or deletes, in the
// mounts that it makes before.
func (c *checker) checkPaths(rootfs string) error {
	if c.namespace(specs.MountNamespace) == nil || len(c.mounts) == 0 {
		return nil // the spec has the host's files
	}
	p, err := c.readPaths()
	if err != nil {
		return err
	}
	var first *view
	views := map[uint32]*view{} // by the numbers of mounts
	for _, name := range slices.Sorted(maps.Keys(c.mounts)) {
		v := c.newView(c.mounts[name], rootfs)
		defer v.close()
		if first == nil {
			first = v
		}
		for _, m := range c.mounts[name] {
			views[m.GetMntId()] = v
		}
		if err := c.checkMountPaths(v); err != nil {
			return err
		}
	}
	of := func(id int32) *view {
		if v := views[uint32(id)]; v != nil {
			return v
		}
		return first
	}
	for _, reg := range p.regular {
		if err := c.checkRegularPath(of(reg.mount), reg, p); err != nil {
			return err
		}
	}
	for _, sk := range p.sockets {
		if err := c.checkSocketPath(of(sk.mount), sk); err != nil {
			return err
		}
	}
	for _, w := range p.watches {
		to, err := first.follow(w.path, true)
		if err != nil {
			return err
		}
		bad := to.bad
		if bad == "" && to.fs != 0 {
			bad = c.mayOpenKernels(to, 4, nil)
		}
		if bad != "" {
			c.refuse("%s: watches %s, which %s", opened{c, w.file}, quote(w.path), bad)
		}
	}
	return nil
}

func (c *checker) readPaths() (*paths, error) {
	p := &paths{fifos: map[uint32]bool{}, others: map[uint32]uint32{}, makes: map[uint32]bool{}, procfs: map[uint32]bool{}, existing: map[uint32]bool{}}
	err := c.each(layout.RemapFilePaths, "REMAP_FPATH", func(msg []byte) error {
		var e remap.RemapFilePathEntry
		if err := c.decode(msg, &e); err != nil {
			return err
		}
		if e.GetRemapType() == remap.RemapType_PROCFS {
			p.procfs[e.GetOrigId()] = true
			return nil
		}
		p.makes[e.GetOrigId()] = true
		if e.GetRemapType() == remap.RemapType_LINKED {
			p.makes[e.GetRemapId()], p.existing[e.GetRemapId()] = true, true
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return p, c.each(layout.Files, "FILES", func(msg []byte) error {
		var e fdinfo.FileEntry
		if err := c.decode(msg, &e); err != nil {
			return err
		}
		if reg := e.GetReg(); reg != nil {
			p.regular = append(p.regular, regular{reg.GetId(), reg.GetFlags(), reg.GetMntId(), reg.GetName()})
		}
		if sk := e.GetUsk(); sk != nil && len(sk.GetName()) > 0 && sk.GetName()[0] != 0 {
			name := strings.TrimRight(string(sk.GetName()), "\x00")
			if !strings.HasPrefix(name, "/") {
				name = sk.GetNameDir() + "/" + name
			}
			p.sockets = append(p.sockets, socket{sk.GetId(), sk.GetMntId(), sk.GetUflags()&unixExternal != 0, name})
		}
		if e.Fifo != nil {
			p.fifos[e.GetFifo().GetRegfId()] = true
			p.fifos[e.GetFifo().GetId()] = true // where there is no other number
		}
		if e.Tty != nil {
			p.others[e.GetTty().GetRegfId()] |= opens(e.GetTty().GetFlags())
		}
		for _, wd := range e.GetIfy().GetWd() {
			if h := wd.GetFHandle(); h.Path != nil {
				p.watches = append(p.watches, watch{e.GetId(), h.GetPath()})
			}
		}
		for _, mark := range e.GetFfy().GetMark() {
			for _, at := range []*string{pathOf(mark.GetIe().GetFHandle()), pathOf(mark.GetMe())} {
				if at != nil {
					p.watches = append(p.watches, watch{e.GetId(), *at})
				}
			}
		}
		return nil
	})
}

// checkMountPaths refuses links on the way to a mount: CRIU mounts before the root
// of its own is the container's.
func (c *checker) checkMountPaths(v *view) error {
	for _, m := range v.tree.all {
		parent, below := v.tree.over(m.at)
		if !below {
			continue
		}
		dir, err := v.follow(path.Dir(m.at), true)
		if err != nil {
			return err
		}
		here := v.in(parent, m.at[len(trimRoot(parent.at))+1:])
		switch {
		case dir.bad != "":
			c.refuse("the way to the mount at %s %s", quote(m.at), dir.bad)
		case dir.linked || here.link != "":
			c.refuse("the way to the mount at %s goes over a link", quote(m.at))
		}
	}
	return nil
}

func (c *checker) checkRegularPath(v *view, reg regular, p *paths) error {
	makes := p.makes[reg.id]
	link := makes
	if itself := uint32(unix.O_PATH | unix.O_NOFOLLOW); reg.flags&itself == itself {
		// For a mapping, CRIU opens the file with the mapping's own flags.
		uses, err := c.uses()
		if err != nil {
			return err
		}
		link = link || uses[reg.id].access == 0
	}
	to, err := v.follow(reg.name, !link)
	if err != nil {
		return err
	}
	bad := to.bad
	fifo := p.fifos[reg.id] && to.mode != 0 && to.mode&unix.S_IFMT != unix.S_IFIFO
	switch {
	case bad != "":
	case makes && (to.linked || to.link != ""):
		// CRIU makes the name, and before that the folders that are missing.
		bad = "was deleted, and goes over a link now"
	case makes && to.fs != 0:
		bad = "was deleted, and is in a file system of the kernel's"
	case fifo:
		bad = "is opened as a FIFO, and is none"
	case to.fs != 0 && p.procfs[reg.id] && to.mode&4 != 0 && opens(reg.flags) == 4:
		// Of a process that has ended; CRIU makes one of that number for it.
	case to.fs != 0:
		uses, err := c.uses()
		if err != nil {
			return err
		}
		access := opens(reg.flags) | p.others[reg.id] | uses[reg.id].access
		bad = c.mayOpenKernels(to, access, c.processes)
	}
	if bad != "" {
		c.refuse("%s: %s %s", opened{c, reg.id}, quote(reg.name), bad)
	}
	return nil
}

func (c *checker) checkSocketPath(v *view, sk socket) error {
	to, err := v.follow(sk.name, sk.peer)
	if err != nil {
		return err
	}
	bad := to.bad
	switch kind := to.mode & unix.S_IFMT; {
	case bad != "":
	case to.fs != 0:
		bad = "is in a file system of the kernel's"
	case to.link != "":
		bad = "is a link, which a restore would delete"
	case !sk.peer && to.mode != 0 && kind != unix.S_IFSOCK && !to.missing:
		bad = "is no socket, and a restore would delete it"
	}
	if bad != "" {
		c.refuse("%s: unix socket %s %s", opened{c, sk.id}, quote(sk.name), bad)
	}
	return nil
}

// pathOf returns the path that a message has, or nil.
func pathOf(m interface{ GetPath() string }) *string {
	if p := m.GetPath(); p != "" {
		return &p
	}
	return nil
}

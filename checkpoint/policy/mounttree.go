package policy

import (
	"path"

	"golang.org/x/sys/unix"
)

// maxPath is the kernel's PATH_MAX.
const maxPath = 4096

// mountTree is the mounts of one namespace, to be looked up.
type mountTree struct {
	all  []mountEntry
	at   map[string]mountEntry   // by path: the first on each
	file map[[2]uint32]int       // how many of CRIU's own are of a file system: its device and type
	ways map[string]string       // each folder on the way to a mount, and the mount
	tars map[string][]mountEntry // those that an archive of tmpfs files may be of, by its number
}

func newMountTree(all []mountEntry) *mountTree {
	t := &mountTree{all: all, at: map[string]mountEntry{}, file: map[[2]uint32]int{}, ways: map[string]string{},
		tars: map[string][]mountEntry{}}
	for _, m := range all {
		if _, twice := t.at[m.at]; twice {
			continue
		}
		t.at[m.at] = m
		for _, number := range m.archives() {
			t.tars[number] = append(t.tars[number], m)
		}
		if m.external() == "" {
			t.file[m.fileSystem()]++
		}
	}
	for _, m := range all {
		if len(m.at) > maxPath {
			continue // it is refused
		}
		for dir := m.at; dir != "/"; dir = path.Dir(dir) {
			if _, known := t.ways[dir]; known {
				break
			}
			t.ways[dir] = m.at
		}
	}
	return t
}

func (m mountEntry) fileSystem() [2]uint32 { return [2]uint32{m.GetRootDev(), m.GetFstype()} }

// over returns the mount that a path is in, if that is no mount itself.
func (t *mountTree) over(at string) (mountEntry, bool) {
	for at != "/" && len(at) <= maxPath {
		at = path.Dir(at)
		if m, ok := t.at[at]; ok {
			return m, true
		}
	}
	return mountEntry{}, false
}

// shares tells whether a mount is of a file system that another one is of.
func (t *mountTree) shares(m mountEntry) bool {
	n := t.file[m.fileSystem()]
	if m.external() == "" {
		n-- // itself
	}
	return n > 0
}

// onItself: runtimes mount a path that is to be read-only on itself.
func (t *mountTree) onItself(m mountEntry) bool {
	parent, ok := t.over(m.at)
	return ok && parent.GetRootDev() == m.GetRootDev() &&
		path.Join("/", m.GetRoot()) == path.Join("/", parent.GetRoot(), m.at[len(trimRoot(parent.at)):]) &&
		m.external() == "" && m.GetFlags()&unix.MS_RDONLY != 0
}

// trimRoot makes a folder the prefix of what is in it.
func trimRoot(dir string) string {
	if dir == "/" {
		return ""
	}
	return dir
}

// checkTree looks at the numbers by which CRIU makes a tree of a list of mounts,
// and mounts in its order: one that is given the wrong parent is made too early,
// and hidden by what belongs below it. Each path has one mount (compareMounts), so
// each has one parent, and there is no cycle if that is the one by path.
func (c *checker) checkTree(all []mountEntry, ids map[uint32]bool) {
	byID := map[uint32]mountEntry{}
	for _, m := range all {
		if id := m.GetMntId(); ids[id] {
			c.refuse("the mount at %s has the number %d of another one", quote(m.at), id)
		}
		ids[m.GetMntId()] = true
		byID[m.GetMntId()] = m
	}
	tree := newMountTree(all)
	for _, m := range all {
		parent, known := byID[m.GetParentMntId()]
		over, below := tree.over(m.at)
		switch {
		case !below && known && parent.GetMntId() != m.GetMntId():
			c.refuse("the root mount is below that at %s", quote(parent.at))
		case below && !known:
			c.refuse("the mount at %s is below none", quote(m.at))
		case below && parent.GetMntId() != over.GetMntId():
			c.refuse("the mount at %s is below that at %s, not that at %s", quote(m.at), quote(parent.at), quote(over.at))
		}
	}
}

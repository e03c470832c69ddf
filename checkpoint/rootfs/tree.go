package rootfs

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// TreeLayer is the writable layer of a container that has a whole tree of its
// own, as on the native snapshotter: what is different from the tree it began
// with. It is a capture.Layer.
//
// Files are compared by content, whatever their times say, and by all that a
// layer carries. continuity's Changes, made for the same, passes over folders of
// which only the time or an extended attribute has changed, and over files that
// have become hard links, or are none any more.
//
// Nothing may change in the trees while they are compared.
type TreeLayer struct {
	Root string // the tree as it is now, or a Copy of it
	Base string // the tree that the container was started on
}

// WriteLayer writes the layer.
func (l TreeLayer) WriteLayer(ctx context.Context, w io.Writer) error {
	if err := l.write(ctx, w); err != nil {
		return fmt.Errorf("write the layer of %s over %s: %w", l.Root, l.Base, err)
	}
	return nil
}

func (l TreeLayer) write(ctx context.Context, w io.Writer) error {
	base, err := openRoot(l.Base)
	if err != nil {
		return err
	}
	defer base.close()
	root, err := openRoot(l.Root)
	if err != nil {
		return err
	}
	defer root.close()
	out := newWriter(w)
	if err := diffTrees(ctx, base, root, func(c *change) error { return out.add(ctx, c) }); err != nil {
		return err
	}
	return out.close()
}

// diffTrees yields what it takes to make base into root.
func diffTrees(ctx context.Context, base, root *folder, yield func(*change) error) error {
	d := &differ{yield: yield}
	var err error
	if d.baseLinks, err = findLinks(ctx, base); err != nil {
		return err
	}
	if d.rootLinks, err = findLinks(ctx, root); err != nil {
		return err
	}
	baseSt, err := base.self()
	if err != nil {
		return err
	}
	rootSt, err := root.self()
	if err != nil {
		return err
	}
	return d.both(ctx, &change{in: base, name: ".", st: baseSt}, &change{in: root, name: ".", st: rootSt}, base, root)
}

type differ struct {
	yield                func(*change) error
	baseLinks, rootLinks links
	// pending are the folders on the way down that are the same in both trees.
	// They are yielded all the same before something in them is, as what is
	// done to their content changes their times.
	pending []*change
}

func (d *differ) emit(c *change) error {
	for _, parent := range d.pending {
		if err := d.yield(parent); err != nil {
			return err
		}
	}
	d.pending = d.pending[:0]
	return d.yield(c)
}

// both compares a folder that both trees have.
func (d *differ) both(ctx context.Context, baseEntry, rootEntry *change, base, root *folder) error {
	if err := ended(ctx); err != nil {
		return err
	}
	same, err := d.same(ctx, baseEntry, rootEntry)
	if err != nil {
		return err
	}
	if same {
		d.pending = append(d.pending, rootEntry)
		defer func() {
			if n := len(d.pending); n > 0 { // nothing below has changed
				d.pending = d.pending[:n-1]
			}
		}()
	} else if err := d.emit(rootEntry); err != nil {
		return err
	}
	old, err := d.list(base)
	if err != nil {
		return err
	}
	now, err := d.list(root)
	if err != nil {
		return err
	}
	for i := range old {
		if _, ok := find(now, old[i].name); !ok {
			if err := d.emit(&change{in: root, name: old[i].name, removed: true}); err != nil {
				return err
			}
		}
	}
	for i := range now {
		c := &now[i]
		if err := c.checkName(); err != nil {
			return err
		}
		was, ok := find(old, c.name)
		switch {
		case ok && isFolder(&was.st) && isFolder(&c.st):
			err = descend(root, c.name, func(root *folder) error {
				return descend(base, c.name, func(base *folder) error {
					return d.both(ctx, was, c, base, root)
				})
			})
		case !ok || kind(&was.st) != kind(&c.st):
			err = d.added(ctx, c)
		default:
			var same bool
			if same, err = d.same(ctx, was, c); err == nil && !same {
				err = d.emit(c)
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// added yields a file or a folder with all that is in it.
func (d *differ) added(ctx context.Context, c *change) error {
	if err := ended(ctx); err != nil {
		return err
	}
	if err := c.checkName(); err != nil {
		return err
	}
	if err := d.emit(c); err != nil || !isFolder(&c.st) {
		return err
	}
	return descend(c.in, c.name, func(in *folder) error {
		entries, err := d.list(in)
		if err != nil {
			return err
		}
		for i := range entries {
			if err := d.added(ctx, &entries[i]); err != nil {
				return err
			}
		}
		return nil
	})
}

func descend(in *folder, name string, f func(*folder) error) error {
	sub, err := in.open(name)
	if err != nil {
		return err
	}
	defer sub.close()
	return f(sub)
}

// list returns what is in a folder and can be in a layer, sorted.
func (d *differ) list(in *folder) ([]change, error) {
	names, err := in.names()
	if err != nil {
		return nil, err
	}
	entries := make([]change, 0, len(names))
	for _, name := range names {
		st, err := in.stat(name)
		if err != nil {
			return nil, err
		}
		if kind(&st) != unix.S_IFSOCK {
			entries = append(entries, change{in: in, name: name, st: st})
		}
	}
	return entries, nil
}

func find(entries []change, name string) (*change, bool) {
	i, ok := slices.BinarySearchFunc(entries, name, func(c change, name string) int {
		return strings.Compare(c.name, name)
	})
	if !ok {
		return nil, false
	}
	return &entries[i], true
}

// same tells whether a layer would say the same of two files of one kind.
func (d *differ) same(ctx context.Context, a, b *change) (bool, error) {
	if a.st.Mode != b.st.Mode || a.st.Uid != b.st.Uid || a.st.Gid != b.st.Gid || a.st.Mtim != b.st.Mtim {
		return false, nil
	}
	switch kind(&a.st) {
	case unix.S_IFREG:
		if a.st.Size != b.st.Size {
			return false, nil
		}
	case unix.S_IFCHR, unix.S_IFBLK:
		if a.st.Rdev != b.st.Rdev {
			return false, nil
		}
	case unix.S_IFLNK:
		was, err := a.in.readlink(a.name)
		if err != nil {
			return false, err
		}
		is, err := b.in.readlink(b.name)
		if err != nil || was != is {
			return false, err
		}
	}
	if !isFolder(&a.st) && !slices.Equal(d.baseLinks.of(a), d.rootLinks.of(b)) {
		return false, nil
	}
	had, err := xattrsAt(a.in.proc(a.name)).carried()
	if err != nil {
		return false, a.in.fail("read the extended attributes of", a.name, err)
	}
	has, err := xattrsAt(b.in.proc(b.name)).carried()
	if err != nil {
		return false, b.in.fail("read the extended attributes of", b.name, err)
	}
	if !maps.Equal(had, has) {
		return false, nil
	}
	if kind(&a.st) == unix.S_IFREG && a.st.Size > 0 {
		return sameContent(ctx, a, b)
	}
	return true, nil
}

func sameContent(ctx context.Context, a, b *change) (bool, error) {
	var files [2]*os.File
	for i, c := range []*change{a, b} {
		fd, err := c.in.openFile(c.name)
		if err != nil {
			return false, err
		}
		files[i] = os.NewFile(uintptr(fd), c.path())
		defer files[i].Close()
	}
	bufA, bufB := buffers.Get().(*[]byte), buffers.Get().(*[]byte)
	defer buffers.Put(bufA)
	defer buffers.Put(bufB)
	for left := a.st.Size; left > 0; {
		if err := ended(ctx); err != nil {
			return false, err
		}
		n := min(left, smallFile)
		if _, err := io.ReadFull(files[0], (*bufA)[:n]); err != nil {
			return false, a.in.fail("read", a.name, err)
		}
		if _, err := io.ReadFull(files[1], (*bufB)[:n]); err != nil {
			return false, b.in.fail("read", b.name, err)
		}
		if !bytes.Equal((*bufA)[:n], (*bufB)[:n]) {
			return false, nil
		}
		left -= n
	}
	return true, nil
}

// links are the files of a tree that have several names: all of them, sorted.
type links map[inode][]string

func (l links) of(c *change) []string {
	if names := l[inodeOf(&c.st)]; len(names) > 0 {
		return names
	}
	return []string{c.path()}
}

func findLinks(ctx context.Context, root *folder) (links, error) {
	found := links{}
	var walk func(*folder) error
	walk = func(in *folder) error {
		if err := ended(ctx); err != nil {
			return err
		}
		names, err := in.names()
		if err != nil {
			return err
		}
		for _, name := range names {
			st, err := in.stat(name)
			if err != nil {
				return err
			}
			if isFolder(&st) {
				err = descend(in, name, walk)
			} else if st.Nlink > 1 {
				found[inodeOf(&st)] = append(found[inodeOf(&st)], in.at(name))
			}
			if err != nil {
				return err
			}
		}
		return nil
	}
	return found, walk(root)
}

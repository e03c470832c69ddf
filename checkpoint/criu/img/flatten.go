package img

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sort"

	"google.golang.org/protobuf/proto"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/pagemap"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/layout"
)

// A dump that builds on a pre-dump or on another checkpoint has the pages that were
// written to since, and says of the others that its parent has them. Flatten puts all
// of them into the one folder: whatever reads, checks, stores or ships a checkpoint has
// to know one kind only, and none depends on another that somebody may remove.

// Flatten makes the checkpoint in dir one that needs no parent. chain are the
// folders of the pre-dumps that it builds on, the oldest first, each of which
// builds on the one before. base is the checkpoint that the first of them builds on, or
// dir itself without pre-dumps; nil: there is none. After an error dir is a whole
// checkpoint still, with the chain and base, of which it may need less.
func Flatten(dir string, base *Lists, chain []string) error {
	ids, err := PageLists(dir)
	if err != nil {
		return err
	}
	highest := slices.Max(append(slices.Collect(maps.Values(ids)), 0))
	for name, id := range ids {
		l, err := openPageList(dir, name)
		if err == nil {
			err = l.flatten(dir, name, highest+id, base, chain)
			l.close()
		}
		if err != nil {
			return fmt.Errorf("put memory of the dumps before into %s: %w", name, err)
		}
	}
	if err := os.Remove(filepath.Join(dir, layout.Parent)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// Lists are the lists of pages in a folder with the files that have the pages, read and
// held open: who removes or replaces them afterwards takes nothing away from a container
// whose memory is in part there only.
type Lists struct {
	dir    string
	byName map[string]*pageList
}

// OpenLists opens the lists in a folder, of which the path has no links. None of the pages
// may be in a parent. Close the lists.
func OpenLists(dir string) (*Lists, error) {
	lists := &Lists{dir: dir, byName: map[string]*pageList{}}
	err := eachPageList(dir, func(name string, l *pageList) error {
		lists.byName[name] = l
		if l.inParent() {
			return fault.Invalid("%s: some of the pages are in a parent", name)
		}
		return nil
	})
	if err != nil {
		lists.Close()
		return nil, err
	}
	return lists, nil
}

// Dir is the folder.
func (l *Lists) Dir() string { return l.dir }

// Close closes the files.
func (l *Lists) Close() {
	for _, list := range l.byName {
		list.close()
	}
}

// PageLists returns the lists of pages in a folder, and the number of the image that
// each refers to.
func PageLists(dir string) (map[string]uint32, error) {
	ids := map[string]uint32{}
	err := eachPageList(dir, func(name string, l *pageList) error {
		ids[name] = l.id
		l.close()
		return nil
	})
	return ids, err
}

// eachPageList calls fn, which owns the list, with each list in a folder.
func eachPageList(dir string, fn func(name string, l *pageList) error) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !layout.Pagemap.Has(e.Name()) {
			continue
		}
		l, err := openPageList(dir, e.Name())
		if err != nil {
			return err
		}
		if err := fn(e.Name(), l); err != nil {
			return err
		}
	}
	return nil
}

// flatten makes an image with the number id of all the pages in a list, and then a
// list that refers to it: at any moment there are a list and its pages.
func (l *pageList) flatten(dir, name string, id uint32, base *Lists, chain []string) (err error) {
	if !l.inParent() {
		return nil
	}
	var parents []*pageList
	for _, parent := range slices.Backward(chain) {
		list, err := openPageList(parent, name)
		if errors.Is(err, fs.ErrNotExist) {
			base = nil // the process is younger
			break
		}
		if err != nil {
			return fmt.Errorf("%s: %w", filepath.Base(parent), err)
		}
		defer list.close()
		parents = append(parents, list)
	}
	if base != nil && base.byName[name] != nil {
		parents = append(parents, base.byName[name])
	}
	out, err := os.OpenFile(filepath.Join(dir, layout.Pages.Name(id)), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := out.Close(); err == nil {
			err = cerr
		}
		if err == nil {
			err = rewritePageList(filepath.Join(dir, name), id)
		}
		if err != nil {
			_ = os.Remove(out.Name())
		} else if l.pages != nil {
			err = os.Remove(l.pages.Name())
		}
	}()
	w := &pageWriter{out: out, buf: make([]byte, 0, 1<<20)}
	for _, r := range l.runs {
		if r.Present() || r.InParent() {
			if err := l.copy(w, r.Addr, r.end(), parents); err != nil {
				return err
			}
		}
	}
	return w.flush()
}

// pageWriter writes what it takes from many places of other files.
type pageWriter struct {
	out *os.File
	buf []byte
}

// take takes n bytes of a file.
func (w *pageWriter) take(from *os.File, at, n int64) error {
	for n > 0 {
		have := len(w.buf)
		part := min(n, int64(cap(w.buf)-have))
		if _, err := from.ReadAt(w.buf[have:have+int(part)], at); err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return fmt.Errorf("%s: %w", filepath.Base(from.Name()), err)
		}
		w.buf = w.buf[:have+int(part)]
		at, n = at+part, n-part
		if len(w.buf) == cap(w.buf) {
			if err := w.flush(); err != nil {
				return err
			}
		}
	}
	return nil
}

func (w *pageWriter) flush() error {
	_, err := w.out.Write(w.buf)
	w.buf = w.buf[:0]
	return err
}

// pageList is a list of pages, and the file that has those of them that are not in
// the parent.
type pageList struct {
	id    uint32
	runs  []placedRun
	pages *os.File
}

// placedRun knows where in the file its pages are, in bytes.
type placedRun struct {
	PageRun
	at int64
}

func (r placedRun) end() uint64 { return r.Addr + r.Pages*uint64(os.Getpagesize()) }

func openPageList(dir, name string) (*pageList, error) {
	l := &pageList{}
	at := int64(0)
	err := EachIn(dir, name, "PAGEMAP", Pagemap(&l.id, func(r PageRun) error {
		if n := len(l.runs); n > 0 && l.runs[n-1].end() > r.Addr {
			return fault.Invalid("its runs of pages are not in order")
		}
		if r.newer {
			return fault.Invalid("of a CRIU that is newer than this program")
		}
		l.runs = append(l.runs, placedRun{r, at})
		if r.Present() {
			at += int64(r.Pages) * int64(os.Getpagesize())
		}
		return nil
	}))
	if err != nil {
		return nil, err
	}
	if l.pages, err = capture.OpenPlain(filepath.Join(dir, layout.Pages.Name(l.id))); errors.Is(err, fs.ErrNotExist) && at == 0 {
		err = nil // CRIU makes none for no pages
	}
	return l, err
}

// inParent tells whether some of the pages are in a parent.
func (l *pageList) inParent() bool {
	return slices.ContainsFunc(l.runs, func(r placedRun) bool { return r.InParent() })
}

func (l *pageList) close() {
	if l.pages != nil {
		l.pages.Close()
	}
}

// copy writes the pages from an address to another, each from the youngest of l and
// parents that has it.
func (l *pageList) copy(w *pageWriter, addr, end uint64, parents []*pageList) error {
	missing := func() error { return fault.Invalid("the page at %x is in none of the images", addr) }
	first := sort.Search(len(l.runs), func(i int) bool { return l.runs[i].end() > addr })
	for _, r := range l.runs[first:] {
		if addr == end || r.Addr > addr {
			break
		}
		stop := min(r.end(), end)
		var err error
		switch {
		case r.Present():
			err = w.take(l.pages, r.at+int64(addr-r.Addr), int64(stop-addr))
		case r.InParent() && len(parents) > 0:
			err = parents[0].copy(w, addr, stop, parents[1:])
		default:
			err = missing()
		}
		if err != nil {
			return err
		}
		addr = stop
	}
	if addr < end {
		return missing()
	}
	return nil
}

// rewritePageList makes a list one that has all its pages in the image with a number.
func rewritePageList(path string, id uint32) error {
	first := true
	return Rewrite(path, func(msg []byte, put func([]byte)) error {
		var m proto.Message = &pagemap.PagemapHead{PagesId: &id}
		if !first {
			var e pagemap.PagemapEntry
			if err := Decode(msg, &e); err != nil {
				return err
			}
			if flags := pageFlags(&e); flags&pagesParent != 0 {
				e.InParent = nil
				e.Flags = proto.Uint32(flags&^pagesParent | pagesPresent)
			}
			m = &e
		}
		first = false
		msg, err := (proto.MarshalOptions{AllowPartial: true}).Marshal(m)
		put(msg)
		return err
	})
}

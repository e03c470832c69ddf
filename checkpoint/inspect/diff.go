package inspect

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"sort"

	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/layout"
)

// ProcessDiff says how the memory of a process differs between two checkpoints.
// Sizes are in bytes.
type ProcessDiff struct {
	PID  uint32 `json:"pid"`
	Comm string `json:"comm"`
	// In is "both", or "first" or "second" if only that has the process.
	In string `json:"in"`
	// Changed is what both hold, with other content; Added is what only the
	// second holds, Removed what only the first does.
	Changed int64 `json:"changed"`
	Added   int64 `json:"added"`
	Removed int64 `json:"removed"`
	Same    int64 `json:"same"`
	// Mappings are those of the second that differ.
	Mappings []MappingDiff `json:"mappings,omitempty"`
}

// MappingDiff is ProcessDiff for one mapping.
type MappingDiff struct {
	Start   Address `json:"start"`
	Kind    string  `json:"kind"`
	File    string  `json:"file,omitempty"`
	Changed int64   `json:"changed"`
	Added   int64   `json:"added"`
}

// Diff compares the memory in two folders of images page by page, process by
// process. Processes are the same if they have the same ID. Errors are those of
// Inspect. Shared memory, which lies elsewhere, is not compared.
func Diff(ctx context.Context, first, second string) ([]ProcessDiff, error) {
	a, err := openDiff(ctx, first)
	if err != nil {
		return nil, err
	}
	defer a.folder.close()
	b, err := openDiff(ctx, second)
	if err != nil {
		return nil, err
	}
	defer b.folder.close()
	diffs := []ProcessDiff{}
	for _, p := range b.report.Processes {
		old := find(a.report.Processes, p.PID)
		if old == nil {
			diffs = append(diffs, ProcessDiff{PID: p.PID, Comm: p.Comm, In: "second", Added: p.Memory.Dumped})
			continue
		}
		d := ProcessDiff{PID: p.PID, Comm: p.Comm, In: "both"}
		if err := d.compare(ctx, a, b, old, &p); err != nil {
			return nil, fmt.Errorf("compare the memory of process %d: %w", p.PID, err)
		}
		diffs = append(diffs, d)
	}
	for _, p := range a.report.Processes {
		if find(b.report.Processes, p.PID) == nil {
			diffs = append(diffs, ProcessDiff{PID: p.PID, Comm: p.Comm, In: "first", Removed: p.Memory.Dumped})
		}
	}
	return diffs, nil
}

// openDiff reads a checkpoint and leaves the folder open.
func openDiff(ctx context.Context, dir string) (*reader, error) {
	f, err := openFolder(dir)
	if err == nil {
		r := newReader(ctx, f, Options{})
		if err = r.read(); err == nil {
			return r, nil
		}
		f.close()
	}
	return nil, fmt.Errorf("inspect checkpoint %s: %w", dir, err)
}

func find(all []Process, pid uint32) *Process {
	i := slices.IndexFunc(all, func(p Process) bool { return p.PID == pid })
	if i < 0 {
		return nil
	}
	return &all[i]
}

// run is pages in a row that were dumped.
type run struct {
	start uint64 // address
	size  int64  // bytes
	at    int64  // in the image of pages
}

// runs are the dumped pages of a process by address, and the image that has
// them, which is nil if there are none.
func (r *reader) runs(p *Process) (list []run, pages *os.File, err error) {
	if len(p.Memory.Mappings) == 0 {
		return nil, nil, nil
	}
	var image uint32
	err = r.eachRun(layout.Pagemap.Name(p.PID), p.Memory.PageSize, func(id uint32, start uint64, size, at int64) error {
		image = id
		list = append(list, run{start, size, at})
		return r.take(1)
	})
	if err != nil || len(list) == 0 {
		return nil, nil, err
	}
	slices.SortFunc(list, func(a, b run) int { return cmp.Compare(a.start, b.start) })
	for i := 1; i < len(list); i++ {
		if list[i-1].start+uint64(list[i-1].size) > list[i].start {
			return nil, nil, fault.Invalid("pagemap-%d.img: lists the same memory again", p.PID)
		}
	}
	pages, err = r.folder.open(layout.Pages.Name(image))
	if errors.Is(err, fs.ErrNotExist) {
		err = fault.Invalid("pages-%d.img: missing; pagemap-%d.img refers to it", image, p.PID)
	}
	return list, pages, err
}

func (d *ProcessDiff) compare(ctx context.Context, a, b *reader, old, now *Process) error {
	if old.Memory.PageSize != now.Memory.PageSize {
		return fault.Invalid("the pages have different sizes")
	}
	was, wasPages, err := a.runs(old)
	if err != nil {
		return err
	}
	is, isPages, err := b.runs(now)
	if err != nil {
		return err
	}
	defer wasPages.Close()
	defer isPages.Close()
	c := comparison{d: d, page: now.Memory.PageSize, was: wasPages, is: isPages, areas: now.Memory.Mappings}
	c.byArea = make([]MappingDiff, len(c.areas))
	for len(was) > 0 || len(is) > 0 {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		// The part of the two lists that comes first, and is in one of them or
		// in both.
		switch {
		case len(is) == 0 || len(was) > 0 && was[0].start < is[0].start:
			n := was[0].size
			if len(is) > 0 {
				n = min(n, int64(min(is[0].start-was[0].start, 1<<62)))
			}
			d.Removed += n
			was = advance(was, n)
		case len(was) == 0 || is[0].start < was[0].start:
			n := is[0].size
			if len(was) > 0 {
				n = min(n, int64(min(was[0].start-is[0].start, 1<<62)))
			}
			c.count(is[0].start, n, true)
			is = advance(is, n)
		default:
			n := min(was[0].size, is[0].size, 1<<20)
			if err := c.pages(was[0].at, is[0].at, is[0].start, n); err != nil {
				return err
			}
			was, is = advance(was, n), advance(is, n)
		}
	}
	for i, m := range c.byArea {
		if m.Changed+m.Added > 0 {
			m.Start, m.Kind, m.File = c.areas[i].Start, c.areas[i].Kind, c.areas[i].File
			d.Mappings = append(d.Mappings, m)
		}
	}
	return nil
}

// advance drops n bytes.
func advance(list []run, n int64) []run {
	if n >= list[0].size {
		return list[1:]
	}
	list[0].start += uint64(n)
	list[0].at += n
	list[0].size -= n
	return list
}

// comparison is one process's.
type comparison struct {
	d       *ProcessDiff
	page    int64
	was, is *os.File
	areas   []Mapping
	byArea  []MappingDiff // as areas
	a, b    []byte
}

// pages compares n bytes at two places.
func (c *comparison) pages(was, is int64, address uint64, n int64) error {
	if int64(len(c.a)) < n {
		c.a, c.b = make([]byte, n), make([]byte, n)
	}
	if _, err := c.was.ReadAt(c.a[:n], was); err != nil {
		return fault.Invalid("%s: truncated at %d", c.was.Name(), was)
	}
	if _, err := c.is.ReadAt(c.b[:n], is); err != nil {
		return fault.Invalid("%s: truncated at %d", c.is.Name(), is)
	}
	for i := int64(0); i < n; i += c.page {
		end := min(i+c.page, n)
		if bytes.Equal(c.a[i:end], c.b[i:end]) {
			c.d.Same += end - i
		} else {
			c.count(address+uint64(i), end-i, false)
		}
	}
	return nil
}

// count notes that memory was added, or else changed.
func (c *comparison) count(address uint64, n int64, added bool) {
	if added {
		c.d.Added += n
	} else {
		c.d.Changed += n
	}
	i := sort.Search(len(c.areas), func(i int) bool { return uint64(c.areas[i].Start)+uint64(c.areas[i].Size) > address })
	for end := address + uint64(n); i < len(c.areas) && uint64(c.areas[i].Start) < end; i++ {
		from := max(address, uint64(c.areas[i].Start))
		to := min(end, uint64(c.areas[i].Start)+uint64(c.areas[i].Size))
		if to <= from {
			continue
		}
		if added {
			c.byArea[i].Added += int64(to - from)
		} else {
			c.byArea[i].Changed += int64(to - from)
		}
	}
}

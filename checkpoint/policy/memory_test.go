package policy

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pagemap"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/vma"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// area is a private anonymous mapping.
func area(start, end uint64) *vma.VmaEntry {
	return filled(&vma.VmaEntry{Start: &start, End: &end, Prot: u32(3), Flags: u32(unix.MAP_PRIVATE | unix.MAP_ANONYMOUS),
		Status: u32(areaRegular | areaAnonPrivate), Fd: proto.Int64(-1)})
}

func guard(start, end uint64) *vma.VmaEntry {
	return filled(&vma.VmaEntry{Start: &start, End: &end, Status: u32(areaGuard), Fd: proto.Int64(-1)})
}

func changed(v *vma.VmaEntry, fn func(*vma.VmaEntry)) *vma.VmaEntry { fn(v); return v }

// TestMemory lays the memory of a process out anew.
func TestMemory(t *testing.T) {
	const top = 0x7f0000000000
	last := func() *vma.VmaEntry { return area(top, top+0x1000) }
	with := func(fn func(*vma.VmaEntry)) []*vma.VmaEntry {
		return []*vma.VmaEntry{changed(area(0x10000, 0x20000), fn), last()}
	}
	file := func(start, end uint64) *vma.VmaEntry {
		return changed(area(start, end), func(v *vma.VmaEntry) {
			*v.Flags, *v.Status, *v.Shmid, *v.Prot = unix.MAP_PRIVATE, areaRegular|areaFilePrivate, 1, 5
		})
	}
	for _, tc := range []struct {
		name  string
		areas []*vma.VmaEntry
		want  string // "" if it passes
	}{
		{"honest", []*vma.VmaEntry{area(0x10000, 0x20000), last()}, ""},
		{"with guards", []*vma.VmaEntry{area(0x10000, 0x20000), area(0x20000, 0x30000), last(), guard(0x1f000, 0x21000), guard(top, top+0x1000)}, ""},
		{"the page of system calls", []*vma.VmaEntry{last(), changed(area(vsyscall, vsyscall+0x1000), func(v *vma.VmaEntry) {
			*v.Status = areaVsyscall | areaAnonPrivate
		})}, ""},
		{"over the restorer, by a guard", []*vma.VmaEntry{file(0x10000, 0x11000), guard(0x300000, 0x301000), file(0x11000, 0x201000)}, "memory at address 0x300000 is a guard of no mapping"},
		{"after a guard", []*vma.VmaEntry{area(0x10000, 0x20000), guard(0x10000, 0x11000), last()}, "memory at address 0x7f0000000000 comes after guards"},
		{"over the restorer, as the last", []*vma.VmaEntry{file(0x10000, 0x20000), file(0x20000, 0x400000)}, "no gap that is large enough for CRIU's own code"},
		{"over the restorer, as the last before guards", []*vma.VmaEntry{file(0x10000, 0x20000), file(0x20000, 0x400000), guard(0x20000, 0x21000)}, "no gap that is large enough"},
		{"all addresses", []*vma.VmaEntry{area(0x10000, top), last()}, "no gap that is large enough"},
		{"copies that fill the gap", []*vma.VmaEntry{area(0x10000, 0x500000000000), last()}, "no gap that is large enough"},
		{"none", nil, "has no memory"},
		{"out of order", []*vma.VmaEntry{last(), area(0x10000, 0x20000)}, "memory at address 0x10000 is not above the one before it"},
		{"overlap", []*vma.VmaEntry{area(0x10000, 0x20000), area(0x1f000, 0x30000), last()}, "memory at address 0x1f000 is not above"},
		{"twice", []*vma.VmaEntry{area(0x10000, 0x20000), area(0x10000, 0x20000), last()}, "memory at address 0x10000 is not above"},
		{"guards out of order", []*vma.VmaEntry{area(0x10000, 0x20000), last(), guard(0x12000, 0x13000), guard(0x10000, 0x11000)}, "is a guard that is not in order"},
		{"guard beyond its mapping", []*vma.VmaEntry{area(0x10000, 0x20000), last(), guard(0x1f000, 0x21000)}, "is a guard of no mapping"},
		{"guard that is a mapping", []*vma.VmaEntry{changed(area(0x10000, 0x20000), func(v *vma.VmaEntry) { *v.Status |= areaGuard }), last()}, "is a guard with the status"},
		{"part of a page", with(func(v *vma.VmaEntry) { *v.End = 0x10800 }), "is not of whole pages"},
		{"offset of part of a page", with(func(v *vma.VmaEntry) { *v.Pgoff = 1 }), "is not of whole pages"},
		{"ends before it starts", with(func(v *vma.VmaEntry) { *v.End = 0x10000 }), "ends at 0x10000"},
		{"the kernel's", []*vma.VmaEntry{area(0xffff800000000000, 0xffff800000001000)}, "beyond what a process can have"},
		{"vsyscall elsewhere", with(func(v *vma.VmaEntry) { *v.Status = areaVsyscall | areaAnonPrivate }), "is not where the kernel has its page of system calls"},
		{"mapped before", with(func(v *vma.VmaEntry) { *v.Status |= 1 << 30 }), "has the status"},
		{"to be closed", with(func(v *vma.VmaEntry) { *v.Status |= 1 << 28 }), "has the status"},
		{"plugin's", with(func(v *vma.VmaEntry) { *v.Status |= 1 << 27 }), "has the status"},
		{"CRIU's descriptor", with(func(v *vma.VmaEntry) { *v.Fd, *v.Flags = 121, unix.MAP_PRIVATE }), "is of CRIU's own descriptor 121"},
		{"fixed", with(func(v *vma.VmaEntry) { *v.Flags |= unix.MAP_FIXED }), "has the flags"},
		{"protection", with(func(v *vma.VmaEntry) { *v.Prot |= unix.PROT_GROWSDOWN }), "has the protection"},
		{"freed", with(func(v *vma.VmaEntry) { v.Madv = proto.Uint64(1 << unix.MADV_REMOVE) }), "has the advice"},
		{"two kinds", with(func(v *vma.VmaEntry) { *v.Status |= areaFileShared }), "is of several kinds"},
		{"no kind", with(func(v *vma.VmaEntry) { *v.Status = areaRegular }), "is of no kind"},
		{"shared, and private", with(func(v *vma.VmaEntry) { *v.Flags = unix.MAP_SHARED | unix.MAP_ANONYMOUS }), "is of another kind"},
		{"emptied file", with(func(v *vma.VmaEntry) { v.Fdflags = u32(unix.O_RDWR | unix.O_TRUNC) }), "which would create or empty it"},
		{"made file", with(func(v *vma.VmaEntry) { v.Fdflags = u32(unix.O_RDWR | unix.O_CREAT) }), "which would create or empty it"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newForgery(t)
			one(f, "mm-6.img", "MM", func(m *mm.MmEntry) { m.Vmas = tc.areas })
			f.pages(nil)
			if tc.want == "" {
				f.judged("")
				return
			}
			f.refused("process 6 (", tc.want)
		})
	}
}

// pages replaces the runs of pages of the process.
func (f *forgery) pages(runs []*pagemap.PagemapEntry) {
	f.t.Helper()
	msgs := []proto.Message{&pagemap.PagemapHead{PagesId: u32(1)}}
	size := int64(0)
	for _, r := range runs {
		msgs = append(msgs, filled(r))
		size += int64(r.GetNrPages()) << 12
	}
	f.write("pagemap-6.img", "PAGEMAP", msgs...)
	must(f.t, os.Truncate(filepath.Join(f.dir, "pages-1.img"), size))
}

func TestPages(t *testing.T) {
	run := func(addr, pages uint64) *pagemap.PagemapEntry {
		return &pagemap.PagemapEntry{Vaddr: &addr, NrPages: &pages, Flags: u32(4)}
	}
	for _, tc := range []struct {
		name string
		runs []*pagemap.PagemapEntry
		want string
	}{
		{"honest", []*pagemap.PagemapEntry{run(0x401000, 1), run(0x5de000, 1)}, ""},
		{"over two mappings", []*pagemap.PagemapEntry{run(0x400000, 8)}, ""},
		{"outside", []*pagemap.PagemapEntry{run(0x10000, 1)}, "pagemap-6.img: the pages at 0x10000 are outside of the process's memory"},
		{"beyond the end", []*pagemap.PagemapEntry{run(0x4f55000, 4096)}, "pages at 0x4f55000 are outside"},
		{"out of order", []*pagemap.PagemapEntry{run(0x402000, 1), run(0x401000, 1)}, "pages at 0x401000 are not in order"},
		{"twice", []*pagemap.PagemapEntry{run(0x401000, 2), run(0x402000, 1)}, "pages at 0x402000 are not in order"},
		{"part of a page", []*pagemap.PagemapEntry{run(0x401001, 1)}, "are not in order"},
		{"none", []*pagemap.PagemapEntry{run(0x401000, 0)}, "are not in order"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newForgery(t)
			f.pages(tc.runs)
			f.judged(tc.want)
		})
	}
}

func TestMemoryFields(t *testing.T) {
	for _, tc := range []struct {
		name string
		fn   func(*mm.MmEntry)
		want string
	}{
		{"code", func(m *mm.MmEntry) { *m.MmEndCode = 1 << 63 }, "its code is from"},
		{"data", func(m *mm.MmEntry) { *m.MmStartData = *m.MmEndData + 1 }, "its data is from"},
		{"brk", func(m *mm.MmEntry) { *m.MmBrk = 0 }, "its brk is from"},
		{"stack", func(m *mm.MmEntry) { *m.MmStartStack = 1 << 63 }, "its stack is from"},
		{"arguments", func(m *mm.MmEntry) { *m.MmArgEnd = 1 << 63 }, "its arguments is from"},
		{"environment", func(m *mm.MmEntry) { *m.MmEnvStart = *m.MmEnvEnd + 1 }, "its environment is from"},
		{"auxiliary vector", func(m *mm.MmEntry) { m.MmSavedAuxv = make([]uint64, maxAux+1) }, "an auxiliary vector of 65 words"},
		{"dumpable", func(m *mm.MmEntry) { m.Dumpable = proto.Int32(3) }, "dumpable 3"},
		{"ring", func(m *mm.MmEntry) {
			m.Aios = []*mm.AioRingEntry{{Id: proto.Uint64(0x400000), NrReq: u32(1), RingLen: u32(4096)}}
		}, "a ring of asynchronous I/O at 0x400000, where there is no memory for it"},
		{"ring of another size", func(m *mm.MmEntry) { aio(m, 8192) }, "where there is no memory for it"},
		{"two of one ring", func(m *mm.MmEntry) { aio(m, 4096); m.Aios = append(m.Aios, m.Aios[0]) }, "where there is no memory for it"},
		{"a good ring", func(m *mm.MmEntry) { aio(m, 4096) }, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newForgery(t)
			one(f, "mm-6.img", "MM", tc.fn)
			f.judged(tc.want)
		})
	}
}

// aio gives a process a ring of a page, and CRIU another size of it.
func aio(m *mm.MmEntry, size uint32) {
	v := changed(area(0x10000000, 0x10001000), func(v *vma.VmaEntry) { *v.Status |= areaAIO })
	i := slices.IndexFunc(m.Vmas, func(o *vma.VmaEntry) bool { return o.GetStart() > v.GetStart() })
	m.Vmas = slices.Insert(m.Vmas, i, v)
	m.Aios = []*mm.AioRingEntry{{Id: v.Start, NrReq: u32(1), RingLen: &size}}
}

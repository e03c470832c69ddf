package policy

import (
	"bytes"
	"fmt"
	"os"
	"runtime"
	"sync"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/vma"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/layout"
)

// CRIU lays out the memory of a process with code of its own in it, which runs as
// root: the restorer. It looks for a gap in the list of mappings, and trusts that
// the list is in order. What is mapped over the restorer is run in its place.

// Kinds of mappings, CRIU's include/image.h. Those that CRIU gives a meaning while
// it restores (from bit 27 on) are in no image that it makes.
const (
	areaRegular     = 1 << 0
	areaStack       = 1 << 1
	areaVsyscall    = 1 << 2
	areaVDSO        = 1 << 3
	areaHeap        = 1 << 5
	areaFilePrivate = 1 << 6
	areaFileShared  = 1 << 7
	areaAnonShared  = 1 << 8
	areaAnonPrivate = 1 << 9
	areaSysV        = 1 << 10
	areaSocket      = 1 << 11
	areaVVAR        = 1 << 12
	areaAIO         = 1 << 13
	areaMemfd       = 1 << 14
	areaShadowStack = 1 << 15
	areaGuard       = 1 << 16 // not a mapping, but what MADV_GUARD_INSTALL did to one
	areaUprobes     = 1 << 17

	areasKnown = 1<<18 - 1&^(1<<4)
)

// mapFlags are those of mmap(2) that CRIU finds in smaps.
const mapFlags = unix.MAP_SHARED | unix.MAP_PRIVATE | unix.MAP_DROPPABLE | unix.MAP_ANONYMOUS | unix.MAP_GROWSDOWN |
	unix.MAP_LOCKED | unix.MAP_NORESERVE | unix.MAP_STACK | unix.MAP_HUGETLB | 0x3f<<26 // the size of huge pages

// adviceKnown are the kinds of madvise(2) that smaps tells of. Others free memory.
const adviceKnown = 1<<unix.MADV_RANDOM | 1<<unix.MADV_SEQUENTIAL | 1<<unix.MADV_DONTFORK | 1<<unix.MADV_MERGEABLE | 1<<unix.MADV_HUGEPAGE |
	1<<unix.MADV_NOHUGEPAGE | 1<<unix.MADV_DONTDUMP | 1<<unix.MADV_WIPEONFORK

// vsyscall is where x86-64 has a page of the kernel's, above all that is the
// process's.
const vsyscall = 0xffffffffff600000

// maxAux is more than the kernel has words in an auxiliary vector.
const maxAux = 64

// userEnd is where the addresses end that a process can have.
var userEnd = sync.OnceValue(func() uint64 {
	if runtime.GOARCH != "amd64" {
		return 1 << 52
	}
	if info, err := os.ReadFile("/proc/cpuinfo"); err == nil && bytes.Contains(info, []byte(" la57 ")) {
		return 1<<56 - uint64(os.Getpagesize())
	}
	return 1<<47 - uint64(os.Getpagesize())
})

// span is a range of addresses.
type span struct{ start, end uint64 }

// addressSpace is the memory of a process: spans of mappings without a gap between them.
type addressSpace struct {
	areas []span
	room  uint64 // the largest gap below the last mapping
	low   uint64 // likewise, below 4 GiB
	own   uint64 // bytes of private mappings
	whole bool   // nothing was refused
}

func (l *addressSpace) add(v *vma.VmaEntry) {
	before := minAddress()
	if n := len(l.areas); n > 0 {
		before = l.areas[n-1].end
	}
	if v.GetStart() > before {
		l.room = max(l.room, v.GetStart()-before)
		if v.GetStart() <= 1<<32 {
			l.low = max(l.low, v.GetStart()-before)
		}
	}
	if n := len(l.areas); n > 0 && l.areas[n-1].end == v.GetStart() {
		l.areas[n-1].end = v.GetEnd()
	} else {
		l.areas = append(l.areas, span{v.GetStart(), v.GetEnd()})
	}
	if v.GetStatus()&(areaFilePrivate|areaAnonPrivate) != 0 {
		l.own += v.GetEnd() - v.GetStart()
	}
}

// restorerFits tells whether CRIU finds a place for its restorer below the last
// mapping: the search does not take that one into account. Besides the process's
// memory, CRIU's own is in the way: a copy of what is private, and some hundred
// others. 32-bit programs have theirs where CRIU, another program, has none.
func (l *addressSpace) restorerFits(threads int) bool {
	const perThread, base = 256 << 10, 256 << 20
	need := base + uint64(threads)*perThread
	most := uint64(2 << 40)
	if runtime.GOARCH != "amd64" {
		most = 8 << 30 // of 39 bits
	}
	return l.room > l.own+most+need || l.low > 1<<30+need
}

// checkMemoryMap looks at the mappings of a process, and all else that tells CRIU
// where to write in it.
func (c *checker) checkMemoryMap(t *task) error {
	var m mm.MmEntry
	if err := c.need(layout.Memory.Name(t.pid), "MM", &m); err != nil {
		return err
	}
	c.checkAreas(t, &m)
	return nil
}

func (c *checker) checkAreas(t *task, m *mm.MmEntry) {
	guards := false
	end := uint64(0) // of the one before
	rings := map[uint64]uint64{}
	guarded := span{}
	var areas []span
	for _, v := range m.GetVmas() {
		if v.GetStart() < minAddress() && !c.grant.any("CAP_SYS_RAWIO") {
			c.refuse("%s: memory at address %#x, below vm.mmap_min_addr, needs CAP_SYS_RAWIO", t, v.GetStart())
			return
		}
		bad := badArea(v)
		switch {
		case bad != "":
		case v.GetStatus() == areaGuard:
			// They come last, in an order of their own, and are within
			// mappings.
			if !guards {
				guards, areas = true, t.memory.areas
			}
			for len(areas) > 0 && areas[0].end <= v.GetStart() {
				areas = areas[1:]
			}
			if v.GetStart() < guarded.end {
				bad = "is a guard that is not in order"
			} else if len(areas) == 0 || v.GetStart() < areas[0].start || v.GetEnd() > areas[0].end {
				bad = "is a guard of no mapping"
			}
			guarded = span{v.GetStart(), v.GetEnd()}
		case guards:
			bad = "comes after guards, which come last"
		case v.GetStart() < end:
			bad = "is not above the one before it"
		case isVsyscall(v):
			end = v.GetEnd()
		default:
			end = v.GetEnd()
			t.memory.add(v)
			if v.GetStatus()&areaAIO != 0 {
				rings[v.GetStart()] = v.GetEnd() - v.GetStart()
			}
		}
		if bad == "" && v.Fdflags != nil {
			bad = badFlags(v.GetFdflags())
		}
		if bad != "" {
			c.refuse("%s: memory at address %#x %s", t, v.GetStart(), bad)
			return
		}
	}
	if len(m.GetVmas()) == 0 {
		c.refuse("%s: has no memory", t) // CRIU would look for an image of an older version
	} else if !t.memory.restorerFits(len(t.threads)) {
		c.refuse("%s: memory has no gap that is large enough for CRIU's own code", t)
	}
	t.memory.whole = true
	c.checkMemoryFields(t, m, rings)
}

func isVsyscall(v *vma.VmaEntry) bool {
	return runtime.GOARCH == "amd64" && v.GetStart() == vsyscall && v.GetEnd() == vsyscall+4096 &&
		v.GetStatus()&areaVsyscall != 0 && v.GetStatus()&(areaRegular|areaGuard) == 0
}

// badArea returns what is wrong with a mapping in itself, or "".
func badArea(v *vma.VmaEntry) string {
	page := uint64(os.Getpagesize())
	status, flags := v.GetStatus(), v.GetFlags()
	kinds := 0
	for _, kind := range []uint32{areaFilePrivate, areaFileShared, areaAnonShared, areaAnonPrivate} {
		if status&kind != 0 {
			kinds++
		}
	}
	private := status&(areaFilePrivate|areaAnonPrivate) != 0
	switch {
	case v.GetStart()%page != 0 || v.GetEnd()%page != 0 || v.GetPgoff()%page != 0:
		return "is not of whole pages"
	case v.GetStart() >= v.GetEnd():
		return fmt.Sprintf("ends at %#x", v.GetEnd())
	case v.GetEnd() > userEnd() && !isVsyscall(v):
		return fmt.Sprintf("ends at %#x, beyond what a process can have", v.GetEnd())
	case status&^areasKnown != 0:
		return fmt.Sprintf("has the status %#x, which is no mapping's", status)
	case v.GetFd() != -1:
		return fmt.Sprintf("is of CRIU's own descriptor %d", v.GetFd())
	case status&areaGuard != 0:
		if status != areaGuard {
			return fmt.Sprintf("is a guard with the status %#x", status)
		}
		return ""
	case status&areaVsyscall != 0 && !isVsyscall(v):
		return "is not where the kernel has its page of system calls"
	case v.GetProt()&^(unix.PROT_READ|unix.PROT_WRITE|unix.PROT_EXEC) != 0:
		return fmt.Sprintf("has the protection %#x", v.GetProt())
	case flags&^mapFlags != 0:
		return fmt.Sprintf("has the flags %#x", flags)
	case v.GetMadv()&^adviceKnown != 0:
		return fmt.Sprintf("has the advice %#x", v.GetMadv())
	case kinds == 0 && status&(areaVsyscall|areaSocket|areaSysV|areaAIO|areaUprobes) == 0:
		return fmt.Sprintf("is of no kind (status %#x)", status)
	case kinds > 1:
		return fmt.Sprintf("is of several kinds (status %#x)", status)
	case kinds == 1 && private != (flags&(unix.MAP_PRIVATE|unix.MAP_SHARED|unix.MAP_DROPPABLE) != unix.MAP_SHARED):
		return fmt.Sprintf("is of another kind (status %#x) than its flags %#x", status, flags)
	}
	return ""
}

// checkMemoryFields looks at the numbers that the kernel keeps of a process's memory,
// and at the rings of asynchronous I/O, which CRIU moves to where they were.
func (c *checker) checkMemoryFields(t *task, m *mm.MmEntry, rings map[uint64]uint64) {
	for _, f := range []struct {
		name       string
		start, end uint64
	}{
		{"code", m.GetMmStartCode(), m.GetMmEndCode()}, {"data", m.GetMmStartData(), m.GetMmEndData()},
		{"brk", m.GetMmStartBrk(), m.GetMmBrk()}, {"arguments", m.GetMmArgStart(), m.GetMmArgEnd()},
		{"environment", m.GetMmEnvStart(), m.GetMmEnvEnd()}, {"stack", m.GetMmStartStack(), m.GetMmStartStack()},
	} {
		if f.start > f.end || f.end > userEnd() {
			c.refuse("%s: its %s is from %#x to %#x", t, f.name, f.start, f.end)
		}
	}
	if n := len(m.GetMmSavedAuxv()); n > maxAux {
		c.refuse("%s: an auxiliary vector of %d words", t, n)
	}
	if d := m.GetDumpable(); d < 0 || d > 2 {
		c.refuse("%s: dumpable %d", t, d)
	}
	for _, ring := range m.GetAios() {
		if size, known := rings[ring.GetId()]; !known || size != uint64(ring.GetRingLen()) {
			c.refuse("%s: a ring of asynchronous I/O at %#x, where there is no memory for it", t, ring.GetId())
		}
		delete(rings, ring.GetId())
	}
}

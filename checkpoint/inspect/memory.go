package inspect

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"sort"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/vma"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/criu/img"
	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/layout"
)

// Flags of mappings, CRIU's include/image.h, VMA_AREA_*.
const (
	areaStack       = 1 << 1
	areaVsyscall    = 1 << 2
	areaVdso        = 1 << 3
	areaHeap        = 1 << 5
	areaFilePrivate = 1 << 6
	areaFileShared  = 1 << 7
	areaAnonShared  = 1 << 8
	areaSysV        = 1 << 10
	areaSocket      = 1 << 11
	areaVvar        = 1 << 12
	areaAIO         = 1 << 13
	areaMemfd       = 1 << 14
)

// readMemory reads the mappings of a process, how much of each was dumped, and
// its arguments.
func (r *reader) readMemory(p *Process) error {
	var m mm.MmEntry
	if err := r.folder.one(layout.Memory.Name(p.PID), "MM", &m); err != nil {
		return missing(err, "process %d has none", p.PID)
	}
	if err := r.take(len(m.GetVmas())); err != nil {
		return err
	}
	p.Exe = r.files.path(m.GetExeFileId())
	p.Memory.PageSize = pageSize(m.GetMmSavedAuxv())
	for _, v := range m.GetVmas() {
		if v.GetEnd() < v.GetStart() || int64(v.GetEnd()-v.GetStart()) < 0 {
			return fault.Invalid("mm-%d.img: a mapping from %x to %x", p.PID, v.GetStart(), v.GetEnd())
		}
		p.Memory.Mappings = append(p.Memory.Mappings, r.mapping(v, &m))
	}
	slices.SortFunc(p.Memory.Mappings, func(a, b Mapping) int { return cmp.Compare(a.Start, b.Start) })
	if err := r.readPages(p, &m); err != nil {
		return err
	}
	if err := r.readShared(p, &m); err != nil {
		return err
	}
	for _, area := range p.Memory.Mappings {
		if area.Kind == "vsyscall" {
			continue // the kernel's, not in the process's half
		}
		p.Memory.Mapped += area.Size
		p.Memory.Dumped += area.Dumped
	}
	return nil
}

// pageSize finds AT_PAGESZ in an auxiliary vector: pairs of a type and a value.
func pageSize(auxv []uint64) int64 {
	for i := 0; i+1 < len(auxv); i += 2 {
		if n := auxv[i+1]; auxv[i] == 6 && n >= 4<<10 && n <= 64<<10 && n&(n-1) == 0 {
			return int64(n)
		}
	}
	return 4 << 10
}

func (r *reader) mapping(v *vma.VmaEntry, m *mm.MmEntry) Mapping {
	a := Mapping{Start: Address(v.GetStart()), Size: int64(v.GetEnd() - v.GetStart()), Kind: "anonymous"}
	letters := []byte("---p")
	for i, bit := range []uint32{unix.PROT_READ, unix.PROT_WRITE, unix.PROT_EXEC} {
		if v.GetProt()&bit != 0 {
			letters[i] = "rwx"[i]
		}
	}
	if v.GetFlags()&unix.MAP_SHARED != 0 {
		letters[3] = 's'
	}
	a.Protection = string(letters)
	switch s := v.GetStatus(); {
	case s&areaMemfd != 0:
		a.Kind = "memfd"
	case s&(areaFilePrivate|areaFileShared) != 0:
		a.Kind, a.File, a.Offset = "file", r.files.path(uint32(v.GetShmid())), int64(v.GetPgoff())
	case s&areaVdso != 0:
		a.Kind = "vdso"
	case s&areaVvar != 0:
		a.Kind = "vvar"
	case s&areaVsyscall != 0:
		a.Kind = "vsyscall"
	case s&areaSysV != 0:
		a.Kind = "sysv"
	case s&areaAnonShared != 0:
		a.Kind = "shared"
	case s&areaAIO != 0:
		a.Kind = "aio"
	case s&areaSocket != 0:
		a.Kind = "socket"
	case s&areaStack != 0, v.GetStart() <= m.GetMmStartStack() && m.GetMmStartStack() < v.GetEnd():
		a.Kind = "stack"
	case s&areaHeap != 0, v.GetStart() < m.GetMmBrk() && m.GetMmStartBrk() < v.GetEnd():
		a.Kind = "heap"
	}
	return a
}

// readPages adds up what was dumped of each mapping, and reads what the program
// was started with out of the pages.
func (r *reader) readPages(p *Process, m *mm.MmEntry) error {
	args := newStrings(m.GetMmArgStart(), m.GetMmArgEnd())
	var environment *stringsAt
	if r.options.Environment {
		environment = newStrings(m.GetMmEnvStart(), m.GetMmEnvEnd())
	}
	areas := p.Memory.Mappings
	steps := 0
	var pages *os.File
	defer func() {
		if pages != nil {
			pages.Close()
		}
	}()
	err := r.eachRun(layout.Pagemap.Name(p.PID), p.Memory.PageSize, func(id uint32, start uint64, size, at int64) error {
		end := start + uint64(size)
		first := sort.Search(len(areas), func(i int) bool { return uint64(areas[i].Start)+uint64(areas[i].Size) > start })
		for i := first; i < len(areas) && uint64(areas[i].Start) < end; i++ {
			from := max(start, uint64(areas[i].Start))
			to := min(end, uint64(areas[i].Start)+uint64(areas[i].Size))
			if to > from {
				areas[i].Dumped = min(areas[i].Dumped+int64(to-from), areas[i].Size)
			}
			steps++
		}
		if args.within(start, end) || environment.within(start, end) {
			steps += maxSteps >> 14 // a read is dear
		}
		if steps > maxSteps {
			return fault.Invalid("lists the same memory again and again")
		}
		if !args.within(start, end) && !environment.within(start, end) {
			return nil
		}
		if pages == nil {
			var err error
			if pages, err = r.folder.open(layout.Pages.Name(id)); errors.Is(err, fs.ErrNotExist) {
				return nil // then we do not know them
			} else if err != nil {
				return err
			}
		}
		return errors.Join(args.read(pages, start, end, at), environment.read(pages, start, end, at))
	})
	if err != nil {
		return missing(err, "process %d has none", p.PID)
	}
	p.Args, p.Environment = args.split(), environment.split()
	return nil
}

// eachRun calls fn for each run of pages that a list says were dumped: the
// number of the image of pages, the address, the size, and where in the image
// they are, in bytes.
func (r *reader) eachRun(name string, page int64, fn func(id uint32, start uint64, size, at int64) error) error {
	var id uint32
	var at int64
	return r.folder.each(name, "PAGEMAP", img.Pagemap(&id, func(run img.PageRun) error {
		if run.Pages > 1<<36 {
			return fault.Invalid("lists more memory than there can be")
		}
		if !run.Present() {
			return nil
		}
		size := int64(run.Pages) * page
		if err := fn(id, run.Addr, size, at); err != nil {
			return err
		}
		if at += size; at < 0 {
			return fault.Invalid("lists more memory than there can be")
		}
		return nil
	}))
}

// readShared adds the pages of shared memory, which are listed once for all
// processes.
func (r *reader) readShared(p *Process, m *mm.MmEntry) error {
	shared := map[Address]uint64{}
	for _, v := range m.GetVmas() {
		if v.GetStatus()&(areaAnonShared|areaSysV|areaMemfd) != 0 {
			shared[Address(v.GetStart())] = v.GetShmid()
		}
	}
	for i := range p.Memory.Mappings {
		area := &p.Memory.Mappings[i]
		id, ok := shared[area.Start]
		if !ok {
			continue
		}
		total, err := r.sharedSize(id, p.Memory.PageSize)
		if err != nil {
			return err
		}
		area.Dumped = min(total, area.Size)
	}
	return nil
}

// sharedSize returns how much of a piece of shared memory was dumped.
func (r *reader) sharedSize(id uint64, page int64) (int64, error) {
	if total, ok := r.shared[id]; ok {
		return total, nil
	}
	var total int64
	err := r.eachRun(fmt.Sprintf("%s%d%s", layout.PagemapShared, id, layout.Suffix), page, func(_ uint32, _ uint64, size, _ int64) error {
		total += size
		return nil
	})
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	r.shared[id] = total
	return total, err
}

package policy

import (
	"fmt"

	core "github.com/checkpoint-restore/go-criu/v8/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fs"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pstree"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/layout"
)

// use is what a process has an entry of files.img for: the first that was found, and
// what all open it for besides the entry's own flags, as bits of a mode.
type use struct {
	pid    uint32
	what   string // such as "cwd"; fd and mapping have a number
	number uint64
	access uint32
}

func (u use) String() string {
	switch u.what {
	case "fd":
		return fmt.Sprintf("process %d: fd %d", u.pid, u.number)
	case "mapping":
		return fmt.Sprintf("process %d: mapping at %#x", u.pid, u.number)
	}
	return fmt.Sprintf("process %d: %s", u.pid, u.what)
}

// uses returns who has what, by the numbers of entries of files.img, and notes the
// numbers of all processes. Few checks need it, and it reads some images again.
func (c *checker) uses() (map[uint32]use, error) {
	if c.used != nil {
		return c.used, nil
	}
	c.used, c.processes = map[uint32]use{}, map[uint32]bool{}
	tables := map[uint32][]uint32{} // of descriptors, and who has each
	err := c.each(layout.ProcessTree, "PSTREE", func(msg []byte) error {
		var p pstree.PstreeEntry
		if err := c.decode(msg, &p); err != nil {
			return err
		}
		pid := p.GetPid()
		c.processes[pid] = true
		for _, tid := range p.GetThreads() {
			c.processes[tid] = true
		}
		var ids core.TaskKobjIdsEntry
		if _, err := c.one(layout.IDs.Name(pid), "IDS", &ids); err != nil {
			return err
		}
		tables[ids.GetFilesId()] = append(tables[ids.GetFilesId()], pid)
		var dirs fs.FsEntry
		found, err := c.one(layout.Root.Name(pid), "FS", &dirs)
		if found {
			c.use(dirs.GetCwdId(), use{pid: pid, what: "cwd"})
			c.use(dirs.GetRootId(), use{pid: pid, what: "root"})
		}
		if err != nil {
			return err
		}
		return c.usesOfMemory(pid)
	})
	if err != nil {
		return nil, err
	}
	for table, pids := range tables {
		err := c.each(layout.DescriptorTable.Name(table), "FDINFO", func(msg []byte) error {
			var e fdinfo.FdinfoEntry
			if err := c.decode(msg, &e); err != nil {
				return err
			}
			for _, pid := range pids {
				if err := c.budget.spend(1, 0); err != nil {
					return err
				}
				c.use(e.GetId(), use{pid: pid, what: "fd", number: uint64(e.GetFd())})
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return c.used, nil
}

func (c *checker) use(id uint32, u use) {
	if before, known := c.used[id]; known {
		before.access |= u.access
		u = before
	}
	c.used[id] = u
}

// usesOfMemory is for the executable and what is mapped.
func (c *checker) usesOfMemory(pid uint32) error {
	var m mm.MmEntry
	found, err := c.one(layout.Memory.Name(pid), "MM", &m)
	if err != nil || !found {
		return err
	}
	c.use(m.GetExeFileId(), use{pid: pid, what: "exe"})
	for _, v := range m.GetVmas() {
		if v.GetStatus()&(areaFilePrivate|areaFileShared) == 0 {
			continue
		}
		u := use{pid: pid, what: "mapping", number: v.GetStart(), access: 4}
		if v.Fdflags != nil {
			u.access = opens(v.GetFdflags())
		} else if v.GetFlags()&unix.MAP_SHARED != 0 && v.GetProt()&unix.PROT_WRITE != 0 {
			u.access = 6
		}
		c.use(uint32(v.GetShmid()), u)
	}
	return nil
}

// opened is an entry of files.img, as errors name it: with a process that has it open,
// if one has. It looks for that only when it is printed.
type opened struct {
	c  *checker
	id uint32
}

func (o opened) String() string {
	// Where this cannot be read, the checkpoint is refused all the same.
	uses, _ := o.c.uses()
	if u, known := uses[o.id]; known {
		return fmt.Sprintf("%s: open file %d", u, o.id)
	}
	return fmt.Sprintf("open file %d", o.id)
}

// part is an entry of another image that belongs to one of files.img.
type part struct {
	image string
	id    uint32
}

// of is for an error about a part: the entry of files.img, or the image alone where
// there is none.
func (c *checker) of(p part) fmt.Stringer {
	if id, known := c.parts[p]; known {
		return opened{c, id}
	}
	return p
}

func (p part) String() string { return p.image }

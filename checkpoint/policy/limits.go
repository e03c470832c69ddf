package policy

import (
	"io"
	"os"

	"github.com/stasis-run/stasis/checkpoint/criu/img"
	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/layout"
)

// limits are a spec's; 0 is none.
type limits struct {
	memory, withSwap uint64 // bytes
	tasks            uint64
}

func (c *checker) limits() (l limits) {
	if c.spec.Linux == nil || c.spec.Linux.Resources == nil {
		return l
	}
	r := c.spec.Linux.Resources
	if r.Pids != nil && r.Pids.Limit != nil && *r.Pids.Limit > 0 {
		l.tasks = uint64(*r.Pids.Limit)
	}
	if r.Memory == nil || r.Memory.Limit == nil || *r.Memory.Limit <= 0 {
		return l
	}
	l.memory = uint64(*r.Memory.Limit)
	l.withSwap = l.memory + swapTotal()
	if s := r.Memory.Swap; s != nil && *s > 0 {
		l.withSwap = min(l.withSwap, uint64(*s))
	}
	return l
}

// checkLimits refuses a restore that cannot fit. The kernel enforces the limits
// while CRIU restores; this is to say so before, and why.
func (c *checker) checkLimits() error {
	if err := c.checkMode(); err != nil {
		return err
	}
	l := c.limits()
	tasks := 0
	for _, t := range c.tasks {
		tasks += max(len(t.threads), 1)
	}
	if l.tasks > 0 && uint64(tasks) > l.tasks {
		c.refuse("%d processes and threads, the container may have %d", tasks, l.tasks)
	}
	// Processes share pages with those that they were forked from, and the
	// images do not tell which: the largest needs its own at least.
	memory := map[string]addressSpace{}
	for _, t := range c.tasks {
		memory[layout.Pagemap.Name(t.pid)] = t.memory
	}
	var largest, shared uint64
	for _, name := range c.ckpt.Names() {
		if !layout.Pagemap.Begins(name) {
			continue
		}
		l := memory[name]
		pages, err := c.pages(name, l, l.whole)
		switch {
		case err != nil:
			return err
		case layout.PagemapShared.Begins(name):
			shared += pages
		default:
			largest = max(largest, pages)
		}
	}
	if need := (largest + shared) * uint64(os.Getpagesize()); l.memory > 0 && need > l.withSwap {
		c.refuse("%d MiB of memory, the container may have %d MiB", (need+1<<20-1)>>20, l.withSwap>>20)
	}
	return nil
}

// pages counts those that a restore brings back, from wherever. Those of a process
// have to lie in its memory, in order: CRIU reads them to the addresses that the
// image says.
func (c *checker) pages(name string, in addressSpace, private bool) (pages uint64, err error) {
	var id uint32
	size := uint64(os.Getpagesize())
	end := uint64(0) // of the run before
	areas := in.areas
	err = c.ckpt.Each(name, "PAGEMAP", img.Pagemap(&id, func(r img.PageRun) error {
		if err := c.budget.run(); err != nil {
			return err
		}
		if r.Addr%size != 0 || r.Addr < end || r.Pages == 0 {
			c.refuse("%s: the pages at %#x are not in order", name, r.Addr)
			return io.EOF
		}
		end = r.Addr + r.Pages*size // both are bounded
		if private {
			for len(areas) > 0 && areas[0].end <= r.Addr {
				areas = areas[1:]
			}
			if len(areas) == 0 || r.Addr < areas[0].start || end > areas[0].end {
				c.refuse("%s: the pages at %#x are outside of the process's memory", name, r.Addr)
				return io.EOF
			}
		}
		if !r.Present() && !r.InParent() {
			return nil
		}
		if pages += r.Pages; pages > 1<<40 {
			return fault.Invalid("lists more memory than there can be")
		}
		return nil
	}))
	return pages, err
}

package process

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
)

// An oomCounter tells how many processes the kernel has killed for lack of memory
// since it was last asked; signalled says that the kernel has just signalled the
// group. Errors: fs.ErrNotExist when the group is gone. It is not for concurrent
// use.
type oomCounter interface {
	more(signalled bool) (int, error)
}

// killCounter is the kernel's own counter.
type killCounter struct {
	// read returns the kernel's counters by group, or errNoKillCount.
	read func() (map[string]uint64, error)
	seen map[string]uint64
}

// newKillCounter leaves out what was killed before. It fails with errNoKillCount
// where the kernel has no such counter.
func newKillCounter(read func() (map[string]uint64, error)) (*killCounter, error) {
	seen, err := read()
	if err != nil {
		return nil, err
	}
	return &killCounter{read: read, seen: seen}, nil
}

func (k *killCounter) more(bool) (int, error) {
	counts, err := k.read()
	if err != nil {
		return 0, err
	}
	n := 0
	for group, count := range counts {
		// A counter that fell is of a group that was removed and made again.
		if before := k.seen[group]; count > before {
			n += int(count - before)
		}
	}
	k.seen = counts
	return n, nil
}

// errNoKillCount: Linux counts kills since 4.13 (memory.oom_control: oom_kill).
var errNoKillCount = errors.New("the kernel does not count OOM kills")

// signalCounter stands in for the counter that a kernel lacks: signals are for one
// kill until memory was below the limit again.
type signalCounter struct {
	dir  string // of the group, with cgroup v1's memory controller
	told bool
}

func (k *signalCounter) more(signalled bool) (int, error) {
	usage, err := readNumber(filepath.Join(k.dir, "memory.usage_in_bytes"))
	if err != nil {
		return 0, err
	}
	limit, err := readNumber(filepath.Join(k.dir, "memory.limit_in_bytes"))
	if err != nil {
		return 0, err
	}
	tell := signalled && !k.told
	k.told = (k.told || signalled) && usage >= limit
	if tell {
		return 1, nil
	}
	return 0, nil
}

func readNumber(path string) (uint64, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(data)), 10, 64)
}

// oomCounterV1 returns the best counter that a group of cgroup v1 has.
func oomCounterV1(dir string) (oomCounter, error) {
	kills, err := newKillCounter(func() (map[string]uint64, error) { return readOOMControl(dir) })
	if errors.Is(err, errNoKillCount) {
		return &signalCounter{dir: dir}, nil
	}
	return kills, err
}

// readMemoryEventsFile reads a memory.events file of cgroup v2, which includes the
// groups below.
func readMemoryEventsFile(path string) (map[string]uint64, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	kills, err := parseOOMKills(data)
	return map[string]uint64{path: kills}, err
}

// readOOMControl reads memory.oom_control of a group of cgroup v1 and of those
// below: there the kernel counts a kill in the group of the killed process alone.
func readOOMControl(dir string) (map[string]uint64, error) {
	counts := map[string]uint64{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			var data []byte
			if data, err = os.ReadFile(filepath.Join(path, "memory.oom_control")); err == nil {
				counts[path], err = parseOOMKills(data)
			}
		}
		if errors.Is(err, fs.ErrNotExist) && path != dir {
			return nil // a group below that was removed
		}
		return err
	})
	return counts, err
}

// parseOOMKills returns the counter oom_kill of memory.events or
// memory.oom_control.
func parseOOMKills(data []byte) (uint64, error) {
	for line := range bytes.Lines(data) {
		if count, ok := strings.CutPrefix(string(line), "oom_kill "); ok {
			return strconv.ParseUint(strings.TrimSpace(count), 10, 64)
		}
	}
	return 0, errNoKillCount
}

// Delays between looks at the counter after a signal: the kernel signals before it
// kills, and may write a report to a slow console in between.
const (
	firstLook = time.Millisecond
	lastLook  = 8 * time.Second
)

// watchSignals calls notify for each kill, where the kernel signals an eventfd when
// an allocation meets the limit of a group of cgroup v1, and once when the group
// is removed (Documentation/admin-guide/cgroup-v1/memory.rst). There are more
// signals than kills: each allocating thread may cause one, and the kernel may
// choose a process of another group. So a signal only says when to look at the
// counter. It closes file.
func watchSignals(file *os.File, kills oomCounter, notify func()) (stop func()) {
	signals := make(chan struct{}, 1)
	go func() { // until the file is closed
		defer close(signals)
		count := make([]byte, 8)
		for {
			if _, err := file.Read(count); err != nil {
				return
			}
			select {
			case signals <- struct{}{}:
			default: // there will be a look anyway
			}
		}
	}()
	stopping, done := make(chan struct{}), make(chan struct{})
	look := func(signalled bool) (gone bool) {
		n, err := kills.more(signalled)
		for range n {
			notify()
		}
		return err != nil
	}
	go func() {
		defer close(done)
		defer file.Close()
		if look(false) { // a kill before the eventfd was registered
			return
		}
		delay := time.Duration(0)
		for {
			var again <-chan time.Time
			signalled := false
			if delay > 0 {
				again = time.After(delay)
			}
			select {
			case _, ok := <-signals:
				if !ok {
					return
				}
				delay, signalled = firstLook, true
			case <-again:
				if delay *= 2; delay > lastLook {
					delay = 0
				}
			case <-stopping:
				look(len(signals) > 0)
				return
			}
			if look(signalled) {
				return
			}
		}
	}()
	return sync.OnceFunc(func() {
		close(stopping)
		<-done
	})
}

package process

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"
	"unsafe"

	"github.com/containerd/cgroups/v3"
	"github.com/containerd/cgroups/v3/cgroup1"
	"github.com/containerd/cgroups/v3/cgroup2"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// WatchOOM calls notify once for each process of the group that the kernel kills
// for lack of memory, until stop is called or the group is gone. Kills before the
// call are not reported. Kills before stop are reported before stop returns, so
// an OOM event precedes the exit of the process.
func (c *Cgroup) WatchOOM(notify func()) (stop func(), err error) {
	if c.v2 != nil {
		return watchMemoryEvents(filepath.Join(c.memory, "memory.events"), notify)
	}
	kills, err := oomCounterV1(c.memory)
	if err != nil {
		return nil, fmt.Errorf("watch for OOM: %w", err)
	}
	fd, err := c.v1.RegisterMemoryEvent(cgroup1.OOMEvent())
	if err != nil {
		return nil, fmt.Errorf("watch for OOM: %w", err)
	}
	if err := unix.SetNonblock(int(fd), true); err != nil {
		unix.Close(int(fd))
		return nil, err
	}
	return watchSignals(os.NewFile(fd, "oom-eventfd"), kills, notify), nil
}

// memoryEvents is the shim's one inotify instance: the kernel allows few of
// them per user (fs.inotify.max_user_instances, often 128), and there is a shim
// for every pod.
var memoryEvents struct {
	sync.Mutex
	fd      int // inotify, once watches is made; never closed
	watches map[int]*memoryWatch
}

type memoryWatch struct {
	kills  *killCounter // guarded by memoryEvents
	notify func()
}

// watchMemoryEvents is WatchOOM for version 2: memory.events is modified when
// one of its counters changes (Documentation/admin-guide/cgroup-v2.rst).
func watchMemoryEvents(path string, notify func()) (func(), error) {
	m := &memoryEvents
	m.Lock()
	defer m.Unlock()
	if m.watches == nil {
		fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
		if err != nil {
			return nil, fmt.Errorf("watch for OOM: inotify: %w", err)
		}
		m.fd, m.watches = fd, map[int]*memoryWatch{}
		go readMemoryEvents(os.NewFile(uintptr(fd), "inotify"))
	}
	kills, err := newKillCounter(func() (map[string]uint64, error) { return readMemoryEventsFile(path) })
	if err != nil {
		return nil, fmt.Errorf("watch for OOM: %w", err)
	}
	wd, err := unix.InotifyAddWatch(m.fd, path, unix.IN_MODIFY)
	if err != nil {
		return nil, fmt.Errorf("watch %s: %w", path, err)
	}
	m.watches[wd] = &memoryWatch{kills: kills, notify: notify}
	return func() {
		memoryModified(wd, 0)
		m.Lock()
		defer m.Unlock()
		if _, ok := m.watches[wd]; ok {
			delete(m.watches, wd)
			_, _ = unix.InotifyRmWatch(m.fd, uint32(wd))
		}
	}, nil
}

func readMemoryEvents(file *os.File) {
	buf := make([]byte, 16*unix.SizeofInotifyEvent)
	for {
		n, err := file.Read(buf)
		if err != nil {
			log.L.WithError(err).Error("read inotify: no more OOM events")
			return
		}
		for off := 0; off+unix.SizeofInotifyEvent <= n; {
			event := (*unix.InotifyEvent)(unsafe.Pointer(&buf[off]))
			off += unix.SizeofInotifyEvent + int(event.Len)
			memoryModified(int(event.Wd), event.Mask)
		}
	}
}

func memoryModified(wd int, mask uint32) {
	m := &memoryEvents
	m.Lock()
	w := m.watches[wd]
	if w == nil {
		m.Unlock()
		return
	}
	if mask&unix.IN_IGNORED != 0 { // the group was removed
		delete(m.watches, wd)
		m.Unlock()
		return
	}
	more, _ := w.kills.more(true) // a group that is gone has no more
	m.Unlock()
	for range more {
		w.notify()
	}
}

// appearInterval is how often WatchOOMOf looks for a group.
const appearInterval = 5 * time.Millisecond

// WatchOOMOf is Cgroup.WatchOOM for the group that a container's spec names
// (linux.cgroupsPath), which need not exist yet: in a restore the OCI runtime makes
// it, and if that fails removes it again.
func WatchOOMOf(cgroupsPath string, notify func()) (stop func()) {
	group := GroupOf(cgroupsPath)
	if group == "/" {
		return func() {}
	}
	stopped, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			if c, err := loadGroup(group); err == nil {
				if end, err := c.WatchOOM(notify); err == nil {
					<-stopped
					end()
					return
				}
			}
			select {
			case <-stopped:
				return
			case <-time.After(appearInterval):
			}
		}
	}()
	return func() {
		close(stopped)
		<-done
	}
}

// loadGroup returns a group that has a memory controller.
func loadGroup(group string) (*Cgroup, error) {
	if cgroups.Mode() == cgroups.Unified {
		dir := filepath.Join(unifiedMount, group)
		if _, err := os.Stat(filepath.Join(dir, "memory.events")); err != nil {
			return nil, err
		}
		m, err := cgroup2.Load(group)
		return &Cgroup{v2: m, freezer: dir, memory: dir}, err
	}
	memory := filepath.Join(unifiedMount, "memory", group)
	if _, err := os.Stat(memory); err != nil {
		return nil, err
	}
	c, err := cgroup1.Load(cgroup1.StaticPath(group), cgroup1.WithHierarchy(hierarchy))
	return &Cgroup{v1: c, freezer: filepath.Join(unifiedMount, "freezer", group), memory: memory}, err
}

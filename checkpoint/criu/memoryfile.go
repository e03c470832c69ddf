package criu

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/stasis-run/stasis/checkpoint/layout"
)

// MemoryFile is the file to which CRIU writes the memory of the largest process.
type MemoryFile struct {
	Path string // while CRIU writes it; relative to DumpRequest.Dir
	// Size is how large the file will be, in bytes. It is computed from the process's
	// mappings, so it has to be compared with the file when CRIU has ended.
	Size int64
}

// memoryFileLeast is how much more memory than each other process the largest has to
// have, in bytes. With less, an early start is of little use, and its file may not be
// told from the others while they grow.
const memoryFileLeast = 64 << 20

// memoryFileEvery is the time between two looks at what CRIU has written.
const memoryFileEvery = 10 * time.Millisecond

// memoryWatch looks for the memory file of a dump, in the background. Its methods may
// be called on nil, which looks for nothing.
type memoryWatch struct {
	cancel context.CancelFunc
	done   chan struct{} // closed after the last call of MemoryFile
}

// watchMemory calls r.MemoryFile when CRIU has begun with the file, in the folder dir.
// It is an attempt: whatever fails, nothing is called. The returned memoryWatch has to
// be waited for.
func (r *DumpRequest) watchMemory(ctx context.Context, dir string) *memoryWatch {
	// What pre-dumps wrote is put together only in the end.
	if r.MemoryFile == nil || r.PreDumps != 0 || r.Cgroup == nil {
		return nil
	}
	ctx, cancel := context.WithCancel(ctx)
	w := &memoryWatch{cancel: cancel, done: make(chan struct{})}
	// The dump waits for none of this: the container stands still for it.
	go func() {
		defer close(w.done)
		pids, err := r.Cgroup.Pids()
		if err != nil {
			return
		}
		pid, other, ok := largest(pids, ownMemory)
		if !ok {
			return
		}
		file := waitLarger(ctx, dir, other)
		if file == "" {
			return
		}
		// Not sooner: the size is exact once CRIU's own code is in the process.
		size, err := dumpedMemory(pid)
		if err != nil || ctx.Err() != nil {
			return
		}
		path, err := filepath.Rel(r.Dir, file)
		if err != nil {
			return
		}
		r.MemoryFile(MemoryFile{Path: path, Size: size})
	}()
	return w
}

// end tells that CRIU has left the processes. It does not wait.
func (w *memoryWatch) end() {
	if w != nil {
		w.cancel()
	}
}

// wait is end, and returns when r.MemoryFile is not called any more.
func (w *memoryWatch) wait() {
	if w != nil {
		w.cancel()
		<-w.done
	}
}

// largest returns the process with the most memory, by own, in bytes, and a size that
// no other one's file will reach. It is not ok if there is no such process.
func largest(pids []uint32, own func(pid int) (int64, error)) (pid int, other int64, ok bool) {
	most := int64(0)
	for _, p := range pids {
		size, err := own(int(p))
		if err != nil {
			continue // it has ended
		}
		if size > most {
			pid, most, size = int(p), size, most
		}
		other = max(other, size)
	}
	if most-other < memoryFileLeast {
		return 0, 0, false
	}
	// The kernel counts per CPU and adds up late.
	return pid, other + memoryFileLeast/8, true
}

// waitLarger waits for a memory file of more than so many bytes in a folder, and
// returns its path, or "" when ctx ends.
func waitLarger(ctx context.Context, dir string, more int64) string {
	tick := time.NewTicker(memoryFileEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return ""
		case <-tick.C:
		}
		files, _ := filepath.Glob(filepath.Join(dir, layout.Pages.Glob()))
		for _, file := range files {
			if info, err := os.Lstat(file); err == nil && info.Mode().IsRegular() && info.Size() > more {
				return file
			}
		}
	}
}

// ownMemory is about how much memory a process has that is of no file, in bytes.
func ownMemory(pid int) (int64, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return anonymousMemory(f)
}

// anonymousMemory is the anonymous memory in a status file (proc(5)), swapped out or
// not, in bytes.
func anonymousMemory(status io.Reader) (size int64, err error) {
	lines := bufio.NewScanner(status)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 2 || fields[0] != "RssAnon:" && fields[0] != "VmSwap:" {
			continue
		}
		kib, err := parseKiB(fields[1])
		if err != nil {
			return 0, fmt.Errorf("status: %w", err)
		}
		size += kib
	}
	return size, lines.Err()
}

// dumpedMemory is how much CRIU writes of the memory of a process, in bytes. It is
// exact once CRIU's own code is in the process: that is placed over a page of a
// program, which becomes anonymous by it.
func dumpedMemory(pid int) (int64, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return sumMappings(f)
}

// sumMappings adds up what CRIU writes of the mappings in an smaps file (proc(5)):
// their anonymous pages, in memory or swapped, unless the kernel may drop those; and
// all of the kernel's code that is mapped into each process.
func sumMappings(smaps io.Reader) (size int64, err error) {
	var private, vdso bool
	var anonymous int64 // of the mapping
	lines := bufio.NewScanner(smaps)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 2 {
			continue
		}
		key, isField := strings.CutSuffix(fields[0], ":")
		if !isField {
			private = strings.HasSuffix(fields[1], "p")
			vdso = fields[len(fields)-1] == "[vdso]"
			anonymous = 0
			continue
		}
		switch {
		case key == "VmFlags": // the last
			if !slices.Contains(fields, "dp") {
				size += anonymous
			}
		case vdso && key == "Size", !vdso && key == "Anonymous", !vdso && private && key == "Swap":
			kib, err := parseKiB(fields[1])
			if err != nil {
				return 0, fmt.Errorf("smaps: %w", err)
			}
			anonymous += kib
		}
	}
	return size, lines.Err()
}

// parseKiB returns a number of KiB in bytes.
func parseKiB(text string) (int64, error) {
	kib, err := strconv.ParseInt(text, 10, 64)
	return kib << 10, err
}

package node

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/checkpoint/oci"
	"github.com/stasis-run/stasis/checkpoint/sign"
	"github.com/stasis-run/stasis/checkpoint/sum"
)

// earlyLeast is the memory in bytes from which on it is worth to start early.
const earlyLeast = 64 << 20

// earlyLayer starts the image's layer with the processes while CRIU writes them; see
// oci.CheckpointLayer. It is an attempt: if it fails, the layer is written when CRIU
// has ended, and what went wrong shows there again.
type earlyLayer struct {
	layer  *oci.CheckpointLayer
	cancel context.CancelFunc
	dumped chan struct{} // closed when CRIU has ended
	done   chan struct{} // closed when layer is started, or will not be
	inode  uint64        // of the file that layer has read
}

// startEarly starts the attempt. folder is where CRIU writes to, and may be made later;
// at is the time of the checkpoint. hasEnded and discard have to be called.
func (d *dumper) startEarly(ctx context.Context, folder string, at time.Time, o oci.Options) *earlyLayer {
	ctx, cancel := context.WithCancel(ctx)
	e := &earlyLayer{cancel: cancel, dumped: make(chan struct{}), done: make(chan struct{})}
	// Until then the bar shows what CRIU does.
	tell := o.Progress
	o.Progress = func(stage string, done, total int64) {
		if e.hasDumped() {
			tell(stage, done, total)
		}
	}
	e.layer = oci.NewCheckpointLayer(d.client.ContentStore(), o)
	go func() {
		defer close(e.done)
		pid, other, err := d.largest(ctx)
		if err != nil {
			return
		}
		// The container stands still meanwhile, and CRIU must not wait for us. Nor must
		// whoever ends the attempt, hence a goroutine.
		undo := d.node.idleCPUs()
		go func() {
			select {
			case <-e.dumped:
			case <-ctx.Done():
			}
			undo()
		}()
		f := e.wait(folder, other)
		if f == nil {
			return
		}
		defer f.Close()
		size, err := dumpedMemory(pid)
		if err != nil || !hasRoom(folder, size) || !hasRoom(o.Folder.Path(), size) || !cached(size) {
			return
		}
		r := io.LimitReader(&growing{f, size, e}, size)
		var st unix.Stat_t
		if unix.Fstat(int(f.Fd()), &st) != nil {
			return
		}
		e.inode = st.Ino
		_ = e.layer.Start(ctx, at, filepath.Base(f.Name()), size, r)
	}()
	return e
}

// hasEnded tells that CRIU has.
func (e *earlyLayer) hasEnded() { close(e.dumped) }

// finish writes the rest of the layer, when CRIU has ended and the file is read. Unless
// the images are to be retained, it gives the file its sum in the manifest, which is signed
// by key then, unless that is nil; and removes the file when it is not needed any more.
func (e *earlyLayer) finish(ctx context.Context, c *capture.Capture, retain bool, key *sign.Key) (oci.Layer, error) {
	<-e.done
	if !retain {
		known := checkpoint.File{Inode: e.inode}
		var read sum.Sum
		known.Name, known.Size, read = e.layer.Started()
		known.Sum, known.Chunks = read.Text, read.Chunks
		if err := checkpoint.AddSum(ctx, c.Images, known, key); err != nil {
			return oci.Layer{}, err
		}
		e.layer.RemoveStarted = true
	}
	return e.layer.Finish(ctx, c)
}

// discard removes what was started, unless finish was called. It may be called on nil.
// It does not wait for what would not be used, such as a containerd that has died.
func (e *earlyLayer) discard(ctx context.Context) {
	if e != nil {
		e.cancel()
		<-e.done
		e.layer.Discard(ctx)
	}
}

func (e *earlyLayer) hasDumped() bool {
	select {
	case <-e.dumped:
		return true
	default:
		return false
	}
}

// Pauses before another look at what CRIU has written: in the folder, and in the
// file, to which it writes a few megabytes meanwhile.
const (
	longPause = 10 * time.Millisecond
	pause     = 2 * time.Millisecond
)

// wait waits for CRIU to have written more than so many bytes to a file with
// memory, and opens that. nil: it has ended.
func (e *earlyLayer) wait(folder string, more int64) *os.File {
	for !e.hasDumped() {
		time.Sleep(longPause)
		files, _ := filepath.Glob(filepath.Join(folder, layout.Pages.Glob()))
		for _, file := range files {
			if info, err := os.Lstat(file); err != nil || info.Size() <= more {
				continue
			}
			if f, err := capture.OpenPlain(file); err == nil {
				return f
			}
		}
	}
	return nil
}

// growing reads a file that CRIU appends to, until CRIU has ended. If it has another
// size then, what was started is of no use.
type growing struct {
	f    *os.File
	size int64
	e    *earlyLayer
}

func (g *growing) Read(p []byte) (int, error) {
	for {
		last := g.e.hasDumped()
		if last {
			if info, err := g.f.Stat(); err != nil || info.Size() != g.size {
				return 0, errors.Join(errSize, err)
			}
		}
		n, err := g.f.Read(p)
		if !errors.Is(err, io.EOF) || last {
			return n, err
		}
		time.Sleep(pause)
	}
}

var errSize = errors.New("it has another size than could be foreseen")

// errSmall: there is no process for which it is worth to start early.
var errSmall = errors.New("no process has much more memory than all others")

// largest returns the process of the container with the most memory of its own, and
// what no other has more of, in bytes.
func (d *dumper) largest(ctx context.Context) (pid int, other int64, err error) {
	processes, err := d.task.Pids(ctx)
	if err != nil {
		return 0, 0, err
	}
	most := int64(0)
	for _, p := range processes {
		size, err := ownMemory(int(p.Pid))
		if err != nil {
			continue // it has ended
		}
		if size > most {
			pid, most, size = int(p.Pid), size, most
		}
		other = max(other, size)
	}
	if most-other < earlyLeast {
		return 0, 0, errSmall
	}
	// The kernel counts per CPU, and adds up when it comes to it.
	return pid, other + earlyLeast/8, nil
}

// ownMemory is how much memory a process has that is of no file, in bytes, about.
func ownMemory(pid int) (int64, error) {
	p, err := procfs.NewProc(pid)
	if err != nil {
		return 0, err
	}
	status, err := p.NewStatus()
	return int64(status.RssAnon + status.VmSwap), err
}

// dumpedMemory is what CRIU writes of the memory of a process, in bytes. It is
// exact from when CRIU's own code is in the process, as that is placed over a page
// of a program, which becomes anonymous so.
func dumpedMemory(pid int) (int64, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return sumMappings(f)
}

// hasRoom tells whether a file system has room for twice so many bytes, and more: if
// CRIU's images and the image are on the same, neither may take what the end of the
// dump needs.
func hasRoom(dir string, size int64) bool {
	var st unix.Statfs_t
	return unix.Statfs(dir, &st) == nil && int64(st.Bavail)*st.Bsize > 2*size+earlyLeast
}

// cached tells whether the kernel takes so many bytes before it makes who writes
// them wait for the disk. Else CRIU will wait, and shall have the disk for itself.
func cached(size int64) bool {
	data, err := os.ReadFile("/proc/vmstat")
	if err != nil {
		return false
	}
	return size < dirtyRoom(string(data))
}

// dirtyRoom is how many bytes more may be written, by a vmstat file (proc(5)), before
// the kernel makes writers wait: that begins half way between its two thresholds
// (balance_dirty_pages in the kernel's mm/page-writeback.c).
func dirtyRoom(vmstat string) int64 {
	pages := map[string]int64{}
	for line := range strings.Lines(vmstat) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if n, err := strconv.ParseInt(value, 10, 64); err == nil {
			pages[name] = n
		}
	}
	room := (pages["nr_dirty_threshold"]+pages["nr_dirty_background_threshold"])/2 - pages["nr_dirty"] - pages["nr_writeback"]
	return room * int64(os.Getpagesize())
}

// sumMappings adds up what CRIU writes of the mappings in an smaps file (proc(5)):
// their anonymous pages, in memory or swapped, unless the kernel may drop those;
// and all of the kernel's code that is mapped into each process.
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
			kib, err := strconv.ParseInt(fields[1], 10, 64)
			if err != nil {
				return 0, fmt.Errorf("smaps: %w", err)
			}
			anonymous += kib << 10
		}
	}
	return size, lines.Err()
}

// idleCPUs is Options.IdleCPUs, which may be nil.
func (n *Node) idleCPUs() (undo func()) {
	if n.o.IdleCPUs == nil {
		return func() {}
	}
	return n.o.IdleCPUs()
}

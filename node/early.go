package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/api"
	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/oci"
	"github.com/stasis-run/stasis/checkpoint/sign"
	"github.com/stasis-run/stasis/checkpoint/sum"
)

// earlySpare is the room in bytes that has to stay free on a disk.
const earlySpare = 64 << 20

// earlyLayer starts the image's layer with the processes while CRIU writes them; see
// oci.CheckpointLayer. It is an attempt: if it fails, the layer is written when CRIU
// has ended, and what went wrong shows there again.
type earlyLayer struct {
	layer  *oci.CheckpointLayer
	cancel context.CancelFunc
	file   chan *api.MemoryFile // has room for the one that there is at most
	dumped chan struct{}        // closed when CRIU has ended
	done   chan struct{}        // closed when layer is started, or will not be
	inode  uint64               // of the file that layer has read
}

// startEarly prepares the attempt, which begins with hasFile. images is the folder that
// the shim was asked to write to, and may be made later; at is the time of the
// checkpoint. hasEnded and discard have to be called.
func (d *dumper) startEarly(ctx context.Context, images string, at time.Time, o oci.Options) *earlyLayer {
	ctx, cancel := context.WithCancel(ctx)
	e := &earlyLayer{cancel: cancel, file: make(chan *api.MemoryFile, 1), dumped: make(chan struct{}), done: make(chan struct{})}
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
		var file *api.MemoryFile
		select {
		case file = <-e.file:
		case <-e.dumped: // an older shim tells of no file
			return
		case <-ctx.Done():
			return
		}
		f, err := openMemory(images, file)
		if err != nil {
			return
		}
		defer f.Close()
		size := int64(file.Size)
		if size <= 0 || !hasRoom(images, size) || !hasRoom(o.Folder.Path(), size) || !cached(size) {
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

// hasFile tells where CRIU writes the largest process's memory. Only the first call
// counts. It does not wait.
func (e *earlyLayer) hasFile(f *api.MemoryFile) {
	select {
	case e.file <- f:
	default:
	}
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

// pause is the time between two looks at the file, to which CRIU writes a few
// megabytes meanwhile.
const pause = 2 * time.Millisecond

// openMemory opens the file that a shim tells of, which has to be in the folder that
// it was asked to write to, or below.
func openMemory(images string, file *api.MemoryFile) (*os.File, error) {
	if !filepath.IsLocal(file.Path) {
		return nil, fmt.Errorf("the shim writes to %q, which is not below %s", file.Path, images)
	}
	return capture.OpenPlain(filepath.Join(images, file.Path))
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

// hasRoom tells whether a file system has room for twice so many bytes, and more: if
// CRIU's images and the image are on the same, neither may take what the end of the
// dump needs.
func hasRoom(dir string, size int64) bool {
	var st unix.Statfs_t
	return unix.Statfs(dir, &st) == nil && int64(st.Bavail)*st.Bsize > 2*size+earlySpare
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

// idleCPUs is Options.IdleCPUs, which may be nil.
func (n *Node) idleCPUs() (undo func()) {
	if n.o.IdleCPUs == nil {
		return func() {}
	}
	return n.o.IdleCPUs()
}

package image

import (
	"cmp"
	"context"
	"encoding/json"
	"io"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/content"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/sum"
)

// Begun is the layer of a runnable image with the processes, up to its first file,
// which is the largest of CRIU's: the memory of the largest process.
//
// It can be begun while CRIU still writes that file. To sum it and to write it to
// the disk takes as long as CRIU does, and would else begin when CRIU has ended.
// But a tar has the size of a file before its bytes, so that has to be foreseen.
// Whether it was, and whether the file is the one that CRIU has left, is found out by
// WriteRunnable; if not, it begins anew.
type Begun struct {
	// Taken, if not nil, is called when WriteRunnable takes the layer, and so does
	// not need the file any more.
	Taken func()

	w     *layerWriter
	tree  *tree
	file  imageFile
	sum   *sum.Writer
	total atomic.Int64 // bytes that the layer will have, as far as is known
	ended bool
}

// Begin begins the layer of a checkpoint of that time, and writes the file, which
// is all that r has. ctx has a lease. Discard has to be called in the end, whether
// WriteRunnable has taken the layer or not. If the store's folder cannot be written
// to, it does nothing, and the error matches errdefs.ErrFailedPrecondition: what goes
// through containerd takes CPUs that CRIU needs.
func Begin(ctx context.Context, store content.Store, at time.Time, name string, size int64, r io.Reader, o Options) (*Begun, error) {
	b, err := newBegun(ctx, store, at, imageFile{name, size}, size, o)
	if err != nil {
		return nil, err
	}
	if b.w.in.file == nil {
		b.Discard(ctx)
		return nil, fault.Unusable("the content store has no folder that can be written to")
	}
	if err := b.write(ctx, r); err != nil {
		return nil, err
	}
	return b, nil
}

// newBegun begins a layer that will have about total bytes, with the file first.
func newBegun(ctx context.Context, store content.Store, at time.Time, file imageFile, total int64, o Options) (*Begun, error) {
	b := &Begun{file: file, sum: sum.NewWriter()}
	b.total.Store(total)
	var err error
	b.w, err = newLayerWriter(ctx, store, o, func(done int64) { o.progress("checkpoint", b.total.Load())(done) })
	if err != nil {
		return nil, err
	}
	b.tree = newTree(b.w.tar, at)
	b.tree.folder(stasisDir)
	b.tree.folder(checkpointDir)
	return b, nil
}

// write writes the file. After an error, the layer is discarded.
func (b *Begun) write(ctx context.Context, r io.Reader) error {
	b.tree.content(checkpointDir+"/"+b.file.name, b.file.size, io.TeeReader(capture.NewReader(ctx, r), b.sum))
	if b.tree.err != nil {
		b.Discard(ctx)
	}
	return b.tree.err
}

// Discard removes the layer, unless it was taken. It may be called on nil.
func (b *Begun) Discard(ctx context.Context) {
	if b != nil && !b.ended {
		b.ended = true
		_, _ = b.w.finish(ctx, fault.Invalid("it is not needed"))
	}
}

// fits tells whether it is the beginning of what o asks for, and first the file
// that was read.
func (b *Begun) fits(c *capture.Capture, first imageFile, o Options) bool {
	_, _, read := b.File()
	return b != nil && !b.ended && b.w.compression == o.Compression && b.file == first &&
		b.tree.time.Equal(newTree(nil, c.Info.Checkpointed).time) &&
		read.Text == manifestSum(c.Images, first.name)
}

// File is the file that was read, as stasis.json has it, if it is CRIU's now. On nil,
// all is empty.
func (b *Begun) File() (name string, size int64, _ sum.Sum) {
	if b == nil {
		return "", 0, sum.Sum{}
	}
	return b.file.name, b.file.size, b.sum.Sum()
}

// manifestSum is what stasis.json says of a file, or "".
func manifestSum(dir, name string) string {
	var m struct {
		Files []struct {
			Name string `json:"name"`
			Sum  string `json:"sum"`
		} `json:"files"`
	}
	data, err := capture.ReadSmall(filepath.Join(dir, "stasis.json"), maxMetadata)
	if err != nil || json.Unmarshal(data, &m) != nil {
		return ""
	}
	for _, file := range m.Files {
		if file.Name == name {
			return file.Sum
		}
	}
	return ""
}

// writeProcesses writes the layer of a runnable image with the processes: the
// largest file, all that is not CRIU's, and the other files by name.
func writeProcesses(ctx context.Context, store content.Store, c *capture.Capture, o Options) (layer, error) {
	var b *Begun
	if o.Begun != nil {
		var err error
		if b, err = o.Begun(); err != nil {
			return layer{}, err
		}
	}
	files, total, err := listImages(c.Images)
	if err != nil {
		return layer{}, err
	}
	if len(files) == 0 {
		return layer{}, fault.Invalid("%s: it is empty", c.Images)
	}
	info, err := capture.EncodeInfo(c.Info)
	if err != nil {
		return layer{}, err
	}
	first := slices.MaxFunc(files, func(a, b imageFile) int { return cmp.Compare(a.size, b.size) })
	if b.fits(c, first, o) {
		if b.Taken != nil {
			b.Taken()
		}
	} else {
		b.Discard(ctx)
		f, err := capture.OpenPlain(filepath.Join(c.Images, first.name))
		if err != nil {
			return layer{}, err
		}
		defer f.Close()
		if b, err = newBegun(ctx, store, c.Info.Checkpointed, first, total, o); err != nil {
			return layer{}, err
		}
		if err := b.write(ctx, io.LimitReader(f, first.size)); err != nil {
			return layer{}, err
		}
	}
	b.total.Store(total)
	b.tree.file(infoPath, info)
	b.tree.file(specPath, c.Spec)
	if c.DevShm != "" {
		b.tree.copy(ctx, devShmPath, c.DevShm)
	}
	b.tree.images(ctx, checkpointDir+"/", c.Images, slices.DeleteFunc(files, func(f imageFile) bool { return f == first }))
	b.ended = true
	return b.w.finish(ctx, b.tree.close())
}

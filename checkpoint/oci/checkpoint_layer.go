package oci

import (
	"cmp"
	"context"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/content"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/checkpoint/sum"
)

// CheckpointLayer writes the layer of a runnable image that holds the processes. Its
// first file is the largest of CRIU's: the memory of the largest process.
//
// Start may write that file while CRIU still does. To sum it and to write it to the
// disk takes as long as CRIU does, and would else begin when CRIU has ended. But a tar
// has the size of a file before its bytes, so that has to be foreseen. Finish finds out
// whether it was, and whether the file is the one that CRIU has left. If not, Finish
// writes the layer from its beginning.
//
// Start and Finish are called once each, and not at the same time. Without Finish,
// Discard has to be called.
type CheckpointLayer struct {
	// RemoveStarted lets Finish remove the file that Start has read, which takes a
	// while if it is large, as soon as it is not needed any more.
	RemoveStarted bool

	store   content.Store
	o       Options
	started *partialLayer // nil: nothing is
	reused  bool          // Finish has gone on with started
}

// NewCheckpointLayer returns a layer of which nothing is written yet.
func NewCheckpointLayer(store content.Store, o Options) *CheckpointLayer {
	return &CheckpointLayer{store: store, o: o}
}

// Start writes the layer, of a checkpoint of that time, up to the end of the file
// called name, whose bytes are the size bytes that r has. ctx has a lease. After an
// error, nothing is started. If the store's folder cannot be written to, the error
// matches errdefs.ErrFailedPrecondition: what goes through containerd takes CPUs that
// CRIU needs.
func (l *CheckpointLayer) Start(ctx context.Context, at time.Time, name string, size int64, r io.Reader) error {
	p, err := newPartialLayer(ctx, l.store, at, imageFile{name, size}, size, l.o)
	if err != nil {
		return err
	}
	if !p.w.upload.InFolder() {
		p.discard(ctx)
		return fault.Unusable("the content store has no folder that can be written to")
	}
	if err := p.write(ctx, r); err != nil {
		return err
	}
	l.started = p
	return nil
}

// Started is the file that Start has read, as stasis.json has it. If nothing is
// started, name is empty.
func (l *CheckpointLayer) Started() (name string, size int64, _ sum.Sum) {
	if l.started == nil {
		return "", 0, sum.Sum{}
	}
	return l.started.file.name, l.started.file.size, l.started.sum.Sum()
}

// Discard removes what is started, unless Finish was called.
func (l *CheckpointLayer) Discard(ctx context.Context) {
	if l.started != nil {
		l.started.discard(ctx)
		l.started = nil
	}
}

// Finish writes what is left of the layer: all of c but its writable layer. The folder
// of c is whole. ctx has a lease.
func (l *CheckpointLayer) Finish(ctx context.Context, c *capture.Capture) (Layer, error) {
	defer l.Discard(ctx)
	files, total, err := listImages(c.Images)
	if err != nil {
		return Layer{}, err
	}
	if len(files) == 0 {
		return Layer{}, fault.Invalid("%s: it is empty", c.Images)
	}
	info, err := capture.EncodeInfo(c.Info)
	if err != nil {
		return Layer{}, err
	}
	first := slices.MaxFunc(files, func(a, b imageFile) int { return cmp.Compare(a.size, b.size) })
	p := l.started
	if l.reused = p != nil && p.fits(c, first); l.reused {
		l.started = nil
		if l.RemoveStarted {
			go os.Remove(filepath.Join(c.Images, first.name))
		}
	} else {
		l.Discard(ctx)
		if p, err = l.startAgain(ctx, c, first, total); err != nil {
			return Layer{}, err
		}
	}
	p.total.Store(total)
	p.tree.file(layout.EmbeddedInfo, info)
	p.tree.file(layout.EmbeddedSpec, c.Spec)
	if c.DevShm != "" {
		p.tree.copy(ctx, layout.EmbeddedDevShm, c.DevShm)
	}
	p.tree.images(ctx, layout.EmbeddedImages+"/", c.Images, slices.DeleteFunc(files, func(f imageFile) bool { return f == first }))
	return p.w.finish(ctx, p.tree.close())
}

// startAgain is Start with a file that is whole.
func (l *CheckpointLayer) startAgain(ctx context.Context, c *capture.Capture, first imageFile, total int64) (*partialLayer, error) {
	f, err := capture.OpenPlain(filepath.Join(c.Images, first.name))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	p, err := newPartialLayer(ctx, l.store, c.Info.Checkpointed, first, total, l.o)
	if err != nil {
		return nil, err
	}
	return p, p.write(ctx, io.LimitReader(f, first.size))
}

// partialLayer is a layer on its way into the store, up to its first file.
type partialLayer struct {
	w     *layerWriter
	tree  *tree
	file  imageFile
	sum   *sum.Writer
	total atomic.Int64 // bytes that the layer will have, as far as is known
}

// newPartialLayer begins a layer that will have about total bytes, with the file first.
func newPartialLayer(ctx context.Context, store content.Store, at time.Time, file imageFile, total int64, o Options) (*partialLayer, error) {
	p := &partialLayer{file: file, sum: sum.NewWriter()}
	p.total.Store(total)
	var err error
	p.w, err = newLayerWriter(ctx, store, o, func(done int64) { o.progress("checkpoint", p.total.Load())(done) })
	if err != nil {
		return nil, err
	}
	p.tree = newTree(p.w.tar, at)
	p.tree.folder(layout.Embedded)
	p.tree.folder(layout.EmbeddedImages)
	return p, nil
}

// write writes the file. After an error, the layer is discarded.
func (p *partialLayer) write(ctx context.Context, r io.Reader) error {
	p.tree.content(layout.EmbeddedImages+"/"+p.file.name, p.file.size, io.TeeReader(capture.NewReader(ctx, r), p.sum))
	if p.tree.err != nil {
		p.discard(ctx)
	}
	return p.tree.err
}

// discard removes the layer.
func (p *partialLayer) discard(ctx context.Context) {
	_, _ = p.w.finish(ctx, fault.Invalid("it is not needed"))
}

// fits tells whether it is the beginning of c's layer, and first the file that was
// read.
func (p *partialLayer) fits(c *capture.Capture, first imageFile) bool {
	return p.file == first && p.tree.time.Equal(newTree(nil, c.Info.Checkpointed).time) &&
		p.sum.Sum().Text == manifestSum(c.Images, first.name)
}

// manifestSum is what stasis.json says of a file, or "".
func manifestSum(dir, name string) string {
	var m struct {
		Files []struct {
			Name string `json:"name"`
			Sum  string `json:"sum"`
		} `json:"files"`
	}
	data, err := capture.ReadSmall(filepath.Join(dir, layout.Manifest), maxMetadata)
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

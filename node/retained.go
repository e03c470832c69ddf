package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/criu"
	"github.com/stasis-run/stasis/checkpoint/layout"
)

// retainedNote says what there is of a container that ended with its dump, when that
// could not be stored.
func retainedNote(id, dir string) string {
	return fmt.Sprintf("its images are in %s: `stasis checkpoint %s --from %s` stores them, `stasis prune` removes them", dir, id, dir)
}

// storeRetained stores what retainedNote told of.
func (n *Node) storeRetained(ctx context.Context, c *client.Client, container client.Container, r *CheckpointRequest) (_ *CheckpointResult, err error) {
	started := time.Now()
	bar := r.Progress.of(container.ID())
	defer bar.end()
	dir, err := filepath.Abs(r.From)
	if err != nil {
		return nil, err
	}
	retained, err := lockWork(dir, unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, fmt.Errorf("another command is at work in %s: %w", dir, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", dir, err)
	}
	defer retained.release()
	ctx, done, err := n.lease(ctx, c.LeasesService())
	if err != nil {
		return nil, err
	}
	defer done()
	d, err := n.newEnded(ctx, c, container)
	if err != nil {
		return nil, err
	}
	if err := d.checkTarget(ctx, r.Ref, r.Format); err != nil {
		return nil, err
	}
	got, err := d.retained(ctx, filepath.Join(dir, layout.Images))
	if err != nil {
		return nil, err
	}
	o, err := storeOptions(ctx, c, r.Compression, bar)
	if err != nil {
		return nil, err
	}
	result, err := n.storeCapture(ctx, d, got, r, o)
	if err != nil {
		return nil, err
	}
	result.Took = time.Since(started)
	if filepath.Dir(dir) == filepath.Join(n.o.State, workFolder) {
		if err := retained.remove(); err != nil {
			result.Note = err.Error()
		}
	}
	return result, n.pushResult(ctx, c, result, r, bar)
}

// retained makes a Capture of the images of a container that ended with their dump, and
// of its files, which nothing has written to since.
func (d *dumper) retained(ctx context.Context, images string) (*capture.Capture, error) {
	img, err := checkpoint.Open(ctx, images)
	if err != nil {
		return nil, err
	}
	namespace := namespaceOf(ctx)
	m := img.Manifest()
	if m == nil {
		// Another runtime's, which tells nothing but when it was made.
		made, err := os.Stat(filepath.Join(images, layout.Inventory))
		if err != nil {
			return nil, err
		}
		m = &checkpoint.Manifest{Exit: true, Created: made.ModTime(), CRIU: criu.LogVersion(filepath.Join(images, layout.DumpLog)),
			Container: checkpoint.Container{ID: d.info.ID, Namespace: namespace}}
	}
	if !m.Exit || m.Container.ID != d.info.ID || m.Container.Namespace != namespace || d.info.CreatedAt.After(m.Created) {
		return nil, fmt.Errorf("%s holds no checkpoint that container %s has ended with: %w", images, d.info.ID, errdefs.ErrFailedPrecondition)
	}
	task, err := d.container.Task(ctx, nil)
	if err == nil {
		status, serr := task.Status(ctx)
		if err = serr; err == nil && status.Status != client.Stopped {
			return nil, fmt.Errorf("it runs again, and its files are not those of the checkpoint any more: %w", errdefs.ErrFailedPrecondition)
		}
	}
	if err != nil && !errdefs.IsNotFound(err) {
		return nil, fmt.Errorf("look at its task: %w", err)
	}
	info, err := d.describe(ctx)
	if err != nil {
		return nil, err
	}
	size, err := sizeOf(images)
	if err != nil {
		return nil, err
	}
	info.Checkpointed, info.CRIU = m.Created, m.CRIU
	info.OCIRuntime = capture.Program{Name: m.Runtime.Name, Version: m.Runtime.Version}
	info.Stats = &capture.Stats{ImageBytes: size}
	return &capture.Capture{Info: info, Images: images, Spec: d.info.Spec.GetValue(), Layer: d.layer("", false)}, nil
}

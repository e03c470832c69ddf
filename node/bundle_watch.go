package node

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/errdefs"
)

// sweepEvery is how often WatchBundles looks for what has ended without an event: what a
// process that died was about to start may come to be after we have looked.
const sweepEvery = time.Minute

// WatchBundles removes bundle containers, and processes added to them, when they have
// ended, and tells of their ends, checkpoints, and processes that the kernel has killed for
// want of memory, until ctx ends. It returns before if the connection to containerd fails.
// started, if not nil, is called when it watches; tell is called from several goroutines.
func (n *Node) WatchBundles(ctx context.Context, started func(), tell func(Event)) error {
	c, err := n.Client(ctx)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	happened, failed, err := subscribe(ctx, c)
	if err != nil {
		return err
	}
	// What ended before we watched; after, so that nothing ends between.
	if err := n.removeAllEnded(ctx, c); err != nil {
		return err
	}
	if started != nil {
		started()
	}
	w := &bundleWatch{n: n, c: c, tell: tell, ended: map[string]time.Time{}}
	defer w.work.Wait()
	sweep := time.NewTicker(sweepEvery)
	defer sweep.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-sweep.C:
			w.do(func() error { return n.removeAllEnded(ctx, c) })
		case err := <-failed:
			return watchFailed(ctx, err)
		case e := <-happened:
			if err := w.happened(ctx, e); err != nil {
				n.log.Warn(err.Error())
			}
		}
	}
}

// bundleWatch is a WatchBundles at work. What takes its time is done beside it.
type bundleWatch struct {
	n    *Node
	c    *client.Client
	tell func(Event)
	work sync.WaitGroup
	// ended are bundle containers whose end was seen a short time ago: an event that
	// comes after it finds no container.
	ended map[string]time.Time
}

func (w *bundleWatch) do(fn func() error) {
	w.work.Go(func() {
		if err := fn(); err != nil {
			w.n.log.Warn(err.Error())
		}
	})
}

func (n *Node) removeAllEnded(ctx context.Context, c *client.Client) error {
	containers, err := c.Containers(ctx, fmt.Sprintf("labels.%q", labelBundle))
	if err != nil {
		return fmt.Errorf("list containers: %w", err)
	}
	for _, container := range containers {
		info, err := container.Info(ctx, client.WithoutRefreshedMetadata)
		if err == nil && isBundle(info) {
			err = n.removeEnded(ctx, c, container)
		}
		if err != nil && !errdefs.IsNotFound(err) {
			n.log.Warn(err.Error())
		}
	}
	return nil
}

// happened looks at one event.
func (w *bundleWatch) happened(ctx context.Context, envelope *events.Envelope) error {
	e, err := eventOf(envelope)
	if err != nil || e == nil {
		return err
	}
	switch e.Type {
	case EventExit, EventOOM, EventCheckpoint:
	default:
		return nil
	}
	container, err := w.c.LoadContainer(ctx, e.Container)
	if _, seen := w.ended[e.Container]; seen && errdefs.IsNotFound(err) && e.Process == "" {
		w.tell(*e)
		return nil
	}
	if err != nil {
		return ignoreNotFound(err)
	}
	info, err := container.Info(ctx, client.WithoutRefreshedMetadata)
	if err != nil || !isBundle(info) {
		return ignoreNotFound(err)
	}
	switch {
	case strings.HasPrefix(e.Process, execPrefix):
		w.do(func() error { return removeExec(ctx, container, e.Process) })
	case e.Process != "":
	case e.Type == EventExit:
		for id, at := range w.ended {
			if time.Since(at) > sweepEvery {
				delete(w.ended, id)
			}
		}
		w.ended[e.Container] = time.Now()
		w.do(func() error {
			// First: who hears of the end may use the name again.
			err := w.n.removeEnded(ctx, w.c, container)
			w.tell(*e)
			return ignoreNotFound(err)
		})
	default:
		w.tell(*e)
	}
	return nil
}

// removeExec removes a process that was added to a container, and has ended.
func removeExec(ctx context.Context, container client.Container, exec string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), deleteTime)
	defer cancel()
	task, err := container.Task(ctx, nil)
	if err != nil {
		return ignoreNotFound(err)
	}
	p, err := task.LoadProcess(ctx, exec, nil)
	if err != nil {
		return ignoreNotFound(err)
	}
	_, err = p.Delete(ctx)
	return ignoreNotFound(err)
}

func ignoreNotFound(err error) error {
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

package node

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	apievents "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
)

// sweepEvery is how often WatchBundles looks for what has ended without an event: what a
// process that died was about to start may come to be after we have looked.
const sweepEvery = time.Minute

// Event is what happened to a bundle container.
type Event struct {
	// Type is "exit" of its main process, "oom": the kernel has killed one of its
	// processes for want of memory, or "checkpoint".
	Type      string
	Container string
	Status    uint32 // of an exit: the exit code, or 128 and the signal
	Time      time.Time
}

// WatchBundles removes bundle containers, and processes added to them, when they have
// ended, and tells what happens to those that are there, until ctx ends. It returns before
// if the connection to containerd fails. started, if not nil, is called when it watches;
// tell is called from several goroutines.
func (n *Node) WatchBundles(ctx context.Context, started func(), tell func(Event)) error {
	c, err := n.Client(ctx)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	happened, failed := c.EventService().Subscribe(ctx,
		`topic=="/tasks/exit"`, `topic=="/tasks/oom"`, `topic=="/tasks/checkpointed"`)
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
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return unavailable{fmt.Errorf("watch containerd's events: %w", errors.Join(err, errdefs.ErrUnavailable))}
		case e := <-happened:
			if e.Namespace != namespaceOf(ctx) {
				continue
			}
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
	v, err := typeurl.UnmarshalAny(envelope.Event)
	if err != nil {
		return fmt.Errorf("event %s: %w", envelope.Topic, err)
	}
	e := Event{Time: envelope.Timestamp}
	exec := ""
	switch v := v.(type) {
	case *apievents.TaskExit:
		e.Type, e.Container, e.Status = "exit", v.ContainerID, v.ExitStatus
		if v.ID != v.ContainerID {
			exec = v.ID
		}
	case *apievents.TaskOOM:
		e.Type, e.Container = "oom", v.ContainerID
	case *apievents.TaskCheckpointed:
		e.Type, e.Container = "checkpoint", v.ContainerID
	default:
		return nil
	}
	container, err := w.c.LoadContainer(ctx, e.Container)
	if _, seen := w.ended[e.Container]; seen && errdefs.IsNotFound(err) && exec == "" {
		w.tell(e)
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
	case exec != "" && strings.HasPrefix(exec, execPrefix):
		w.do(func() error { return removeExec(ctx, container, exec) })
	case exec != "":
	case e.Type == "exit":
		for id, at := range w.ended {
			if time.Since(at) > sweepEvery {
				delete(w.ended, id)
			}
		}
		w.ended[e.Container] = time.Now()
		w.do(func() error {
			// First: who hears of the end may use the name again.
			err := w.n.removeEnded(ctx, w.c, container)
			w.tell(e)
			return ignoreNotFound(err)
		})
	default:
		w.tell(e)
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

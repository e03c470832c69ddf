package node

import (
	"context"
	"errors"
	"fmt"
	"strings"
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
// if the connection to containerd fails. started, if not nil, is called when it watches.
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
	sweep := time.NewTicker(sweepEvery)
	defer sweep.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-sweep.C:
			if err := n.removeAllEnded(ctx, c); err != nil {
				n.log.Warn(err.Error())
			}
		case err := <-failed:
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return unavailable{fmt.Errorf("watch containerd's events: %w", errors.Join(err, errdefs.ErrUnavailable))}
		case e := <-happened:
			if e.Namespace != namespaceOf(ctx) {
				continue
			}
			if err := n.happened(ctx, c, e, tell); err != nil {
				n.log.Warn(err.Error())
			}
		}
	}
}

func (n *Node) removeAllEnded(ctx context.Context, c *client.Client) error {
	containers, err := c.Containers(ctx, fmt.Sprintf("labels.%q", labelBundle))
	if err != nil {
		return fmt.Errorf("list containers: %w", err)
	}
	for _, container := range containers {
		if err := n.removeEnded(ctx, c, container); err != nil && !errdefs.IsNotFound(err) {
			n.log.Warn(err.Error())
		}
	}
	return nil
}

// happened looks at one event.
func (n *Node) happened(ctx context.Context, c *client.Client, envelope *events.Envelope, tell func(Event)) error {
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
	container, err := c.LoadContainer(ctx, e.Container)
	if err != nil {
		return ignoreNotFound(err)
	}
	labels, err := container.Labels(ctx)
	if err != nil || labels[labelBundle] == "" {
		return ignoreNotFound(err)
	}
	switch {
	case exec != "":
		if !strings.HasPrefix(exec, execPrefix) {
			return nil
		}
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
	case e.Type == "exit":
		// First: who hears of the end may use the name again.
		err = n.removeEnded(ctx, c, container)
	}
	tell(e)
	return err
}

func ignoreNotFound(err error) error {
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

package node

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"time"

	apievents "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/emptypb"
)

// Types of events.
const (
	EventCreate     = "create"
	EventStart      = "start"
	EventExec       = "exec" // a process was added, and runs
	EventExit       = "exit" // of a process
	EventOOM        = "oom"  // the kernel has killed a process for want of memory
	EventPause      = "pause"
	EventResume     = "resume"
	EventCheckpoint = "checkpoint"
	EventDelete     = "delete" // the container has no task any more
)

// Event is what happened to a container.
type Event struct {
	Type      string
	Container string
	Process   string // the ID of one that was added to the container; empty: its main process
	Pid       uint32 // 0: the event does not tell
	Status    uint32 // of an exit, and a delete: the exit code, or 128 and the signal
	Time      time.Time
}

// Watch tells what happens to the containers in the namespace of ctx, in order, until ctx
// ends. It returns before if the connection to containerd fails. started is called before
// the first event; what happens after that is not missed.
func (n *Node) Watch(ctx context.Context, started func(), tell func(Event)) error {
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
	started()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case err := <-failed:
			return watchFailed(ctx, err)
		case envelope := <-happened:
			e, err := eventOf(envelope)
			if err != nil {
				n.log.Warn(err.Error())
			} else if e != nil {
				tell(*e)
			}
		}
	}
}

// watchFailed is the error of a subscription that has ended.
func watchFailed(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return unavailable{fmt.Errorf("watch containerd's events: %w", errors.Join(err, errdefs.ErrUnavailable))}
}

// subscribe subscribes to containerd's events of tasks in the namespace of ctx, until that
// ends. What happens after subscribe has returned is not missed: containerd does not say
// when a subscription begins, so an event of our own is waited for.
func subscribe(ctx context.Context, c *client.Client) (<-chan *events.Envelope, <-chan error, error) {
	mark := "/stasis/watching/" + rand.Text()
	of := fmt.Sprintf(",namespace==%q", namespaceOf(ctx))
	happened, failed := c.EventService().Subscribe(ctx, `topic~="^/tasks/"`+of, fmt.Sprintf("topic==%q", mark)+of)
	again := time.NewTicker(100 * time.Millisecond) // it may have been told before we listened
	defer again.Stop()
	for {
		if err := c.EventService().Publish(ctx, mark, &emptypb.Empty{}); err != nil {
			return nil, nil, watchFailed(ctx, err)
		}
		for waiting := true; waiting; {
			select {
			case <-ctx.Done():
				return nil, nil, context.Cause(ctx)
			case err := <-failed:
				return nil, nil, watchFailed(ctx, err)
			case e := <-happened:
				if e.Topic == mark {
					return happened, failed, nil
				}
			case <-again.C:
				waiting = false
			}
		}
	}
}

// eventOf is an event of containerd's. It is nil for one that is about no task, and for a
// process that was added and does not run yet.
func eventOf(envelope *events.Envelope) (*Event, error) {
	if envelope.Event == nil {
		return nil, nil
	}
	v, err := typeurl.UnmarshalAny(envelope.Event)
	if err != nil {
		return nil, fmt.Errorf("event %s: %w", envelope.Topic, err)
	}
	e := &Event{Time: envelope.Timestamp}
	switch v := v.(type) {
	case *apievents.TaskCreate:
		e.Type, e.Container, e.Pid = EventCreate, v.ContainerID, v.Pid
	case *apievents.TaskStart:
		e.Type, e.Container, e.Pid = EventStart, v.ContainerID, v.Pid
	case *apievents.TaskExecStarted:
		e.Type, e.Container, e.Process, e.Pid = EventExec, v.ContainerID, v.ExecID, v.Pid
	case *apievents.TaskExit:
		e.Type, e.Container, e.Pid, e.Status = EventExit, v.ContainerID, v.Pid, v.ExitStatus
		if v.ID != v.ContainerID {
			e.Process = v.ID
		}
	case *apievents.TaskOOM:
		e.Type, e.Container = EventOOM, v.ContainerID
	case *apievents.TaskPaused:
		e.Type, e.Container = EventPause, v.ContainerID
	case *apievents.TaskResumed:
		e.Type, e.Container = EventResume, v.ContainerID
	case *apievents.TaskCheckpointed:
		e.Type, e.Container = EventCheckpoint, v.ContainerID
	case *apievents.TaskDelete:
		e.Type, e.Container, e.Pid, e.Status = EventDelete, v.ContainerID, v.Pid, v.ExitStatus
		if v.ID != "" && v.ID != v.ContainerID {
			return nil, nil // of a process that was added; its exit was told
		}
	default:
		return nil, nil
	}
	return e, nil
}

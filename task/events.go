package task

import (
	"fmt"

	"github.com/containerd/containerd/api/events"
)

// topics are containerd's names for the kinds of task events.
func topic(event any) string {
	switch event.(type) {
	case *events.TaskCreate:
		return "/tasks/create"
	case *events.TaskStart:
		return "/tasks/start"
	case *events.TaskOOM:
		return "/tasks/oom"
	case *events.TaskExit:
		return "/tasks/exit"
	case *events.TaskDelete:
		return "/tasks/delete"
	case *events.TaskExecAdded:
		return "/tasks/exec-added"
	case *events.TaskExecStarted:
		return "/tasks/exec-started"
	case *events.TaskPaused:
		return "/tasks/paused"
	case *events.TaskResumed:
		return "/tasks/resumed"
	case *events.TaskCheckpointed:
		return "/tasks/checkpointed"
	}
	panic(fmt.Sprintf("no topic for %T", event)) // a programming error
}

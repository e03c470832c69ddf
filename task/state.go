package task

import (
	"fmt"

	tasktypes "github.com/containerd/containerd/api/types/task"
)

// State is where a process is in its life. For init it is the container's.
type State int

// What each state allows (an exec has no Pausing and Paused of its own; it
// shows its container's):
//
//	           start pause resume checkpoint update exec kill resize delete
//	Created      x                             x     x    x     x      x
//	Running            x            x          x     x    x     x
//	Pausing                                    x          x     x
//	Paused                    x     x          x          x     x
//	Stopped                                                            x
//
// Start leads from Created to Running, pause by way of Pausing to Paused, resume
// back to Running, and an exit from anywhere to Stopped. A checkpoint leaves the
// state alone; one that ends the container ends in an exit. A query never
// changes a state.
const (
	Created State = iota
	Running
	Pausing
	Paused
	Stopped
)

var stateNames = [...]string{"created", "running", "pausing", "paused", "stopped"}

func (s State) String() string { return stateNames[s] }

// status is the state as containerd names it.
func (s State) status() tasktypes.Status {
	return [...]tasktypes.Status{
		Created: tasktypes.Status_CREATED,
		Running: tasktypes.Status_RUNNING,
		Pausing: tasktypes.Status_PAUSING,
		Paused:  tasktypes.Status_PAUSED,
		Stopped: tasktypes.Status_STOPPED,
	}[s]
}

// op is an operation that not every state allows.
type op int

const (
	opStart op = iota
	opPause
	opResume
	opCheckpoint
	opUpdate
	opExec
	opKill
	opResize
	opDelete
)

var opNames = [...]string{"start", "pause", "resume", "checkpoint", "update", "exec in", "kill", "resize", "delete"}

// allowed is the table above.
var allowed = [...][opDelete + 1]bool{
	Created: {opStart: true, opUpdate: true, opExec: true, opKill: true, opResize: true, opDelete: true},
	Running: {opPause: true, opCheckpoint: true, opUpdate: true, opExec: true, opKill: true, opResize: true},
	Pausing: {opUpdate: true, opKill: true, opResize: true},
	Paused:  {opResume: true, opCheckpoint: true, opUpdate: true, opKill: true, opResize: true},
	Stopped: {opDelete: true},
}

// check returns an error unless a process of the given kind ("container" or
// "process") in state s allows o. It has no error class: that is what
// upstream's shim answers.
func (s State) check(o op, kind, id string) error {
	if allowed[s][o] {
		return nil
	}
	return fmt.Errorf("cannot %s a %s %s: %s is %s", opNames[o], s, kind, id, s)
}

package node

import (
	"testing"
	"time"

	apievents "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/emptypb"
)

// TestEventOf: each event of containerd's about a task is told as what it is.
func TestEventOf(t *testing.T) {
	at := time.Now()
	for name, tt := range map[string]struct {
		event any
		want  Event
	}{
		"create":     {&apievents.TaskCreate{ContainerID: "c", Pid: 7}, Event{Type: EventCreate, Container: "c", Pid: 7}},
		"start":      {&apievents.TaskStart{ContainerID: "c", Pid: 7}, Event{Type: EventStart, Container: "c", Pid: 7}},
		"exec added": {&apievents.TaskExecAdded{ContainerID: "c", ExecID: "e"}, Event{}},
		"exec":       {&apievents.TaskExecStarted{ContainerID: "c", ExecID: "e", Pid: 8}, Event{Type: EventExec, Container: "c", Process: "e", Pid: 8}},
		"exit":       {&apievents.TaskExit{ContainerID: "c", ID: "c", Pid: 7, ExitStatus: 137}, Event{Type: EventExit, Container: "c", Pid: 7, Status: 137}},
		"exit of exec": {&apievents.TaskExit{ContainerID: "c", ID: "e", Pid: 8, ExitStatus: 1},
			Event{Type: EventExit, Container: "c", Process: "e", Pid: 8, Status: 1}},
		"oom":            {&apievents.TaskOOM{ContainerID: "c"}, Event{Type: EventOOM, Container: "c"}},
		"pause":          {&apievents.TaskPaused{ContainerID: "c"}, Event{Type: EventPause, Container: "c"}},
		"resume":         {&apievents.TaskResumed{ContainerID: "c"}, Event{Type: EventResume, Container: "c"}},
		"checkpoint":     {&apievents.TaskCheckpointed{ContainerID: "c"}, Event{Type: EventCheckpoint, Container: "c"}},
		"delete":         {&apievents.TaskDelete{ContainerID: "c", Pid: 7, ExitStatus: 2}, Event{Type: EventDelete, Container: "c", Pid: 7, Status: 2}},
		"delete, by ID":  {&apievents.TaskDelete{ContainerID: "c", ID: "c", Pid: 7}, Event{Type: EventDelete, Container: "c", Pid: 7}},
		"delete of exec": {&apievents.TaskDelete{ContainerID: "c", ID: "e", Pid: 8}, Event{}},
		"of no task":     {&apievents.ImageCreate{Name: "c"}, Event{}},
		"mark":           {&emptypb.Empty{}, Event{}},
	} {
		data, err := typeurl.MarshalAny(tt.event)
		if err != nil {
			t.Fatal(err)
		}
		got, err := eventOf(&events.Envelope{Timestamp: at, Event: data})
		if tt.want.Type == "" {
			if got != nil || err != nil {
				t.Errorf("%s: %+v, %v", name, got, err)
			}
			continue
		}
		tt.want.Time = at
		if err != nil || got == nil || *got != tt.want {
			t.Errorf("%s: %+v, %v, want %+v", name, got, err, tt.want)
		}
	}
	if got, err := eventOf(&events.Envelope{}); got != nil || err != nil {
		t.Errorf("nothing: %+v, %v", got, err)
	}
}

package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/runc/options"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/typeurl/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/stasis-run/stasis/integration/stack"
)

// TestTaskCalls takes a container and its execs through their lives on
// upstream's shim and on Stasis, and compares all answers and events.
func TestTaskCalls(t *testing.T) {
	t.Parallel()
	for name, crun := range map[string]bool{"runc": false, "crun": true} {
		t.Run(name, func(t *testing.T) {
			// A folder that crun makes itself.
			upstream, upstreamEvents := trace(t, startShim(t, stack.Options{Upstream: true, Crun: crun}))
			answers, evs := trace(t, startShim(t, stack.Options{Crun: crun}))
			compare(t, "answers", upstream, answers)
			// Upstream's shim does not tell of checkpoints, though
			// containerd has an event for them.
			want := `/tasks/checkpointed TaskCheckpointed {"checkpoint":"DIR/checkpoint","containerId":"c"}`
			i := slices.Index(evs, want)
			if i < 0 {
				t.Fatalf("no event %s in:\n%s", want, strings.Join(evs, "\n"))
			}
			compare(t, "events", upstreamEvents, slices.Delete(evs, i, i+1))
		})
	}
}

// compare reports how a trace differs from upstream's.
func compare(t *testing.T, what string, upstream, stasis []string) {
	t.Helper()
	for i := range max(len(upstream), len(stasis)) {
		var u, s string
		if i < len(upstream) {
			u = upstream[i]
		}
		if i < len(stasis) {
			s = stasis[i]
		}
		if u != s {
			t.Errorf("%s: item %d:\n%s\nupstream's:\n%s", what, i, s, u)
		}
	}
}

// trace makes all of the service's calls and returns their answers, and the
// events that there were.
func trace(t *testing.T, sh *taskShim) (answers, evs []string) {
	t.Helper()
	ctx := sh.ctx
	watch := watchEvents(t, sh.s)
	n := normal{s: sh.s, pids: map[string]string{}}
	exits := 0
	answer := func(m proto.Message, err error) {
		t.Helper()
		sh.must(fmt.Sprintf("call %d", len(answers)), err)
		answers = append(answers, n.message(t, m))
	}
	state := func(execID string) {
		t.Helper()
		answer(sh.State(ctx, &taskapi.StateRequest{ID: "c", ExecID: execID}))
	}
	connect := func() {
		t.Helper()
		answer(sh.Connect(ctx, &taskapi.ConnectRequest{ID: "c"}))
	}
	wait := func(execID string) {
		t.Helper()
		answer(sh.Wait(ctx, &taskapi.WaitRequest{ID: "c", ExecID: execID}))
		// Upstream's shim answers before it publishes.
		exits++
		watch.waitFor(ctx, "/tasks/exit", exits)
	}
	start := func(execID string) {
		t.Helper()
		answer(sh.Start(ctx, &taskapi.StartRequest{ID: "c", ExecID: execID}))
	}
	kill := func(execID string, sig unix.Signal, all bool) {
		t.Helper()
		answer(sh.Kill(ctx, &taskapi.KillRequest{ID: "c", ExecID: execID, Signal: uint32(sig), All: all}))
	}
	remove := func(execID string) {
		t.Helper()
		answer(sh.Delete(ctx, &taskapi.DeleteRequest{ID: "c", ExecID: execID}))
	}
	exec := func(r *taskapi.ExecProcessRequest) {
		t.Helper()
		r.ID = "c"
		answer(sh.Exec(ctx, r))
	}
	// pids prints them in an order that is not theirs.
	pids := func() {
		t.Helper()
		resp, err := sh.Pids(ctx, &taskapi.PidsRequest{ID: "c"})
		sh.must("pids", err)
		slices.SortFunc(resp.Processes, func(a, b *tasktypes.ProcessInfo) int {
			return strings.Compare(details(t, a), details(t, b))
		})
		answer(resp, nil)
	}

	connect()
	r := sh.createRequest("c", stack.Args("sh", "-c", "sleep 1000 & wait"))
	sh.deleteAfter("c")
	answer(sh.Create(ctx, r))
	state("")
	connect()
	pids()
	start("")
	state("")

	exec(&taskapi.ExecProcessRequest{ExecID: "e", Spec: sh.process("sleep", "1000")})
	state("e")
	start("e")
	state("e")
	kill("e", unix.SIGTERM, false)
	wait("e")
	state("e")
	remove("e")

	exec(&taskapi.ExecProcessRequest{ExecID: "status", Spec: sh.process("sh", "-c", "exit 7")})
	start("status")
	wait("status")
	state("status")
	remove("status")

	exec(&taskapi.ExecProcessRequest{ExecID: "terminal", Terminal: true, Stdout: sh.fifo("terminal"), Spec: sh.process("sleep", "1000")})
	start("terminal")
	state("terminal")
	answer(sh.ResizePty(ctx, &taskapi.ResizePtyRequest{ID: "c", ExecID: "terminal", Width: 100, Height: 50}))
	answer(sh.CloseIO(ctx, &taskapi.CloseIORequest{ID: "c", ExecID: "terminal", Stdin: true}))
	// The shell has started its child by then.
	sh.s.Poll(ctx, "three processes", func() bool {
		resp, err := sh.Pids(ctx, &taskapi.PidsRequest{ID: "c"})
		return err == nil && len(resp.Processes) == 3
	})
	pids()

	answer(sh.Pause(ctx, &taskapi.PauseRequest{ID: "c"}))
	state("")
	state("terminal")
	answer(sh.Update(ctx, &taskapi.UpdateTaskRequest{ID: "c", Resources: sh.any(&specs.LinuxResources{Pids: &specs.LinuxPids{Limit: new(int64(77))}})}))
	answer(sh.Resume(ctx, &taskapi.ResumeRequest{ID: "c"}))
	state("")
	stats, err := sh.Stats(ctx, &taskapi.StatsRequest{ID: "c"})
	sh.must("stats", err)
	answers = append(answers, "stats "+stats.Stats.TypeUrl)
	kill("terminal", unix.SIGKILL, false)
	wait("terminal")
	remove("terminal")

	// Crun wants the folder to exist, so that no checkpoint works under upstream's
	// shim with crun unless the caller makes one.
	work := filepath.Join(sh.s.Dir, "work")
	sh.must("mkdir", os.Mkdir(work, 0o700))
	answer(sh.Checkpoint(ctx, &taskapi.CheckpointTaskRequest{ID: "c", Path: sh.s.Dir + "/checkpoint", Options: sh.any(&options.CheckpointOptions{WorkPath: work})}))
	state("")

	exec(&taskapi.ExecProcessRequest{ExecID: "all", Spec: sh.process("sleep", "1000")})
	start("all")
	kill("", unix.SIGKILL, true)
	wait("all")
	wait("")
	state("")
	state("all")
	remove("all")
	remove("")
	connect()

	watch.waitFor(ctx, "/tasks/delete", 1)
	n.pids = map[string]string{}
	for _, e := range watch.get() {
		v, err := typeurl.UnmarshalAny(e.Event)
		sh.must(e.Topic, err)
		if v.(containerEvent).GetContainerID() == "c" {
			evs = append(evs, e.Topic+" "+n.message(t, v.(containerEvent)))
		}
	}
	return answers, evs
}

// details is what a list of processes is sorted by: the exec's ID.
func details(t *testing.T, p *tasktypes.ProcessInfo) string {
	t.Helper()
	if p.Info == nil {
		return ""
	}
	v, err := typeurl.UnmarshalAny(p.Info)
	if err != nil {
		t.Fatal(err)
	}
	return v.(*options.ProcessDetails).ExecID
}

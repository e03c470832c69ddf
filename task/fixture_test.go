package task

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/process"
	"github.com/stasis-run/stasis/process/processtest"
)

// fixture is a service with a fake runtime, and the bundle of one container, c.
type fixture struct {
	*testing.T
	s      *Service
	rt     *processtest.Runtime
	log    *eventLog
	policy *fakePolicy
	bundle string
	spec   *specs.Spec // written by create
	keys   string      // the node's folder for keys and configuration
	// softDirty: the kernel tracks which pages are written to.
	softDirty bool
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	processtest.InstallCRIU(t)
	f := &fixture{
		T:      t,
		rt:     processtest.NewRuntime(t),
		log:    &eventLog{more: make(chan struct{})},
		policy: &fakePolicy{},
		bundle: filepath.Join(t.TempDir(), "bundle"),
		keys:   t.TempDir(),
	}
	f.rt.Group = processtest.NewGroup(t)
	f.spec = &specs.Spec{
		Version: "1.0.2",
		Root:    &specs.Root{Path: "rootfs"},
		Process: &specs.Process{Args: []string{"cat"}, Cwd: "/"},
		Linux:   &specs.Linux{CgroupsPath: f.rt.Group},
	}
	t.Setenv("STASIS_CONFIG_DIR", f.keys)
	must(t, os.Mkdir(f.bundle, 0o700))
	must(t, os.Mkdir(filepath.Join(f.bundle, "rootfs"), 0o755))
	must(t, os.Mkdir(filepath.Join(f.bundle, "work"), 0o700))
	f.newService()
	return f
}

// newService is a shim that starts; only the bundle is as before.
func (f *fixture) newService() {
	f.s = newService(Config{Namespace: "test", Publish: f.log.publish, Shutdown: func() { f.log.add("shutdown") }}, testReaper())
	f.s.newRuntime = f.rt.For
	f.s.policy = f.policy
	f.s.softDirty = func() bool { return f.softDirty }
	s := f.s
	f.Cleanup(func() {
		f.rt.EndAll()
		for _, p := range s.procs() {
			if !f.Failed() {
				<-p.exited // it writes to the bundle before
			}
		}
		s.Close()
	})
}

// procs are the processes that there are.
func (s *Service) procs() (all []*proc) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.containers {
		if c == nil {
			continue
		}
		c.mu.Lock()
		for _, p := range append(slices.Collect(maps.Values(c.execs)), c.init) {
			if p.child != nil {
				all = append(all, p)
			}
		}
		c.mu.Unlock()
	}
	return all
}

// createRequest writes config.json.
func (f *fixture) createRequest() *taskapi.CreateTaskRequest {
	f.Helper()
	data, err := json.Marshal(f.spec)
	must(f.T, err)
	must(f.T, os.WriteFile(filepath.Join(f.bundle, "config.json"), data, 0o600))
	return &taskapi.CreateTaskRequest{ID: "c", Bundle: f.bundle}
}

func (f *fixture) create() {
	f.Helper()
	_, err := f.s.Create(f.Context(), f.createRequest())
	must(f.T, err)
}

func (f *fixture) start(execID string) {
	f.Helper()
	_, err := f.s.Start(f.Context(), &taskapi.StartRequest{ID: "c", ExecID: execID})
	must(f.T, err)
}

// run is create and start.
func (f *fixture) run() {
	f.Helper()
	f.create()
	f.start("")
}

func (f *fixture) addExec(id string) error {
	_, err := f.s.Exec(f.Context(), &taskapi.ExecProcessRequest{ID: "c", ExecID: id, Spec: &anypb.Any{Value: []byte(`{"args": ["cat"], "cwd": "/"}`)}})
	return err
}

// exec runs an exec.
func (f *fixture) exec(id string) {
	f.Helper()
	must(f.T, f.addExec(id))
	f.start(id)
}

func (f *fixture) kill(sig uint32) error {
	_, err := f.s.Kill(f.Context(), &taskapi.KillRequest{ID: "c", Signal: sig})
	return err
}

func (f *fixture) delete(execID string) (*taskapi.DeleteResponse, error) {
	return f.s.Delete(f.Context(), &taskapi.DeleteRequest{ID: "c", ExecID: execID})
}

func (f *fixture) status(execID string) tasktypes.Status {
	f.Helper()
	st, err := f.s.State(f.Context(), &taskapi.StateRequest{ID: "c", ExecID: execID})
	must(f.T, err)
	return st.Status
}

// wantStatus fails the test unless a process's status is want.
func (f *fixture) wantStatus(execID string, want tasktypes.Status) {
	f.Helper()
	if got := f.status(execID); got != want {
		f.Errorf("status of %q: %s, want %s", execID, got, want)
	}
}

// reaped waits until a process has ended and was waited for, whether or not that was
// published.
func (f *fixture) reaped(execID string) {
	f.Helper()
	c, p, err := f.s.findProc("c", execID)
	must(f.T, err)
	c.mu.Lock()
	child := p.child
	c.mu.Unlock()
	select {
	case <-child.Done():
	case <-f.Context().Done():
		f.Fatalf("process %q does not end", execID)
	}
}

// frozen asks the kernel.
func (f *fixture) frozen() bool {
	f.Helper()
	cg, err := process.LoadCgroup(f.rt.Pid(""), f.rt.Group)
	must(f.T, err)
	frozen, err := cg.Frozen()
	must(f.T, err)
	return frozen
}

// nothingLeft fails the test if a container has left something.
func (f *fixture) nothingLeft() {
	f.Helper()
	if pids := f.rt.Living(); len(pids) > 0 {
		f.Errorf("processes %d are left", pids)
	}
	if f.rt.Known() {
		f.Error("the runtime knows the container")
	}
	f.s.mu.Lock()
	defer f.s.mu.Unlock()
	if len(f.s.containers) > 0 {
		f.Errorf("the service has containers: %v", f.s.containers)
	}
}

// async is a call that the test goes on beside.
func async(fn func() error) (result <-chan error) {
	done := make(chan error, 1)
	go func() { done <- fn() }()
	return done
}

// eventLog is what was published, a line each.
type eventLog struct {
	mu    sync.Mutex
	lines []string
	more  chan struct{} // closed with the next line
	// before, if not nil, is called before a line is added, where it is published.
	before func(line string)
}

func (l *eventLog) publish(topic string, event any) {
	name := strings.TrimPrefix(topic, "/tasks/")
	switch e := event.(type) {
	case *events.TaskExit:
		name += fmt.Sprintf(" %s %d", e.ID, e.ExitStatus)
	case *events.TaskExecAdded:
		name += " " + e.ExecID
	case *events.TaskExecStarted:
		name += " " + e.ExecID
	}
	l.add(name)
}

func (l *eventLog) add(line string) {
	if l.before != nil {
		l.before(line)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, line)
	close(l.more)
	l.more = make(chan struct{})
}

func (l *eventLog) all() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.lines)
}

// isHeldBack waits until the goroutine that would publish an exit waits in the given
// way; or the line is published, which it should not be yet.
func (f *fixture) isHeldBack(line, way string) {
	if !f.waits("task.(*proc).live(", way, func() bool { return slices.Contains(f.log.all(), line) }) {
		f.Errorf("%q was published too early", line)
	}
}

// waits returns when a goroutine waits in the function fn in the given way, which is the
// runtime's name for it. It returns false if something happens first.
func (f *fixture) waits(fn, way string, happens func() bool) bool {
	buf := make([]byte, 1<<20)
	for f.Context().Err() == nil {
		stacks := string(buf[:runtime.Stack(buf, true)])
		for stack := range strings.SplitSeq(stacks, "\n\n") {
			head, _, _ := strings.Cut(stack, "\n")
			if strings.Contains(head, "["+way) && strings.Contains(stack, fn) {
				return true
			}
		}
		if happens() {
			return false
		}
		runtime.Gosched()
	}
	return false
}

// Ways to wait.
const (
	forALock   = "sync.Mutex.Lock"
	forAnother = "sync.WaitGroup.Wait"
	inASelect  = "select"
)

// await waits for a line.
func (f *fixture) await(line string) {
	f.Helper()
	for {
		f.log.mu.Lock()
		found, more := slices.Contains(f.log.lines, line), f.log.more
		f.log.mu.Unlock()
		if found {
			return
		}
		select {
		case <-more:
		case <-f.Context().Done():
			f.Fatalf("no event %q; there were %q", line, f.log.all())
		}
	}
}

// wantEvents fails the test unless these were published, and no other.
func (f *fixture) wantEvents(want ...string) {
	f.Helper()
	if got := f.log.all(); !slices.Equal(got, want) {
		f.Errorf("events %q\n    want %q", got, want)
	}
}

// fakePolicy allows everything, but for what a test has put in.
type fakePolicy struct {
	rootfs    string // that CheckMounts was asked about last
	check     func() error
	mounts    func() error
	processes func(ctx context.Context, pids []int) error
}

func (p *fakePolicy) Check(context.Context, *checkpoint.Checkpoint, *specs.Spec) error {
	if p.check == nil {
		return nil
	}
	return p.check()
}

func (p *fakePolicy) CheckMounts(_ context.Context, _ *checkpoint.Checkpoint, _ *specs.Spec, rootfs string) error {
	p.rootfs = rootfs
	if p.mounts == nil {
		return nil
	}
	return p.mounts()
}

func (p *fakePolicy) CheckProcesses(ctx context.Context, _ *specs.Spec, pids []int) error {
	if p.processes == nil {
		return nil
	}
	return p.processes(ctx, pids)
}

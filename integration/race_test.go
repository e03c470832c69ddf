package integration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	eventsapi "github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/typeurl/v2"
	"golang.org/x/sync/errgroup"

	"github.com/stasis-run/stasis/integration/stack"
)

// The tests of this file make two things happen at once that the shim must tell
// apart, by holding the OCI runtime in between. Every one of them checks the
// order of all events that it caused; see journal.

// A journal has all task events of a stack, and checks that they tell stories
// that can be true:
//
//	create < start < exits of execs < exit of init < delete
//	no exit of an exec without its start
type journal struct {
	t *testing.T
	s *stack.Stack
	// crashes says that shims or containerd are killed. Then events may be
	// missing, or come twice; their order stays.
	crashes bool

	mu      sync.Mutex
	all     []taskEvent
	changed chan struct{} // closed and replaced with each event
	marks   map[string]bool
}

// A taskEvent is what matters of one.
type taskEvent struct {
	topic, id, exec string // exec is empty for init
	pid, status     uint32
}

func (e taskEvent) String() string {
	return fmt.Sprintf("%s %s %s pid %d status %d", e.topic, e.id, e.exec, e.pid, e.status)
}

// keepJournal records the events of a stack from now on, and checks them when
// the test ends.
func keepJournal(t *testing.T, s *stack.Stack) *journal {
	t.Helper()
	j := &journal{t: t, s: s, changed: make(chan struct{}), marks: map[string]bool{}}
	// The stack's own context ends before the test's cleanup begins.
	ctx, cancel := context.WithCancel(namespaces.WithNamespace(context.Background(), s.Namespace))
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			j.follow(ctx)
		}
	}()
	t.Cleanup(func() {
		j.sync(ctx)
		cancel()
		<-done
		j.check()
	})
	j.sync(ctx)
	return j
}

// follow records events until the connection breaks.
func (j *journal) follow(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ch, errs := j.s.Client().EventService().Subscribe(ctx, `topic~="^/tasks/"`)
	for {
		select {
		case <-errs:
			return
		case ev := <-ch:
			v, err := typeurl.UnmarshalAny(ev.Event)
			if err != nil {
				j.t.Errorf("event %s: %v", ev.Topic, err)
				continue
			}
			e := taskEvent{topic: strings.TrimPrefix(ev.Topic, "/tasks/")}
			switch v := v.(type) {
			case *eventsapi.TaskCreate:
				e.id, e.pid = v.ContainerID, v.Pid
			case *eventsapi.TaskStart:
				e.id, e.pid = v.ContainerID, v.Pid
			case *eventsapi.TaskExecAdded:
				e.id, e.exec = v.ContainerID, v.ExecID
			case *eventsapi.TaskExecStarted:
				e.id, e.exec, e.pid = v.ContainerID, v.ExecID, v.Pid
			case *eventsapi.TaskExit:
				e.id, e.pid, e.status = v.ContainerID, v.Pid, v.ExitStatus
				if v.ID != v.ContainerID {
					e.exec = v.ID
				}
			case *eventsapi.TaskDelete:
				e.id, e.pid, e.status = v.ContainerID, v.Pid, v.ExitStatus
			case *eventsapi.TaskOOM:
				e.id = v.ContainerID
			case *eventsapi.TaskPaused:
				e.id = v.ContainerID
			case *eventsapi.TaskResumed:
				e.id = v.ContainerID
			case *eventsapi.TaskCheckpointed:
				e.id = v.ContainerID
			}
			j.add(e)
		}
	}
}

func (j *journal) add(e taskEvent) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if e.topic == "mark" {
		j.marks[e.id] = true
	} else {
		j.all = append(j.all, e)
	}
	close(j.changed)
	j.changed = make(chan struct{})
}

// sync returns when all events have been recorded that containerd has got.
func (j *journal) sync(ctx context.Context) {
	j.t.Helper()
	ctx, cancel := context.WithTimeout(ctx, stack.WaitTimeout())
	defer cancel()
	mark := fmt.Sprint("mark-", time.Now().UnixNano())
	for {
		// Again and again, for the subscription is made behind our back. Any of them
		// comes after what containerd had before.
		err := j.s.Client().EventService().Publish(ctx, "/tasks/mark", &eventsapi.TaskOOM{ContainerID: mark})
		if err == nil && j.wait(ctx, 50*time.Millisecond, func() bool { return j.marks[mark] }) {
			return
		}
		if ctx.Err() != nil {
			j.t.Errorf("events: %v, %v", ctx.Err(), err)
			return
		}
	}
}

// wait waits until cond, which is called with mu held.
func (j *journal) wait(ctx context.Context, timeout time.Duration, cond func() bool) bool {
	deadline := time.After(timeout)
	for {
		j.mu.Lock()
		ok, changed := cond(), j.changed
		j.mu.Unlock()
		if ok {
			return true
		}
		select {
		case <-changed:
		case <-deadline:
			return false
		case <-ctx.Done():
			return false
		}
	}
}

// waitFor waits for an event and returns it. Exec may be empty.
func (j *journal) waitFor(ctx context.Context, topic, id, exec string) taskEvent {
	j.t.Helper()
	var e taskEvent
	if !j.wait(ctx, stack.WaitTimeout(), func() bool {
		i := slices.IndexFunc(j.all, func(e taskEvent) bool { return e.topic == topic && e.id == id && e.exec == exec })
		if i >= 0 {
			e = j.all[i]
		}
		return i >= 0
	}) {
		j.t.Fatalf("no event %s of %s %s; there are:\n%s", topic, id, exec, j)
	}
	return e
}

// of returns the events of a topic and a container.
func (j *journal) of(topic, id string) []taskEvent {
	j.mu.Lock()
	defer j.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(j.all), func(e taskEvent) bool { return e.topic != topic || e.id != id })
}

func (j *journal) String() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	var b strings.Builder
	for _, e := range j.all {
		fmt.Fprintln(&b, e)
	}
	return b.String()
}

// A story is what the events so far say of one container.
type story struct {
	created, started, exited, deleted bool
	pid                               uint32
	execs                             map[string]string // added, started, exited
}

// check fails the test for each event that does not fit those before it.
func (j *journal) check() {
	j.t.Helper()
	j.mu.Lock()
	all := slices.Clone(j.all)
	j.mu.Unlock()
	stories := map[string]*story{}
	for i, e := range all {
		c := stories[e.id]
		if c == nil || c.deleted && e.topic == "create" {
			c = &story{execs: map[string]string{}}
			stories[e.id] = c
		}
		if wrong := c.tell(e, j.crashes); wrong != "" {
			j.t.Errorf("event %d (%v): %s; all events:\n%s", i, e, wrong, j)
			break
		}
	}
	if strings.Contains(j.s.Logs(), "panic:") || strings.Contains(j.s.Logs(), "DATA RACE") {
		j.t.Errorf("a shim or containerd is broken:\n%s", j.s.Logs())
	}
}

// tell adds an event to the story and returns what is wrong with it.
func (c *story) tell(e taskEvent, crashes bool) string {
	missing := func(ok bool, what string) string {
		if ok || crashes {
			return ""
		}
		return what
	}
	if c.deleted && !(crashes && (e.topic == "delete" || e.topic == "exit" && e.exec == "")) {
		return "it comes after the container's deletion"
	}
	if e.topic != "create" {
		if wrong := missing(c.created, "it comes before the container's creation"); wrong != "" {
			return wrong
		}
	}
	switch e.topic {
	case "create":
		if c.created && !crashes || c.started || c.exited {
			return "the container was created before"
		}
		c.created, c.pid = true, e.pid
	case "start":
		if c.started && !crashes || c.exited {
			return "the container was started or has exited before"
		}
		c.started, c.pid = true, e.pid
	case "exec-added":
		if c.execs[e.exec] != "" && !crashes {
			return "the exec was added before"
		}
		c.execs[e.exec] = "added"
	case "exec-started":
		if c.exited {
			return "the container has exited before"
		}
		if c.execs[e.exec] != "added" && !crashes {
			return "the exec was not added, or started before"
		}
		c.execs[e.exec] = "started"
	case "exit":
		if e.exec != "" {
			if c.exited {
				return "the container has exited before"
			}
			if wrong := missing(c.execs[e.exec] == "started", "the exec is not running"); wrong != "" {
				return wrong
			}
			// Its ID may be used again.
			delete(c.execs, e.exec)
			return ""
		}
		if c.exited && !crashes {
			return "the container has exited before"
		}
		for id, state := range c.execs {
			if state == "started" && !crashes {
				return "exec " + id + " has not exited"
			}
		}
		if e.pid != c.pid && !crashes {
			return fmt.Sprintf("its process is %d", c.pid)
		}
		c.exited = true
	case "delete":
		// A restore that was never started has no process and no exit.
		if wrong := missing(c.exited || !c.started && c.pid == 0, "the container has not exited"); wrong != "" {
			return wrong
		}
		c.deleted = true
	case "checkpointed":
		// One that ends the container may come after the exit.
		return missing(c.started, "the container is not running")
	case "paused", "resumed", "oom":
		return missing(c.started && !c.exited, "the container is not running")
	default:
		return "what is this?"
	}
	return ""
}

// A scene is a stack whose runtime can be held, with its journal.
type scene struct {
	*stack.Stack
	*journal
	t   *testing.T
	ctx context.Context
	f   *stack.Faults
}

func newScene(t *testing.T, opts stack.Options) *scene {
	t.Helper()
	s := stack.Start(t, opts)
	return &scene{s, keepJournal(t, s), t, s.Ctx(), s.Faults()}
}

// container makes a container that sleeps.
func (s *scene) container(id string, opts ...oci.SpecOpts) *stack.Container {
	s.t.Helper()
	return s.NewContainer(s.ctx, id, stack.Busybox, append([]oci.SpecOpts{stack.Args("sleep", "1000")}, opts...)...)
}

// running makes a container that runs.
func (s *scene) running(id string, opts ...oci.SpecOpts) *stack.Container {
	s.t.Helper()
	c := s.container(id, opts...)
	c.Start(s.ctx)
	return c
}

// checkpointed makes a container, dumps it, and returns it, without a task, and
// the dump.
func (s *scene) checkpointed(id string, opts ...oci.SpecOpts) (*stack.Container, string) {
	s.t.Helper()
	c, dir := s.running(id, opts...), filepath.Join(s.Dir, "checkpoint-"+id)
	c.Checkpoint(s.ctx, dir, &options.CheckpointOptions{Exit: true})
	return c, dir
}

// exec adds an exec to a container.
func (s *scene) exec(c *stack.Container, id string, args ...string) client.Process {
	s.t.Helper()
	spec, err := c.Spec(s.ctx)
	if err != nil {
		s.t.Fatal(err)
	}
	p := *spec.Process
	p.Args = args
	proc, err := c.Task.Exec(s.ctx, id, &p, c.IO(s.ctx))
	if err != nil {
		s.t.Fatalf("exec %s: %v", id, err)
	}
	return proc
}

// A heldCall is a call that waits because the runtime is held.
type heldCall struct {
	s       *scene
	what    string
	command string
	when    stack.When
	done    chan error
}

// hold makes a call and waits until the runtime is held in the given command.
func (s *scene) hold(command string, when stack.When, call func() error) *heldCall {
	s.t.Helper()
	s.f.Hold(command, when)
	h := &heldCall{s, command, command, when, make(chan error, 1)}
	go func() { h.done <- call() }()
	s.f.WaitReached(s.ctx, command, when)
	return h
}

// waiting fails the test if the call has returned.
func (h *heldCall) waiting() {
	h.s.t.Helper()
	select {
	case err := <-h.done:
		h.s.t.Fatalf("%s has not waited for the runtime: %v", h.what, err)
	default:
	}
}

// release lets the runtime go on and returns what the call returns.
func (h *heldCall) release() error {
	h.s.t.Helper()
	h.s.f.Release(h.command, h.when)
	return h.result()
}

// result returns what the call returns.
func (h *heldCall) result() error {
	h.s.t.Helper()
	select {
	case err := <-h.done:
		return err
	case <-time.After(stack.WaitTimeout()):
		h.s.t.Fatalf("%s does not return", h.what)
		return nil
	}
}

// cutAfter returns after how long to cut a call that is held in the runtime. The call
// has to get there first, on a slow machine too: took is what all of it has taken.
func cutAfter(took time.Duration) time.Duration { return time.Second + 5*took }

// cut has the deadline of a call run out while the runtime is held at a point, and returns
// the call's error. On a busy machine it may run out before: then the call is made again,
// with more time, after between.
func (s *scene) cut(command string, when stack.When, wait time.Duration, call func(context.Context) error, between func()) error {
	s.t.Helper()
	for ; ; wait *= 2 {
		s.f.Hold(command, when)
		ctx, cancel := context.WithTimeout(s.ctx, wait)
		h := &heldCall{s, command, command, when, make(chan error, 1)}
		go func() { h.done <- call(ctx) }()
		err := h.result()
		cancel()
		if s.f.Reached(command, when) || err == nil {
			return err
		}
		s.t.Logf("%s did not get to %v within %v", command, when, wait)
		s.f.Clear(command)
		between()
	}
}

// must fails the test if there is an error.
func (s *scene) must(what string, err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatalf("%s: %v", what, err)
	}
}

// gone waits until there is no such process; a zombie is one.
func (s *scene) gone(pid int) {
	s.t.Helper()
	s.Poll(s.ctx, fmt.Sprintf("process %d to be gone", pid), func() bool {
		return errors.Is(syscall.Kill(pid, 0), syscall.ESRCH)
	})
}

// initPid returns the pid that the runtime has left in the bundle.
func (s *scene) initPid(c *stack.Container) int {
	s.t.Helper()
	data, err := os.ReadFile(filepath.Join(c.Bundle(), "init.pid"))
	s.must("pid of init", err)
	pid, err := strconv.Atoi(string(data))
	s.must("pid of init", err)
	return pid
}

// shim connects to a container's shim and returns its pid too.
func (s *scene) shim(c *stack.Container) (taskapi.TTRPCTaskService, int) {
	s.t.Helper()
	shim := dialTask(s.t, c)
	r, err := shim.Connect(s.ctx, &taskapi.ConnectRequest{ID: c.ID()})
	s.must("connect", err)
	return shim, int(r.ShimPid)
}

// inside waits until the shim runs all of the functions, one goroutine each.
func (s *scene) inside(shim int, functions ...string) {
	s.t.Helper()
	const begin, end = "=== BEGIN goroutine stack dump ===", "=== END goroutine stack dump ==="
	for deadline := time.Now().Add(stack.WaitTimeout()); time.Now().Before(deadline); {
		before := strings.Count(s.Logs(), end)
		s.must("ask for the shim's stacks", syscall.Kill(shim, syscall.SIGUSR1))
		s.Poll(s.ctx, "the shim's stacks", func() bool { return strings.Count(s.Logs(), end) > before })
		logs := s.Logs()
		dump := logs[strings.LastIndex(logs, begin):]
		ok := true
		for _, f := range functions {
			i := strings.Index(dump, f+"(")
			if ok = i >= 0; !ok {
				break
			}
			dump = dump[i+1:]
		}
		if ok {
			return
		}
	}
	s.t.Fatalf("the shim is not inside %v", functions)
}

// children returns the children of a process whose command lines have the word.
func children(pid int, word string) []int {
	var found []int
	// The kernel's own list of children may lack some.
	all, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range all {
		stat, _ := os.ReadFile(filepath.Join(dir, "stat"))
		_, fields, _ := strings.Cut(string(stat), ") ")
		args, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
		if f := strings.Fields(fields); len(f) > 1 && f[1] == strconv.Itoa(pid) && strings.Contains(string(args), "\x00"+word+"\x00") {
			child, _ := strconv.Atoi(filepath.Base(dir))
			found = append(found, child)
		}
	}
	return found
}

// end kills what runs in a container and deletes it.
func (s *scene) end(c *stack.Container) {
	s.t.Helper()
	if code := c.Kill(s.ctx, syscall.SIGKILL); code != 137 {
		s.t.Errorf("container %s: exit code %d, want 137", c.ID(), code)
	}
	c.Delete(s.ctx)
}

// native is an error off the wire as errdefs has it.
func native(err error) error { return errgrpc.ToNative(err) }

// TestInitExitComesLast has init die while an exec runs and another is being
// started (containerd issues 9719, 10589, 10603).
func TestInitExitComesLast(t *testing.T) {
	t.Parallel()
	s := newScene(t, stack.Options{})
	c := s.running("c")
	running := s.exec(c, "running", "sleep", "1000")
	s.must("start exec", running.Start(s.ctx))
	starting := s.exec(c, "starting", "sleep", "1000")
	// The runtime has started it, and the shim does not know yet.
	start := s.hold("exec", stack.After, func() error { return starting.Start(s.ctx) })
	pid := int(c.Task.Pid())
	s.must("kill", c.Task.Kill(s.ctx, syscall.SIGKILL))
	s.gone(pid)
	start.waiting()
	s.must("start of the exec", start.release())
	if code := c.Wait(s.ctx); code != 137 {
		t.Errorf("exit code %d, want 137", code)
	}
	for _, exec := range []string{"running", "starting"} {
		if e := s.waitFor(s.ctx, "exit", "c", exec); e.status != 137 {
			t.Errorf("exec %s: exit code %d, want 137", exec, e.status)
		}
	}
	c.Delete(s.ctx)
}

// TestNoExecAfterInitDied starts an exec when init has died, and its exit is
// not published yet for another exec is being started (containerd issue 10634).
func TestNoExecAfterInitDied(t *testing.T) {
	t.Parallel()
	s := newScene(t, stack.Options{})
	c := s.running("c")
	late, starting := s.exec(c, "late", "true"), s.exec(c, "starting", "sleep", "1000")
	start := s.hold("exec", stack.After, func() error { return starting.Start(s.ctx) })
	s.must("kill", c.Task.Kill(s.ctx, syscall.SIGKILL))
	s.gone(int(c.Task.Pid()))
	// It would hang if it got as far as the runtime.
	if err := late.Start(s.ctx); err == nil {
		t.Error("an exec started after init died")
	}
	s.must("start of the exec", start.release())
	c.Wait(s.ctx)
	if err := late.Start(s.ctx); err == nil {
		t.Error("an exec started after init's exit")
	}
	c.Delete(s.ctx)
}

// TestInitDiesInCreate has init die while the runtime still creates it
// (containerd issue 9103).
func TestInitDiesInCreate(t *testing.T) {
	t.Parallel()
	s := newScene(t, stack.Options{})
	c := s.container("c")
	create := s.hold("create", stack.After, func() error { return c.Create(s.ctx) })
	pid := s.initPid(c)
	s.must("kill init", syscall.Kill(pid, syscall.SIGKILL))
	s.gone(pid)
	s.must("create", create.release())
	if code := c.Wait(s.ctx); code != 137 {
		t.Errorf("exit code %d, want 137", code)
	}
	if err := c.Task.Start(s.ctx); err == nil {
		t.Error("a container started whose init was dead")
	}
	c.Delete(s.ctx)
}

// TestFailedCreate has the runtime fail, or exceed its time, when it has made
// the container; nothing may be left. The stack looks for that.
func TestFailedCreate(t *testing.T) {
	t.Parallel()
	s := newScene(t, stack.Options{})
	c := s.container("c")
	s.f.Fail("create", stack.After, "as requested")
	begin := time.Now()
	err := c.Create(s.ctx)
	took := time.Since(begin)
	if err == nil || !strings.Contains(err.Error(), "as requested") {
		t.Fatalf("create: %v, want it to fail as requested", err)
	}
	s.f.Clear("create")
	s.clean(c)

	create := func(ctx context.Context) error { return c.Create(ctx) }
	if err := s.cut("create", stack.After, 3*time.Second+cutAfter(took), create, func() { s.clean(c) }); err == nil {
		t.Fatal("create succeeded after its deadline")
	}
	s.f.Clear("create")
	s.clean(c)
	s.Poll(s.ctx, "the shim to end", func() bool {
		sockets, _ := filepath.Glob(filepath.Join(s.Dir, "s", "*"))
		return len(sockets) == 0
	})
	c.Start(s.ctx)
	s.end(c)
}

// clean waits until nothing is left of a container's task.
func (s *scene) clean(c *stack.Container) {
	s.t.Helper()
	s.Poll(s.ctx, "what is left of container "+c.ID()+" to be removed", func() bool { return s.leftOf(c) == "" })
}

// leftOf tells what is left of a container's task.
func (s *scene) leftOf(c *stack.Container) string {
	state, _ := filepath.Glob(filepath.Join("/run/containerd/runc", s.Namespace, c.ID()))
	bundle, _ := filepath.Glob(c.Bundle())
	// What containerd keeps of a bundle on the disk goes last.
	work, _ := filepath.Glob(filepath.Join(s.Dir, "root", "io.containerd.runtime.v2.task", s.Namespace, c.ID()))
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	left := slices.Concat(s.ContainerCgroups(c.ID()), state, bundle, work)
	if strings.Contains(string(mounts), c.Bundle()+"/") {
		left = append(left, "a mount")
	}
	return strings.Join(left, ", ")
}

// TestHungExec has the runtime hang in one exec (containerd issue 10036).
func TestHungExec(t *testing.T) {
	t.Parallel()
	s := newScene(t, stack.Options{})
	c := s.running("c")
	_, shim := s.shim(c)
	hung := s.exec(c, "hung", "true")
	start := s.hold("exec", stack.Before, func() error { return hung.Start(s.ctx) })
	// Only this one: it does not see that the others are released.
	runtimes := children(shim, "exec")
	if len(runtimes) != 1 {
		t.Fatalf("the shim runs %d execs", len(runtimes))
	}
	s.must("stop the runtime", syscall.Kill(runtimes[0], syscall.SIGSTOP))
	s.f.Release("exec", stack.Before)
	if out := c.Exec(s.ctx, "echo", "hi"); out != "hi\n" {
		t.Errorf("another exec printed %q", out)
	}
	if code := c.Kill(s.ctx, syscall.SIGKILL); code != 137 {
		t.Errorf("exit code %d, want 137", code)
	}
	if err := start.result(); err == nil {
		t.Error("an exec started although its runtime hung")
	}
	c.Delete(s.ctx)
}

// TestDeleteOfStartingExec deletes an exec that is being started.
func TestDeleteOfStartingExec(t *testing.T) {
	t.Parallel()
	s := newScene(t, stack.Options{})
	c := s.running("c")
	shim, shimPid := s.shim(c)
	p := s.exec(c, "e", "sleep", "1000")
	exit, err := p.Wait(s.ctx)
	s.must("wait", err)
	start := s.hold("exec", stack.After, func() error { return p.Start(s.ctx) })
	deleted := make(chan error, 1)
	go func() {
		_, err := shim.Delete(s.ctx, &taskapi.DeleteRequest{ID: "c", ExecID: "e"})
		deleted <- err
	}()
	s.inside(shimPid, "Service).Delete")
	s.must("start", start.release())
	if err := <-deleted; err == nil {
		t.Error("an exec was deleted while it was being started")
	}
	s.must("kill", p.Kill(s.ctx, syscall.SIGKILL))
	if status := <-exit; status.ExitCode() != 137 {
		t.Errorf("exit code %d, want 137", status.ExitCode())
	}
	if _, err := p.Delete(s.ctx); err != nil {
		t.Errorf("delete: %v", err)
	}
	s.end(c)
}

// TestWaitEndsWithDelete waits for processes that are never started.
func TestWaitEndsWithDelete(t *testing.T) {
	t.Parallel()
	s := newScene(t, stack.Options{})
	c := s.running("c")
	shim, shimPid := s.shim(c)
	// Besides containerd, which waits for init.
	wait := func(id, exec string) *heldCall {
		h := &heldCall{s: s, what: "wait", done: make(chan error, 1)}
		go func() {
			_, err := shim.Wait(s.ctx, &taskapi.WaitRequest{ID: id, ExecID: exec})
			h.done <- err
		}()
		s.inside(shimPid, "Service).Wait", "Service).Wait")
		return h
	}
	s.exec(c, "deleted", "true")
	waiting := wait("c", "deleted")
	_, err := shim.Delete(s.ctx, &taskapi.DeleteRequest{ID: "c", ExecID: "deleted"})
	s.must("delete exec", err)
	s.must("wait for the deleted exec", waiting.result())

	s.exec(c, "left", "true")
	waiting = wait("c", "left")
	s.end(c)
	if err := waiting.result(); err != nil && !strings.Contains(err.Error(), "closed") {
		t.Errorf("wait for an exec of a deleted container: %v", err)
	}
}

// TestShutdownWithExits ends a shim while exits arrive and are published.
func TestShutdownWithExits(t *testing.T) {
	t.Parallel()
	s := newScene(t, stack.Options{})
	s.crashes = true
	c := s.running("c")
	_, shim := s.shim(c)
	for i := range 3 {
		s.must("start exec", s.exec(c, fmt.Sprint("e", i), "sleep", "1000").Start(s.ctx))
	}
	held := s.exec(c, "held", "sleep", "1000")
	start := s.hold("exec", stack.After, func() error { return held.Start(s.ctx) })
	s.must("kill", c.Task.Kill(s.ctx, syscall.SIGKILL))
	s.gone(int(c.Task.Pid()))
	s.must("end the shim", syscall.Kill(shim, syscall.SIGTERM))
	_ = start.release()
	s.waitFor(s.ctx, "exit", "c", "")
	s.gone(shim)
	s.clean(c)
	s.must("delete", c.Container.Delete(s.ctx, client.WithSnapshotCleanup))
}

// TestShutdownInDelete asks a shim to end while its last container is being
// deleted, and not again.
func TestShutdownInDelete(t *testing.T) {
	t.Parallel()
	s := newScene(t, stack.Options{})
	s.crashes = true // for containerd knows nothing of it
	c := s.running("c")
	c.Kill(s.ctx, syscall.SIGKILL)
	shim, pid := s.shim(c)
	deletion := s.hold("delete", stack.Before, func() error {
		_, err := shim.Delete(s.ctx, &taskapi.DeleteRequest{ID: "c"})
		return err
	})
	_, err := shim.Shutdown(s.ctx, &taskapi.ShutdownRequest{ID: "c"})
	s.must("shutdown", err)
	deletion.waiting()
	s.must("delete", deletion.release())
	s.gone(pid)
	s.clean(c)
}

// TestRestoredInitDies has a restored init die before the runtime says that it
// is restored.
func TestRestoredInitDies(t *testing.T) {
	t.Parallel()
	s := newScene(t, stack.Options{})
	c, dir := s.checkpointed("c")
	restore := s.hold("restore", stack.After, func() error { return c.RestoreErr(s.ctx, dir) })
	pid := s.initPid(c)
	s.must("kill init", syscall.Kill(pid, syscall.SIGKILL))
	s.gone(pid)
	s.must("restore", restore.release())
	if code := c.Wait(s.ctx); code != 137 {
		t.Errorf("exit code %d, want 137", code)
	}
	c.Delete(s.ctx)
}

// TestFailedRestore has a restore fail before and after CRIU has restored the
// processes. None may be left, the shim has to say that there is none, and
// containerd has to start again.
func TestFailedRestore(t *testing.T) {
	t.Parallel()
	for name, when := range map[string]stack.When{"before": stack.Before, "after": stack.After} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, stack.Options{})
			s.crashes = true
			c, dir := s.checkpointed("c")
			s.f.Fail("restore", when, "as requested")
			if err := c.RestoreErr(s.ctx, dir); err == nil || !strings.Contains(err.Error(), "as requested") {
				t.Fatalf("restore: %v, want it to fail as requested", err)
			}
			shim, pid := s.shim(c)
			state, err := shim.State(s.ctx, &taskapi.StateRequest{ID: "c"})
			s.must("state", err)
			if state.Pid != 0 || state.Status.String() != "CREATED" {
				t.Errorf("state %v, pid %d; want created, no process", state.Status, state.Pid)
			}
			if groups := s.ContainerCgroups("c"); len(groups) > 0 {
				t.Errorf("cgroups are left: %q", groups)
			}
			s.f.Clear("restore")
			s.Kill9()
			s.Restart()
			task, err := c.Container.Task(s.ctx, nil)
			s.must("load", err)
			_, err = task.Delete(s.ctx)
			s.must("delete", err)
			s.gone(pid)
			c.Restore(s.ctx, dir)
			s.end(c)
		})
	}
}

// TestRestoredContainerIsWatched looks for stats and for OOM events.
func TestRestoredContainerIsWatched(t *testing.T) {
	t.Parallel()
	s := newScene(t, stack.Options{})
	c, dir := s.checkpointed("c", oci.WithMemoryLimit(64<<20))
	c.Restore(s.ctx, dir)
	metrics, err := c.Task.Metrics(s.ctx)
	s.must("metrics", err)
	if len(metrics.Data.GetValue()) == 0 {
		t.Error("no stats")
	}
	pids, err := c.Task.Pids(s.ctx)
	if err != nil || len(pids) != 1 || pids[0].Pid != c.Task.Pid() {
		t.Errorf("pids %v, %v; want that of init", pids, err)
	}
	// It keeps what it reads until a line ends.
	if r, err := c.ExecErr(s.ctx, "tail", "/dev/zero"); err != nil || r.Code != 137 {
		t.Errorf("exec: %+v, %v; want exit code 137", r, err)
	}
	s.waitFor(s.ctx, "oom", "c", "")
	s.end(c)
}

// TestOOMComesBeforeExit has the kernel kill init: whoever hears of the exit
// knows the cause already.
func TestOOMComesBeforeExit(t *testing.T) {
	t.Parallel()
	s := newScene(t, stack.Options{})
	for i := range 5 {
		id := fmt.Sprint("c", i)
		c := s.NewContainer(s.ctx, id, stack.Busybox, stack.Args("tail", "/dev/zero"), oci.WithMemoryLimit(16<<20))
		c.Start(s.ctx)
		if code := c.Wait(s.ctx); code != 137 {
			t.Errorf("exit code %d, want 137", code)
		}
		c.Delete(s.ctx)
		s.waitFor(s.ctx, "delete", id, "")
		if len(s.of("oom", id)) == 0 {
			t.Errorf("no OOM event; there are:\n%s", s.journal)
		}
	}
}

// TestKillInStart kills init while the runtime starts it.
func TestKillInStart(t *testing.T) {
	t.Parallel()
	for name, when := range map[string]stack.When{"before": stack.Before, "after": stack.After} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, stack.Options{})
			c := s.container("c")
			s.must("create", c.Create(s.ctx))
			start := s.hold("start", when, func() error { return c.Task.Start(s.ctx) })
			s.must("kill", c.Task.Kill(s.ctx, syscall.SIGKILL))
			s.gone(int(c.Task.Pid()))
			start.waiting()
			if err := start.release(); when == stack.After && err != nil {
				t.Errorf("start: %v", err)
			} else if when == stack.Before && err == nil {
				t.Error("a dead container started")
			}
			if code := c.Wait(s.ctx); code != 137 {
				t.Errorf("exit code %d, want 137", code)
			}
			c.Delete(s.ctx)
		})
	}
}

// TestHungStart has the runtime hang when it starts an init that then dies.
func TestHungStart(t *testing.T) {
	t.Parallel()
	s := newScene(t, stack.Options{})
	c := s.container("c")
	s.must("create", c.Create(s.ctx))
	start := s.hold("start", stack.Before, func() error { return c.Task.Start(s.ctx) })
	if code := c.Kill(s.ctx, syscall.SIGKILL); code != 137 {
		t.Errorf("exit code %d, want 137", code)
	}
	if err := start.result(); err == nil {
		t.Error("a dead container started")
	}
	s.f.Reset()
	c.Delete(s.ctx)
}

// TestDeleteInKill deletes a container while a kill of it is under way.
func TestDeleteInKill(t *testing.T) {
	t.Parallel()
	for name, when := range map[string]stack.When{"before": stack.Before, "after": stack.After} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, stack.Options{})
			c := s.running("c")
			kill := s.hold("kill", when, func() error { return c.Task.Kill(s.ctx, syscall.SIGUSR1) })
			s.must("kill init", syscall.Kill(int(c.Task.Pid()), syscall.SIGKILL))
			c.Wait(s.ctx)
			c.Delete(s.ctx)
			if err := kill.release(); err != nil && !errdefs.IsNotFound(err) && !strings.Contains(err.Error(), "closed") {
				t.Errorf("kill: %v, want not found", err)
			}
		})
	}
}

// TestKillOfZombie kills a process that has died and is not reaped yet, which
// is when the runtime says something else than the shim knows.
func TestKillOfZombie(t *testing.T) {
	t.Parallel()
	s := newScene(t, stack.Options{})
	c := s.running("c")
	shim, _ := s.shim(c)
	kill := s.hold("kill", stack.Before, func() error {
		_, err := shim.Kill(s.ctx, &taskapi.KillRequest{ID: "c", Signal: uint32(syscall.SIGTERM)})
		return err
	})
	s.must("kill init", syscall.Kill(int(c.Task.Pid()), syscall.SIGKILL))
	if err := kill.release(); err != nil && !errdefs.IsNotFound(native(err)) {
		t.Errorf("kill: %v, want not found", err)
	}
	c.Wait(s.ctx)
	c.Delete(s.ctx)
}

// TestTwoCreates creates a container while another of the same ID is being
// created.
func TestTwoCreates(t *testing.T) {
	t.Parallel()
	s := newScene(t, stack.Options{})
	c := s.container("c")
	create := s.hold("create", stack.Before, func() error { return c.Create(s.ctx) })
	shim, _ := s.shim(c)
	_, err := shim.Create(s.ctx, &taskapi.CreateTaskRequest{ID: "c", Bundle: c.Bundle()})
	if !errdefs.IsAlreadyExists(native(err)) {
		t.Errorf("second create: %v, want already exists", err)
	}
	s.must("create", create.release())
	s.end(c)
}

// TestTwoDeletes deletes a container twice at once.
func TestTwoDeletes(t *testing.T) {
	t.Parallel()
	s := newScene(t, stack.Options{})
	// The other one keeps the shim.
	group := oci.WithAnnotations(map[string]string{"io.containerd.runc.v2.group": "g"})
	other := s.running("other", group)
	c := s.running("c", group)
	shim, shimPid := s.shim(c)
	c.Kill(s.ctx, syscall.SIGKILL)
	first := s.hold("delete", stack.Before, func() error {
		_, err := c.Task.Delete(s.ctx)
		return err
	})
	second := make(chan error, 1)
	go func() {
		_, err := shim.Delete(s.ctx, &taskapi.DeleteRequest{ID: "c"})
		second <- err
	}()
	s.inside(shimPid, "Service).Delete", "Service).Delete")
	s.must("delete", first.release())
	if err := <-second; !errdefs.IsNotFound(native(err)) {
		t.Errorf("second delete: %v, want not found", err)
	}
	s.must("delete", c.Container.Delete(s.ctx, client.WithSnapshotCleanup))
	s.end(other)
	s.waitFor(s.ctx, "delete", "other", "")
	if n := len(s.of("delete", "c")); n != 1 {
		t.Errorf("%d delete events", n)
	}
}

// TestTwoStarts starts init, and an exec, twice at once.
func TestTwoStarts(t *testing.T) {
	t.Parallel()
	s := newScene(t, stack.Options{})
	c := s.container("c")
	s.must("create", c.Create(s.ctx))
	shim, _ := s.shim(c)
	for _, it := range []struct{ command, exec, topic string }{{"start", "", "start"}, {"exec", "e", "exec-started"}} {
		if it.exec != "" {
			s.exec(c, it.exec, "sleep", "1000")
		}
		start := func() error {
			_, err := shim.Start(s.ctx, &taskapi.StartRequest{ID: "c", ExecID: it.exec})
			return err
		}
		first := s.hold(it.command, stack.Before, start)
		second := make(chan error, 1)
		go func() { second <- start() }()
		err := first.release()
		if errs := []error{err, <-second}; (errs[0] == nil) == (errs[1] == nil) {
			t.Errorf("two starts: %v; want one to fail", errs)
		}
		s.waitFor(s.ctx, it.topic, "c", it.exec)
	}
	s.end(c)
	s.waitFor(s.ctx, "delete", "c", "")
	if n := len(s.of("exec-started", "c")); n != 1 {
		t.Errorf("%d exec-started events", n)
	}
}

// TestExecInDump starts an exec while the container is being dumped: it runs
// after that.
func TestExecInDump(t *testing.T) {
	t.Parallel()
	s := newScene(t, stack.Options{})
	c := s.running("c")
	p := s.exec(c, "e", "echo", "hi")
	dump := s.hold("checkpoint", stack.During("Dumping task"), func() error {
		return c.CheckpointErr(s.ctx, filepath.Join(s.Dir, "checkpoint"), nil)
	})
	started := make(chan error, 1)
	go func() { started <- p.Start(s.ctx) }()
	dump.waiting()
	s.must("checkpoint", dump.release())
	s.must("start", <-started)
	c.Stdout.WaitFor(s.ctx, "hi\n")
	for _, topic := range []string{"checkpointed", "exec-started"} {
		exec := ""
		if topic == "exec-started" {
			exec = "e"
		}
		s.waitFor(s.ctx, topic, "c", exec)
	}
	s.end(c)
}

// TestKillInDump kills a container while it is being dumped.
func TestKillInDump(t *testing.T) {
	t.Parallel()
	for name, when := range map[string]stack.When{
		"before": stack.Before, "during": stack.During("Dumping task"), "after": stack.After,
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, stack.Options{})
			c := s.running("c")
			dump := s.hold("checkpoint", when, func() error {
				return c.CheckpointErr(s.ctx, filepath.Join(s.Dir, "checkpoint"), nil)
			})
			s.must("kill", c.Task.Kill(s.ctx, syscall.SIGKILL))
			if name != "during" {
				// Then CRIU is stopped, which traces it.
				s.waitFor(s.ctx, "exit", "c", "")
			}
			dump.waiting()
			if err := dump.release(); name == "before" && err == nil {
				t.Error("a dead container was dumped")
			}
			if code := c.Wait(s.ctx); code != 137 {
				t.Errorf("exit code %d, want 137", code)
			}
			c.Delete(s.ctx)
		})
	}
}

// TestKillInRestore kills a container while it is being restored.
func TestKillInRestore(t *testing.T) {
	t.Parallel()
	for name, when := range map[string]stack.When{
		"before": stack.Before, "during": stack.During("Restoring"), "after": stack.After,
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, stack.Options{})
			c, dir := s.checkpointed("c")
			restore := s.hold("restore", when, func() error { return c.RestoreErr(s.ctx, dir) })
			shim, _ := s.shim(c)
			_, err := shim.Kill(s.ctx, &taskapi.KillRequest{ID: "c", Signal: uint32(syscall.SIGKILL)})
			s.must("kill", err)
			// While it is held.
			if err := restore.result(); err == nil {
				t.Error("the restore succeeded")
			}
			s.f.Reset()
			state, err := shim.State(s.ctx, &taskapi.StateRequest{ID: "c"})
			s.must("state", err)
			if state.Pid != 0 {
				t.Errorf("there is a process: %v", state)
			}
			c.Delete(s.ctx)
		})
	}
}

// TestKillInPause kills a container while it is being paused.
func TestKillInPause(t *testing.T) {
	t.Parallel()
	for name, when := range map[string]stack.When{"before": stack.Before, "after": stack.After} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, stack.Options{})
			c := s.running("c")
			pause := s.hold("pause", when, func() error { return c.Task.Pause(s.ctx) })
			if code := c.Kill(s.ctx, syscall.SIGKILL); code != 137 {
				t.Errorf("exit code %d, want 137", code)
			}
			_ = pause.release()
			c.Delete(s.ctx)
		})
	}
}

// TestCutPause has the time of a pause run out when the runtime has done its work.
func TestCutPause(t *testing.T) {
	t.Parallel()
	s := newScene(t, stack.Options{})
	c := s.running("c")
	begin := time.Now()
	s.must("pause", c.Task.Pause(s.ctx))
	took := time.Since(begin)
	s.must("resume", c.Task.Resume(s.ctx))
	// The shim's own time runs out after the client's.
	runs := func() {
		s.Poll(s.ctx, "the container to run", func() bool { return c.Status(s.ctx) == client.Running })
	}
	if err := s.cut("pause", stack.After, time.Second+cutAfter(took), c.Task.Pause, runs); err == nil {
		t.Error("pause succeeded after its deadline")
	}
	runs()
	s.f.Clear("pause")
	c.Exec(s.ctx, "true")
	s.end(c)
}

var buildRace = sync.OnceValues(func() (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "stasis", "race")
	build := exec.Command("go", "build", "-race", "-o", dir+"/", "github.com/stasis-run/stasis/cmd/...")
	build.Env = append(os.Environ(), "CGO_ENABLED=1")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w\n%s", err, out)
	}
	return dir, nil
})

// raceDetector makes the stacks of a test run a shim that is built with the race
// detector. What that finds is in containerd's log, which the journal reads.
func raceDetector(t *testing.T) {
	t.Helper()
	for _, tool := range []string{"go", "gcc"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Fatalf("a shim with race detector cannot be built: %v: run contrib/setup.sh", err)
		}
	}
	dir, err := buildRace()
	if err != nil {
		t.Fatalf("build the shim with race detector: %v", err)
	}
	t.Setenv("STASIS_BIN", dir)
}

// TestManyContainers runs fifty containers at once, a fifth of them in one shim. The
// first of those outlives the others, as a pod's sandbox does: a shim that is left
// without a container ends, and containerd may have been told its address just before.
func TestManyContainers(t *testing.T) {
	raceDetector(t)
	s := newScene(t, stack.Options{})
	s.Image(s.ctx, stack.Busybox)
	var g errgroup.Group
	g.SetLimit(25)
	const shared = 40
	group := func(i int) oci.SpecOpts {
		return oci.WithAnnotations(map[string]string{"io.containerd.runc.v2.group": fmt.Sprint("g", min(i, shared))})
	}
	first := s.container("first", group(shared))
	first.Start(s.ctx)
	for i := range 50 {
		c := s.container(fmt.Sprint("c", i), group(i))
		g.Go(func() error {
			if err := c.StartErr(s.ctx); err != nil {
				return err
			}
			if r, err := c.ExecErr(s.ctx, "echo", c.ID()); err != nil || r.Code != 0 || r.Stdout != c.ID()+"\n" {
				return fmt.Errorf("exec in %s: %+v, %v", c.ID(), r, err)
			}
			if _, err := c.Task.Delete(s.ctx, client.WithProcessKill); err != nil {
				return fmt.Errorf("delete %s: %w", c.ID(), err)
			}
			return c.Container.Delete(s.ctx, client.WithSnapshotCleanup)
		})
	}
	s.must("fifty containers", g.Wait())
	first.Kill(s.ctx, syscall.SIGKILL)
	first.Delete(s.ctx)
	for i := range 50 {
		s.waitFor(s.ctx, "delete", fmt.Sprint("c", i), "")
	}
}

// TestManyExecs runs fifty execs at once in one container, which is killed in
// the middle of fifty more.
func TestManyExecs(t *testing.T) {
	raceDetector(t)
	s := newScene(t, stack.Options{})
	c := s.running("c")
	var g errgroup.Group
	for i := range 50 {
		g.Go(func() error {
			r, err := c.ExecErr(s.ctx, "sh", "-c", fmt.Sprintf("echo %d; exit %d", i, i))
			if err != nil || r.Code != uint32(i) || r.Stdout != fmt.Sprintln(i) {
				return fmt.Errorf("exec %d: %+v, %v", i, r, err)
			}
			return nil
		})
	}
	s.must("fifty execs", g.Wait())
	first := make(chan struct{})
	var once sync.Once
	for range 50 {
		g.Go(func() error {
			_, _ = c.ExecErr(s.ctx, "true")
			once.Do(func() { close(first) })
			return nil
		})
	}
	<-first
	s.end(c)
	_ = g.Wait()
	s.waitFor(s.ctx, "delete", "c", "")
}

package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/cgroups/v3"
	eventsapi "github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/stasis-run/stasis/integration/stack"
)

// A taskShim is a shim that is called directly, for calls that containerd itself
// would not make. Its containers are unknown to containerd, except for one that
// keeps it alive; their events go to containerd all the same.
type taskShim struct {
	taskapi.TTRPCTaskService
	t      *testing.T
	s      *stack.Stack
	ctx    context.Context
	anchor *stack.Container
}

// startShim starts a shim on a stack of its own.
func startShim(t *testing.T, opts stack.Options) *taskShim {
	t.Helper()
	s := stack.Start(t, opts)
	anchor := s.NewContainer(s.Ctx(), "anchor", stack.Busybox, stack.Args("sleep", "1000"))
	if err := anchor.Create(s.Ctx()); err != nil {
		t.Fatal(err)
	}
	// A call that hangs shall be known by name.
	ctx, cancel := context.WithTimeout(s.Ctx(), stack.WaitTimeout())
	t.Cleanup(cancel)
	return &taskShim{dialTask(t, anchor), t, s, ctx, anchor}
}

// dialTask connects to the Task service of a container's shim.
func dialTask(t *testing.T, c *stack.Container) taskapi.TTRPCTaskService {
	t.Helper()
	return taskapi.NewTTRPCTaskClient(dialShim(t, c))
}

// dialShim connects to the shim of a container.
func dialShim(t *testing.T, c *stack.Container) *ttrpc.Client {
	t.Helper()
	var params struct{ Address string }
	data, err := os.ReadFile(filepath.Join(c.Bundle(), "bootstrap.json"))
	if err == nil {
		err = json.Unmarshal(data, &params)
	} else if data, err = os.ReadFile(filepath.Join(c.Bundle(), "address")); err == nil {
		params.Address = string(data) // containerd 1.x
	}
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("unix", strings.TrimPrefix(params.Address, "unix://"))
	if err != nil {
		t.Fatal(err)
	}
	client := ttrpc.NewClient(conn)
	t.Cleanup(func() { client.Close() })
	return client
}

// bundle makes a bundle for a container that runs sleep, unless opts say
// otherwise.
func (sh *taskShim) bundle(id string, opts ...oci.SpecOpts) string {
	sh.t.Helper()
	dir := filepath.Join(sh.s.Dir, "bundles", id)
	if err := os.MkdirAll(filepath.Join(dir, "work"), 0o711); err != nil {
		sh.t.Fatal(err)
	}
	opts = append([]oci.SpecOpts{oci.WithDefaultPathEnv, stack.Args("sleep", "1000"), oci.WithCgroup(sh.s.CgroupPath(id))}, opts...)
	spec, err := oci.GenerateSpec(sh.ctx, nil, &containers.Container{ID: id}, opts...)
	if err != nil {
		sh.t.Fatal(err)
	}
	data, err := json.Marshal(spec)
	if err != nil {
		sh.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), data, 0o600); err != nil {
		sh.t.Fatal(err)
	}
	return dir
}

// createRequest is a request that works: for a container with no streams, in a
// new bundle, with the rootfs of the shim's other container.
func (sh *taskShim) createRequest(id string, opts ...oci.SpecOpts) *taskapi.CreateTaskRequest {
	sh.t.Helper()
	return &taskapi.CreateTaskRequest{
		ID:      id,
		Bundle:  sh.bundle(id, opts...),
		Rootfs:  []*types.Mount{{Type: "bind", Source: filepath.Join(sh.anchor.Bundle(), "rootfs"), Options: []string{"rbind"}}},
		Options: sh.any(sh.s.RuncOptions("")),
	}
}

// create creates a container, and deletes it when the test is over.
func (sh *taskShim) create(id string, opts ...oci.SpecOpts) {
	sh.t.Helper()
	sh.deleteAfter(id)
	_, err := sh.Create(sh.ctx, sh.createRequest(id, opts...))
	sh.must("create "+id, err)
}

// deleteAfter deletes what is left of a container when the test is over.
func (sh *taskShim) deleteAfter(id string) {
	sh.t.Cleanup(func() {
		// The test's own context has ended.
		ctx := namespaces.WithNamespace(context.Background(), sh.s.Namespace)
		sh.Resume(ctx, &taskapi.ResumeRequest{ID: id})
		sh.Kill(ctx, &taskapi.KillRequest{ID: id, Signal: uint32(unix.SIGKILL), All: true})
		if _, err := sh.State(ctx, &taskapi.StateRequest{ID: id}); err == nil {
			sh.Wait(ctx, &taskapi.WaitRequest{ID: id})
			sh.Delete(ctx, &taskapi.DeleteRequest{ID: id})
		}
	})
}

// fifo makes a FIFO that is open at both ends, and that nobody reads.
func (sh *taskShim) fifo(name string) string {
	sh.t.Helper()
	path := filepath.Join(sh.s.Dir, name)
	sh.must("mkfifo", unix.Mkfifo(path, 0o600))
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	sh.must("open", err)
	sh.t.Cleanup(func() { f.Close() })
	return path
}

// must fails the test if a step of its preparation did.
func (sh *taskShim) must(what string, err error) {
	sh.t.Helper()
	if err != nil {
		sh.t.Fatalf("%s: %v", what, err)
	}
}

func (sh *taskShim) any(v any) *anypb.Any {
	sh.t.Helper()
	a, err := typeurl.MarshalAnyToProto(v)
	if err != nil {
		sh.t.Fatal(err)
	}
	return a
}

// process is an exec's spec.
func (sh *taskShim) process(args ...string) *anypb.Any {
	sh.t.Helper()
	return sh.any(&specs.Process{Args: args, Cwd: "/", Env: []string{"PATH=/bin"}})
}

// code is the class of a call's error, as it comes over the wire.
func code(err error) string {
	if err == nil {
		return codes.OK.String()
	}
	return status.Code(err).String()
}

// taskEvents collects the task events of a stack.
type taskEvents struct {
	s  *stack.Stack
	mu sync.Mutex
	// all are the events in the order in which they came.
	all []*events.Envelope
}

// watchEvents collects the events of a stack from now on.
func watchEvents(t *testing.T, s *stack.Stack) *taskEvents {
	t.Helper()
	e := &taskEvents{s: s}
	ctx, cancel := context.WithCancel(s.Ctx())
	t.Cleanup(cancel)
	ch, errs := s.Client().EventService().Subscribe(ctx, `topic~="^/tasks/"`)
	go func() {
		for {
			select {
			case ev := <-ch:
				e.mu.Lock()
				e.all = append(e.all, ev)
				e.mu.Unlock()
			case <-errs:
				return
			}
		}
	}()
	// The subscription is made behind our back: wait until one gets through.
	s.Poll(ctx, "events", func() bool {
		err := s.Client().EventService().Publish(ctx, "/tasks/probe", &eventsapi.TaskOOM{ContainerID: "probe"})
		return err == nil && len(e.get()) > 0
	})
	return e
}

// get returns the events so far.
func (e *taskEvents) get() []*events.Envelope {
	e.mu.Lock()
	defer e.mu.Unlock()
	return append([]*events.Envelope(nil), e.all...)
}

// waitFor waits for the nth event of a topic.
func (e *taskEvents) waitFor(ctx context.Context, topic string, n int) {
	e.s.Poll(ctx, fmt.Sprintf("event %d of %s", n, topic), func() bool {
		seen := 0
		for _, ev := range e.get() {
			if ev.Topic == topic {
				seen++
			}
		}
		return seen >= n
	})
}

// containerEvent is what the messages of all topics have in common.
type containerEvent interface {
	proto.Message
	GetContainerID() string
}

// topics are those of a container's events, in short.
func topics(t *testing.T, watch *taskEvents, id string) string {
	t.Helper()
	var found []string
	for _, e := range watch.get() {
		v, err := typeurl.UnmarshalAny(e.Event)
		if err != nil {
			t.Fatal(err)
		}
		if v.(containerEvent).GetContainerID() == id {
			found = append(found, strings.TrimPrefix(e.Topic, "/tasks/"))
		}
	}
	return strings.Join(found, " ")
}

// normal makes messages of two stacks comparable: it leaves out what differs
// from run to run.
type normal struct {
	s    *stack.Stack
	pids map[string]string
}

var (
	fifoDir = regexp.MustCompile(`/fifo/[0-9]+/`)
	anyTime = regexp.MustCompile(`^[0-9]{4}-`)
)

// message prints a message: pids are numbered as they come, and times, paths and
// names that are the stack's own are replaced.
func (n *normal) message(t *testing.T, m proto.Message) string {
	t.Helper()
	data, err := protojson.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	var v any
	if err := json.Unmarshal(data, &v); err != nil {
		t.Fatal(err)
	}
	out, err := json.Marshal(n.value("", v))
	if err != nil {
		t.Fatal(err)
	}
	return string(m.ProtoReflect().Descriptor().Name()) + " " + string(out)
}

func (n *normal) value(key string, v any) any {
	switch v := v.(type) {
	case map[string]any:
		for k, e := range v {
			v[k] = n.value(k, e)
		}
	case []any:
		for i, e := range v {
			v[i] = n.value(key, e)
		}
	case float64:
		if !strings.HasSuffix(strings.ToLower(key), "pid") {
			return v
		}
		pid := fmt.Sprint(v)
		if n.pids[pid] == "" {
			n.pids[pid] = fmt.Sprintf("pid %d", len(n.pids)+1)
		}
		return n.pids[pid]
	case string:
		if anyTime.MatchString(v) {
			return "time"
		}
		v = strings.NewReplacer(n.s.Dir, "DIR", n.s.ID, "ID").Replace(v)
		return fifoDir.ReplaceAllString(v, "/fifo/N/")
	}
	return v
}

// shimPid returns the pid of the shim that serves a container's task.
func shimPid(t *testing.T, c *stack.Container) int {
	t.Helper()
	ns, id := filepath.Base(filepath.Dir(c.Bundle())), c.ID()
	resp, err := dialTask(t, c).Connect(namespaces.WithNamespace(t.Context(), ns), &taskapi.ConnectRequest{ID: id})
	if err != nil {
		t.Fatal(err)
	}
	return int(resp.ShimPid)
}

// shimPath returns the program of a container's shim: of its init's parent.
func shimPath(t *testing.T, c *stack.Container) string {
	t.Helper()
	path, err := os.Readlink(fmt.Sprintf("/proc/%s/exe", procField(t, int(c.Task.Pid()), "PPid")))
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// procField returns a field of a process's /proc/<pid>/status.
func procField(t *testing.T, pid int, name string) string {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if value, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.TrimSpace(value)
		}
	}
	t.Fatalf("process %d has no %s", pid, name)
	return ""
}

// readCgroup reads a file of a container's cgroup: with version 1, of the one of a
// controller.
func readCgroup(s *stack.Stack, controller, name, file string) (string, error) {
	if cgroups.Mode() == cgroups.Unified {
		controller = ""
	}
	data, err := os.ReadFile(filepath.Join("/sys/fs/cgroup", controller, s.Cgroup(name), file))
	return strings.TrimSpace(string(data)), err
}

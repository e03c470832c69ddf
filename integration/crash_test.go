package integration

import (
	"fmt"
	"syscall"
	"testing"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"

	"github.com/stasis-run/stasis/integration/stack"
)

// A stage is a moment in a container's life at which a shim or containerd is
// killed.
type stage struct {
	name    string
	command string // the runtime's, which is held; none if empty
	// prepare leads to it; call is what is held then.
	prepare func(s *scene, c *stack.Container)
	call    func(s *scene, c *stack.Container) error
}

// create makes a task without streams: a client that loses containerd takes them
// away.
func create(s *scene, c *stack.Container) error {
	task, err := c.NewTask(s.ctx, cio.NullIO)
	if err == nil {
		c.Task = task
	}
	return err
}

func created(s *scene, c *stack.Container) { s.must("create", c.Create(s.ctx)) }
func started(s *scene, c *stack.Container) { c.Start(s.ctx) }
func killed(s *scene, c *stack.Container)  { c.Start(s.ctx); c.Kill(s.ctx, syscall.SIGKILL) }
func paused(s *scene, c *stack.Container) {
	c.Start(s.ctx)
	s.must("pause", c.Task.Pause(s.ctx))
}

var stages = []stage{
	{"create", "create", func(*scene, *stack.Container) {}, create},
	{"created", "", created, nil},
	{"start", "start", created, func(s *scene, c *stack.Container) error { return c.Task.Start(s.ctx) }},
	{"running", "", started, nil},
	{"exec", "exec", started, func(s *scene, c *stack.Container) error {
		spec, err := c.Spec(s.ctx)
		if err != nil {
			return err
		}
		p, err := c.Task.Exec(s.ctx, "e", spec.Process, cio.NullIO)
		if err != nil {
			return err
		}
		return p.Start(s.ctx)
	}},
	{"pause", "pause", started, func(s *scene, c *stack.Container) error { return c.Task.Pause(s.ctx) }},
	{"paused", "", paused, nil},
	{"kill", "kill", started, func(s *scene, c *stack.Container) error { return c.Task.Kill(s.ctx, syscall.SIGKILL) }},
	{"delete", "delete", killed, func(s *scene, c *stack.Container) error {
		_, err := c.Task.Delete(s.ctx)
		return err
	}},
}

// atEachStage runs a test at each stage, before and after the runtime has done
// its work.
func atEachStage(t *testing.T, test func(s *scene, c *stack.Container, st stage, call *heldCall)) {
	for _, st := range stages {
		for name, when := range map[string]stack.When{"before": stack.Before, "after": stack.After} {
			if st.call == nil {
				if when == stack.After {
					continue
				}
				name = "idle"
			}
			t.Run(st.name+"/"+name, func(t *testing.T) {
				t.Parallel()
				// go-runc's file for an exec's spec, which the kernel
				// cannot remove for it.
				s := newScene(t, stack.Options{KnownLeaks: []string{"runc-process"}})
				s.crashes = true
				c := s.container("c")
				st.prepare(s, c)
				var call *heldCall
				if st.call != nil {
					call = s.hold(st.command, when, func() error { return st.call(s, c) })
				}
				test(s, c, st, call)
			})
		}
	}
}

// TestKilledShim kills the shim. containerd has it clean up, and the container
// can be started again.
func TestKilledShim(t *testing.T) {
	t.Parallel()
	atEachStage(t, func(s *scene, c *stack.Container, st stage, call *heldCall) {
		_, shim := s.shim(c)
		pid := s.pidOrZero(c)
		s.must("kill the shim", syscall.Kill(shim, syscall.SIGKILL))
		s.f.Reset()
		if call != nil {
			if err := call.result(); err == nil && st.name != "delete" {
				s.t.Errorf("%s succeeded without a shim", st.name)
			}
		}
		s.clean(c)
		if pid != 0 {
			s.gone(pid)
		}
		if st.name != "create" { // of which containerd does not know
			if e := s.waitFor(s.ctx, "exit", "c", ""); e.status != 137 {
				s.t.Errorf("exit code %d, want 137", e.status)
			}
		}
		s.Poll(s.ctx, "containerd to forget the task", func() bool {
			_, err := c.Container.Task(s.ctx, nil)
			return errdefs.IsNotFound(err)
		})
		c.Start(s.ctx)
		c.Exec(s.ctx, "true")
		s.end(c)
	})
}

// pidOrZero returns init's pid if there is one.
func (s *scene) pidOrZero(c *stack.Container) int {
	shim, _ := s.shim(c)
	r, err := shim.Connect(s.ctx, &taskapi.ConnectRequest{ID: c.ID()})
	s.must("connect", err)
	return int(r.TaskPid)
}

// TestKilledShimOfPod kills the shim of several containers.
func TestKilledShimOfPod(t *testing.T) {
	t.Parallel()
	s := newScene(t, stack.Options{})
	s.crashes = true
	group := oci.WithAnnotations(map[string]string{"io.containerd.runc.v2.group": "g"})
	var pod []*stack.Container
	for i := range 4 {
		pod = append(pod, s.running(fmt.Sprint("c", i), group))
	}
	s.must("start exec", s.exec(pod[1], "e", "sleep", "1000").Start(s.ctx))
	s.must("pause", pod[2].Task.Pause(s.ctx))
	s.must("kill", pod[3].Task.Kill(s.ctx, syscall.SIGTERM))
	_, shim := s.shim(pod[0])
	s.must("kill the shim", syscall.Kill(shim, syscall.SIGKILL))
	for _, c := range pod {
		s.waitFor(s.ctx, "exit", c.ID(), "")
		s.clean(c)
	}
	for _, c := range pod {
		s.Poll(s.ctx, "containerd to forget the task", func() bool {
			_, err := c.Container.Task(s.ctx, nil)
			return errdefs.IsNotFound(err)
		})
		c.Start(s.ctx)
	}
	for _, c := range pod {
		s.end(c)
	}
}

// TestKilledShimKeepsExit kills a shim whose container has exited.
func TestKilledShimKeepsExit(t *testing.T) {
	t.Parallel()
	s := newScene(t, stack.Options{})
	s.crashes = true
	c := s.container("c", stack.Args("sh", "-c", "exit 7"))
	c.Start(s.ctx)
	if code := c.Wait(s.ctx); code != 7 {
		t.Errorf("exit code %d, want 7", code)
	}
	_, shim := s.shim(c)
	s.must("kill the shim", syscall.Kill(shim, syscall.SIGKILL))
	if e := s.waitFor(s.ctx, "delete", "c", ""); e.status != 7 {
		t.Errorf("delete: exit code %d, want 7", e.status)
	}
	for _, e := range s.of("exit", "c") {
		if e.status != 7 {
			t.Errorf("exit code %d, want 7", e.status)
		}
	}
	s.clean(c)
}

// TestKilledContainerd kills containerd, and lets the runtime go on while there
// is none, or after it was started again. The call goes through to its end.
func TestKilledContainerd(t *testing.T) {
	t.Parallel()
	for name, late := range map[string]bool{"while down": false, "after": true} {
		t.Run(name, func(t *testing.T) {
			atEachStage(t, func(s *scene, c *stack.Container, st stage, call *heldCall) {
				if late && st.name == "delete" {
					s.must("delete", call.release())
					s.t.Skip("containerd waits for ten seconds, then removes the bundle under the runtime")
				}
				shim, shimPid := s.shim(c)
				s.Kill9()
				if call != nil {
					if err := call.result(); err == nil {
						s.t.Errorf("%s succeeded without containerd", st.name)
					}
					if !late {
						s.f.Release(call.command, call.when)
					}
				}
				if !late {
					s.settles(shim, c, st)
				}
				s.Restart()
				if call != nil && late {
					s.f.Release(call.command, call.when)
				}
				if st.name == "delete" {
					s.clean(c)
					s.gone(shimPid)
					return
				}
				s.settles(shim, c, st)
				task, err := c.Container.Task(s.ctx, nil)
				s.must("load", err)
				c.Task = task
				exit, err := task.Wait(s.ctx)
				s.must("wait", err)
				want := uint32(137)
				switch st.name {
				case "create", "created":
					s.must("start", task.Start(s.ctx))
				case "pause", "paused":
					s.must("resume", task.Resume(s.ctx))
				case "exec":
					p, err := task.LoadProcess(s.ctx, "e", nil)
					s.must("load exec", err)
					if status, err := p.Status(s.ctx); err != nil || status.Status != client.Running {
						s.t.Errorf("exec: %+v, %v; want it to run", status, err)
					}
				}
				if st.name != "kill" {
					c.Exec(s.ctx, "true")
					s.must("kill", task.Kill(s.ctx, syscall.SIGKILL))
				}
				if status := <-exit; status.ExitCode() != want || status.Error() != nil {
					s.t.Errorf("exit: %+v, want %d", status, want)
				}
				c.Delete(s.ctx)
			})
		})
	}
}

// settles waits until the state of a container is that which a stage leads to,
// by the shim's word.
func (s *scene) settles(shim taskapi.TTRPCTaskService, c *stack.Container, st stage) {
	s.t.Helper()
	want := map[string]string{
		"create": "CREATED", "created": "CREATED", "pause": "PAUSED", "paused": "PAUSED", "kill": "STOPPED", "delete": "",
	}[st.name]
	exec := ""
	if st.name == "exec" {
		exec = "e"
	}
	if want == "" {
		want = "RUNNING"
	}
	s.Poll(s.ctx, "the task to be "+want, func() bool {
		r, err := shim.State(s.ctx, &taskapi.StateRequest{ID: c.ID(), ExecID: exec})
		if st.name == "delete" {
			return err != nil
		}
		return err == nil && r.Status.String() == want
	})
}

// TestExitWhileContainerdIsDown has a container, and an exec, exit meanwhile.
func TestExitWhileContainerdIsDown(t *testing.T) {
	t.Parallel()
	s := newScene(t, stack.Options{})
	s.crashes = true
	const script = "trap 'exit %d' TERM; echo ready; while :; do sleep 0.1; done"
	c := s.running("c", stack.Args("sh", "-c", fmt.Sprintf(script, 7)))
	d := s.running("d")
	e := s.exec(d, "e", "sh", "-c", fmt.Sprintf(script, 8))
	s.must("start exec", e.Start(s.ctx))
	c.Stdout.WaitFor(s.ctx, "ready\n")
	d.Stdout.WaitFor(s.ctx, "ready\n")
	cShim, _ := s.shim(c)
	dShim, _ := s.shim(d)
	s.Kill9()
	s.must("signal", syscall.Kill(int(c.Task.Pid()), syscall.SIGTERM))
	s.must("signal", syscall.Kill(int(e.Pid()), syscall.SIGTERM))
	wait := func(shim taskapi.TTRPCTaskService, id, exec string) {
		_, err := shim.Wait(s.ctx, &taskapi.WaitRequest{ID: id, ExecID: exec})
		s.must("wait", err)
	}
	wait(cShim, "c", "")
	wait(dShim, "d", "e")
	s.Restart()

	task, err := c.Container.Task(s.ctx, nil)
	s.must("load", err)
	exit, err := task.Wait(s.ctx)
	s.must("wait", err)
	if status := <-exit; status.ExitCode() != 7 {
		t.Errorf("exit: %+v, want 7", status)
	}
	status, err := task.Delete(s.ctx)
	s.must("delete", err)
	if status.ExitCode() != 7 {
		t.Errorf("delete: exit code %d, want 7", status.ExitCode())
	}
	d.Load(s.ctx)
	p, err := d.Task.LoadProcess(s.ctx, "e", nil)
	s.must("load exec", err)
	if status, err := p.Delete(s.ctx); err != nil || status.ExitCode() != 8 {
		t.Errorf("delete exec: %+v, %v; want 8", status, err)
	}
	// Output passes through no containerd.
	if out := d.Exec(s.ctx, "echo", "hi"); out != "hi\n" {
		t.Errorf("exec printed %q", out)
	}
	s.end(d)
}

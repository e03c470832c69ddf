package integration

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/integration/stack"
)

// The tests of this file kill CRIU, the OCI runtime, the shim or containerd in
// the middle of a dump or of a restore, and then look whether the container is
// as it has to be and whether anything is left behind.

// A patient is a container that counts, and has a TCP connection to the host.
type patient struct {
	*scene
	c     *stack.Container
	netns *stack.Netns
	stage string // what is being tried, for the messages
	dumps int
}

// newPatient starts a patient on a stack of its own.
func newPatient(t *testing.T) *patient {
	t.Helper()
	s := newScene(t, stack.Options{})
	s.crashes = true
	n := s.NewNetns()
	l, err := net.Listen("tcp", n.HostAddr+":0")
	s.must("listen", err)
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go io.Copy(conn, conn)
		}
	}()
	p := &patient{scene: s, netns: n}
	p.c = s.NewContainer(s.ctx, "c", stack.Probe,
		stack.ProbeArgs("-items", "out,counter,heap", "-mib", "16", "-connect", l.Addr().String()), n.With())
	p.c.StartProbe(s.ctx)
	return p
}

// errorf and fatalf report what went wrong at a stage.
func (p *patient) errorf(format string, args ...any) {
	p.scene.t.Helper()
	p.scene.t.Errorf("%s: %s", p.stage, fmt.Sprintf(format, args...))
}

func (p *patient) fatalf(format string, args ...any) {
	p.scene.t.Helper()
	p.scene.t.Fatalf("%s: %s", p.stage, fmt.Sprintf(format, args...))
}

// at begins a stage.
func (p *patient) at(format string, args ...any) {
	p.stage = fmt.Sprintf(format, args...)
	p.scene.t.Log(p.stage)
}

// dir is a folder for a new checkpoint.
func (p *patient) dir() string {
	p.dumps++
	return filepath.Join(p.Dir, fmt.Sprint("checkpoint-", p.dumps))
}

// dump dumps the patient with its connection.
func (p *patient) dump(dir string, exit bool) error {
	return p.c.CheckpointErr(p.ctx, dir, &options.CheckpointOptions{OpenTcp: true, Exit: exit})
}

// fine checks that the patient runs, counts and is connected, and that nothing
// of a dump is left around it.
func (p *patient) fine() {
	p.scene.t.Helper()
	if status := p.c.Status(p.ctx); status != client.Running {
		p.fatalf("the container is %s", status)
	}
	if p.frozen() {
		p.fatalf("the container's cgroup is frozen")
	}
	before := p.c.Probe(p.ctx)
	p.Poll(p.ctx, "the container to count", func() bool { return p.c.Probe(p.ctx).Counter > before.Counter })
	p.unlocked()
	p.alone()
}

// frozen tells whether the patient's cgroup is frozen.
func (p *patient) frozen() bool {
	p.scene.t.Helper()
	for file, thawed := range map[string]string{
		"/sys/fs/cgroup/freezer" + p.Cgroup("c") + "/freezer.state": "THAWED",
		"/sys/fs/cgroup" + p.Cgroup("c") + "/cgroup.freeze":         "0",
	} {
		if state, err := os.ReadFile(file); err == nil {
			return strings.TrimSpace(string(state)) != thawed
		}
	}
	p.fatalf("the container has no freezer")
	return false
}

// unlocked checks that CRIU's lock is not on the patient's network.
func (p *patient) unlocked() {
	p.scene.t.Helper()
	rules, err := p.netns.Firewall()
	p.must("firewall", err)
	for _, r := range rules {
		if strings.Contains(r, "CRIU") {
			p.errorf("left in the container's network namespace: %s", r)
		}
	}
}

// alone waits until the shim has no child but the container's init.
func (p *patient) alone() {
	p.scene.t.Helper()
	p.Poll(p.ctx, "the shim's other children to be gone", func() bool { return len(p.children()) == 0 })
}

// children returns the shim's children, without the container's init.
func (p *patient) children() []int {
	p.scene.t.Helper()
	shim, pid := p.shim(p.c)
	state, err := shim.State(p.ctx, &taskapi.StateRequest{ID: "c"})
	p.must("state", err)
	return slices.DeleteFunc(childrenOf(pid), func(child int) bool { return child == int(state.Pid) })
}

// aborted checks what a dump says and leaves that CRIU did not live to finish.
func (p *patient) aborted(dir string, err error) {
	p.scene.t.Helper()
	if err == nil {
		p.fatalf("the dump succeeded")
	}
	if !strings.Contains(err.Error(), "dump.log") {
		p.errorf("the error does not say where CRIU's log is: %v", err)
	}
	if files := list(dir); len(files) > 0 {
		p.errorf("left in the checkpoint's folder: %q", files)
	}
}

// list returns the names of the files in a folder.
func list(dir string) []string {
	var names []string
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// again dumps the patient, which ends it, and restores it.
func (p *patient) again() {
	p.scene.t.Helper()
	dir := p.dir()
	p.must("checkpoint", p.dump(dir, true))
	p.c.Restore(p.ctx, dir)
	p.fine()
}

// dumpStages are lines of CRIU's log in the course of a dump. There is none of
// the short times in which a process dies with CRIU; see docs/limits.md.
var dumpStages = []string{
	"CRIU run id",             // it finds out what the kernel can do
	"Dumping processes (pid",  // it begins
	"Running pre-dump",        // the container is being frozen
	"freezing cgroup",         //
	"SEIZE",                   // processes are being stopped
	"Lock network",            // iptables is being called
	"Collecting netns",        // the network is locked
	"switched to daemon mode", // CRIU's code runs in the process
	"page-xfer: Transferring", // it writes pages
	"Dumping mm (pid",         // its code is out again
	"Writing image inventory", // all is written
	"Running network-unlock",  // the network is being unlocked
}

// killCRIU begins a dump and kills CRIU at a stage.
func (p *patient) killCRIU(stage string, exit bool) (dir string, err error) {
	p.scene.t.Helper()
	dir = p.dir()
	dump := p.hold("checkpoint", stack.During(stage), func() error { return p.dump(dir, exit) })
	p.must("kill", syscall.Kill(p.criu(), syscall.SIGKILL))
	err = dump.result()
	p.f.Reset()
	return dir, err
}

// criu returns the pid of the CRIU that dumps the patient.
func (p *patient) criu() int {
	p.scene.t.Helper()
	for _, program := range p.children() { // which runs the runtime
		for _, runtime := range childrenOf(program) {
			for _, pid := range childrenOf(runtime) {
				args, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
				if strings.Contains(string(args), "\x00swrk\x00") || strings.Contains(string(args), "criu: ") {
					return pid
				}
			}
		}
	}
	p.fatalf("there is no CRIU")
	return 0
}

func childrenOf(pid int) []int {
	var found []int
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, t := range tasks {
		b, _ := os.ReadFile(t)
		for f := range strings.FieldsSeq(string(b)) {
			child, _ := strconv.Atoi(f)
			found = append(found, child)
		}
	}
	return found
}

// TestKillCRIUInDump kills CRIU at each stage of a dump.
func TestKillCRIUInDump(t *testing.T) {
	t.Parallel()
	p := newPatient(t)
	for i, stage := range dumpStages {
		// With exit the network stays locked, and each stage is like the others.
		exit := i%2 == 1 && stage != "Running network-unlock"
		p.at("%s, exit %v", stage, exit)
		dir, err := p.killCRIU(stage, exit)
		p.aborted(dir, err)
		p.fine()
	}
	p.at("a dump after them")
	p.again()
}

// TestKillCRIUInDumpOfPaused kills CRIU when it has thawed a paused container.
func TestKillCRIUInDumpOfPaused(t *testing.T) {
	t.Parallel()
	p := newPatient(t)
	for _, stage := range []string{"freezing cgroup", "Collecting netns", "page-xfer: Transferring", "Writing image inventory"} {
		p.at("%s", stage)
		p.must("pause", p.c.Task.Pause(p.ctx))
		dir, err := p.killCRIU(stage, false)
		p.aborted(dir, err)
		if status := p.c.Status(p.ctx); status != client.Paused {
			p.errorf("the container is %s", status)
		}
		if !p.frozen() {
			p.errorf("the container's cgroup is thawed")
		}
		p.unlocked()
		p.must("resume", p.c.Task.Resume(p.ctx))
		p.fine()
	}
}

// TestKillCRIUAtTheEnd kills CRIU when it has written the checkpoint of a
// container that it then kills: one of the two has to stay.
func TestKillCRIUAtTheEnd(t *testing.T) {
	t.Parallel()
	p := newPatient(t)
	for _, stage := range []string{"Running post-dump", "Unfreezing tasks"} {
		p.at("%s", stage)
		dir := p.dir()
		p.f.KillCRIU("checkpoint", stage)
		err := p.dump(dir, true)
		p.f.Reset()
		if err == nil {
			p.c.Restore(p.ctx, dir)
		}
		p.fine()
	}
}

// restoreStages are lines of CRIU's log in the course of a restore.
var restoreStages = []string{
	"Preparing cgroups yard",
	"Forking task with 1 pid",
	"cg: Move into",
	"Running post-setup-namespaces",
	"nr_restored_pages", // from here on, runc takes ten seconds to find its end
}

// TestKillCRIUInRestore kills CRIU at each stage of a restore, and the runtime
// before and after.
func TestKillCRIUInRestore(t *testing.T) {
	t.Parallel()
	p := newPatient(t)
	dir := p.dir()
	p.must("checkpoint", p.dump(dir, true))
	p.must("create", p.c.Create(p.ctx, client.WithRestoreImagePath(dir)))
	for _, stage := range restoreStages {
		p.at("%s", stage)
		p.killCRIUInRestore(stage)
	}
	for _, when := range []stack.When{stack.Before, stack.During("nr_restored_pages")} {
		p.at("the runtime, %v", when)
		p.killRuntime(when)
	}
	p.at("a restore after them")
	p.must("start", p.start())
	p.fine()
}

// TestKillCRIULateInRestore kills CRIU when it is about to let the container run,
// and the runtime after that. The network is open again by then, so connections
// are lost.
func TestKillCRIULateInRestore(t *testing.T) {
	t.Parallel()
	p := newPatient(t)
	dir := p.dir()
	p.must("checkpoint", p.dump(dir, true))
	p.must("create", p.c.Create(p.ctx, client.WithRestoreImagePath(dir)))
	p.at("pre-resume")
	p.killCRIUInRestore("Running pre-resume")
	p.at("the runtime, after")
	p.killRuntime(stack.After)
	p.at("a restore after them")
	p.must("start", p.start())
	p.counts()
}

// counts is fine for a patient that may have lost its connection.
func (p *patient) counts() {
	p.scene.t.Helper()
	before, err := p.c.ProbeErr(p.ctx)
	p.must("probe", err)
	p.Poll(p.ctx, "the container to count", func() bool {
		after, err := p.c.ProbeErr(p.ctx)
		return err == nil && after.Counter > before.Counter
	})
	p.unlocked()
	p.alone()
}

// idle waits until the shim has ended what it does with the patient.
func (p *patient) idle() {
	p.scene.t.Helper()
	shim, _ := p.shim(p.c)
	// It queues like a dump; whether it works does not matter.
	_, _ = shim.Update(p.ctx, &taskapi.UpdateTaskRequest{ID: "c", Resources: &anypb.Any{Value: []byte(`{}`)}})
}

// killCRIUInRestore kills CRIU at a stage of a restore.
func (p *patient) killCRIUInRestore(stage string) {
	p.scene.t.Helper()
	p.f.KillCRIU("restore", stage)
	p.broken(p.start())
}

// killRuntime kills the runtime in a restore.
func (p *patient) killRuntime(when stack.When) {
	p.scene.t.Helper()
	restore := p.hold("restore", when, p.start)
	for _, pid := range p.children() {
		if pid != p.pidInBundle() {
			p.must("kill", syscall.Kill(pid, syscall.SIGKILL))
		}
	}
	p.broken(restore.result())
}

// broken takes the result of a restore that has to have failed.
func (p *patient) broken(err error) {
	p.scene.t.Helper()
	p.f.Reset()
	if err == nil {
		p.fatalf("the restore succeeded")
	}
	p.retryable()
}

// pidInBundle is init's as the runtime has left it, 0 if it has not.
func (p *patient) pidInBundle() int {
	data, _ := os.ReadFile(filepath.Join(p.c.Bundle(), "init.pid"))
	pid, _ := strconv.Atoi(string(data))
	return pid
}

// start starts the patient's task without the client, which would close its
// streams if that failed.
func (p *patient) start() error {
	_, err := p.Client().TaskService().Start(p.ctx, &tasks.StartRequest{ContainerID: "c"})
	return native(err)
}

// mountRoot is a folder that CRIU makes for the processes' mounts.
var mountRoot = regexp.MustCompile(`/tmp/\.criu\.mntns\.\w{6}`)

// retryable checks that a failed restore has left a created task and nothing
// else.
func (p *patient) retryable() {
	p.scene.t.Helper()
	shim, _ := p.shim(p.c)
	state, err := shim.State(p.ctx, &taskapi.StateRequest{ID: "c"})
	p.must("state", err)
	if state.Pid != 0 || state.Status.String() != "CREATED" {
		p.errorf("state %v, pid %d; want created, no process", state.Status, state.Pid)
	}
	work, _ := filepath.Glob(filepath.Join(p.c.Bundle(), "work", ".criu.*"))
	state2, _ := filepath.Glob(filepath.Join("/run/containerd/runc", p.Namespace, "c", "*"))
	left := slices.Concat(p.ContainerCgroups("c"), work, state2)
	if log, err := os.ReadFile(filepath.Join(p.c.Bundle(), "work", layout.RestoreLog)); err == nil {
		for _, dir := range mountRoot.FindAllString(string(log), -1) {
			if _, err := os.Stat(dir); err == nil {
				left = append(left, dir)
			}
		}
	}
	if len(left) > 0 {
		p.errorf("left by the restore: %q", left)
	}
	p.alone()
}

// TestKillShimInDump kills the shim at stages of a dump that is to replace an
// older checkpoint.
func TestKillShimInDump(t *testing.T) {
	t.Parallel()
	p := newPatient(t)
	old := p.dir()
	p.must("checkpoint", p.dump(old, true))
	p.waitFor(p.ctx, "exit", "c", "")
	before := len(p.of("exit", "c"))
	for i, stage := range []string{"freezing cgroup", "Collecting netns", "page-xfer: Transferring", "Writing image inventory"} {
		exit := i%2 == 0
		p.at("%s, exit %v", stage, exit)
		p.c.Restore(p.ctx, old)
		_, pid := p.shim(p.c)
		p.f.KillShim("checkpoint", stack.During(stage))
		_, err := p.Client().TaskService().Checkpoint(p.ctx, &tasks.CheckpointTaskRequest{
			ContainerID: "c",
			Options:     p.any(&options.CheckpointOptions{OpenTcp: true, Exit: exit, ImagePath: old}),
		})
		p.f.Reset()
		if err == nil {
			p.fatalf("the dump succeeded without a shim")
		}
		p.gone(pid)
		if !p.journal.wait(p.ctx, stack.WaitTimeout(), func() bool { return p.count("exit") > before+i }) {
			p.fatalf("no exit; events:\n%s", p.journal)
		}
		p.clean(p.c)
		p.unlocked()
		if _, err := checkpoint.Open(p.ctx, old); err != nil {
			p.fatalf("the older checkpoint: %v", err)
		}
	}
	p.at("a restore after them")
	p.c.Restore(p.ctx, old)
	p.counts()
}

// count returns how many events of a topic there were; the journal's mu is held.
func (p *patient) count(topic string) (n int) {
	for _, e := range p.all {
		if e.topic == topic {
			n++
		}
	}
	return n
}

// TestKillShimInRestore kills the shim at stages of a restore from containerd's
// copy of a checkpoint.
func TestKillShimInRestore(t *testing.T) {
	t.Parallel()
	p := newPatient(t)
	img := p.c.CheckpointImage(p.ctx, "stasis.test/killed:latest", &options.CheckpointOptions{OpenTcp: true, Exit: true})
	p.c.Wait(p.ctx)
	p.c.DeleteTask(p.ctx)
	for _, stage := range []string{"Preparing cgroups yard", "cg: Move into", "nr_restored_pages", "Running network-unlock", "after"} {
		p.at("%s", stage)
		when := stack.During(stage)
		if stage == "after" {
			when = stack.After
		}
		p.f.KillShim("restore", when)
		err := p.c.StartErr(p.ctx, client.WithTaskCheckpoint(img))
		p.f.Reset()
		if err == nil {
			p.fatalf("the restore succeeded without a shim")
		}
		p.clean(p.c)
		p.Poll(p.ctx, "containerd's copy to be removed", func() bool { return len(list(p.TempDir())) == 0 })
		// containerd forgets the task last.
		p.Poll(p.ctx, "the task to be gone", func() bool { return !errdefs.IsAlreadyExists(p.c.Create(p.ctx)) })
		_, err = p.c.Task.Delete(p.ctx, client.WithProcessKill)
		p.must("delete", err)
	}
	p.at("a restore after them")
	p.must("start", p.c.StartErr(p.ctx, client.WithTaskCheckpoint(img)))
	p.counts()
}

// TestKillContainerdInDump kills containerd at stages of a dump.
func TestKillContainerdInDump(t *testing.T) {
	t.Parallel()
	p := newPatient(t)
	for _, stage := range []string{"SEIZE", "page-xfer: Transferring", "Writing image inventory"} {
		p.at("%s", stage)
		dir := p.dir()
		dump := p.hold("checkpoint", stack.During(stage), func() error {
			return p.c.CheckpointErr(p.ctx, dir, &options.CheckpointOptions{OpenTcp: true})
		})
		p.Kill9()
		if dump.release() == nil {
			p.fatalf("the dump succeeded without containerd")
		}
		p.Restart()
		p.c.Load(p.ctx)
		p.Poll(p.ctx, "the checkpoint", func() bool {
			_, err := checkpoint.Open(p.ctx, dir)
			return err == nil
		})
		p.f.Reset()
		p.fine()
	}
}

// TestKillContainerdInExitDump kills containerd in a dump that ends the
// container: it has to learn of its exit, and can restore it.
func TestKillContainerdInExitDump(t *testing.T) {
	t.Parallel()
	p := newPatient(t)
	dir := p.dir()
	p.must("mkdir", os.Mkdir(dir, 0o700))
	dump := p.hold("checkpoint", stack.During("page-xfer: Transferring"), func() error {
		_, err := p.Client().TaskService().Checkpoint(p.ctx, &tasks.CheckpointTaskRequest{
			ContainerID: "c",
			Options:     p.any(&options.CheckpointOptions{OpenTcp: true, Exit: true, ImagePath: dir}),
		})
		return err
	})
	p.Kill9()
	if dump.release() == nil {
		t.Fatal("the dump succeeded without containerd")
	}
	p.Restart()
	p.c.Load(p.ctx)
	if code := p.c.Wait(p.ctx); code != 137 {
		t.Errorf("exit code %d, want 137", code)
	}
	p.c.DeleteTask(p.ctx)
	p.c.Restore(p.ctx, dir)
	p.fine()
}

// TestKillContainerdInRestore kills containerd at stages of a restore, which then
// goes on.
func TestKillContainerdInRestore(t *testing.T) {
	t.Parallel()
	p := newPatient(t)
	dir := p.dir()
	p.must("checkpoint", p.dump(dir, true))
	for _, stage := range []string{"Preparing cgroups yard", "nr_restored_pages", "Running post-restore"} {
		p.at("%s", stage)
		p.must("create", p.c.Create(p.ctx, client.WithRestoreImagePath(dir)))
		restore := p.hold("restore", stack.During(stage), p.start)
		p.Kill9()
		if restore.release() == nil {
			p.fatalf("the restore succeeded without containerd")
		}
		p.Restart()
		p.c.Load(p.ctx)
		p.Poll(p.ctx, "the container to run", func() bool { return p.c.Status(p.ctx) == client.Running })
		p.f.Reset()
		p.fine()
		p.must("checkpoint", p.dump(dir, true))
	}
	p.c.Restore(p.ctx, dir)
	p.fine()
}

// TestDeadlineInDump has the time of a dump run out.
func TestDeadlineInDump(t *testing.T) {
	t.Parallel()
	p := newPatient(t)
	begin := time.Now()
	p.must("checkpoint", p.dump(p.dir(), false))
	took := time.Since(begin)
	for i, stage := range []string{
		"before", "SEIZE", "page-xfer: Transferring", "Writing image inventory",
		// Now the container would die with CRIU, which may go on for a moment.
		"Parasite syscall_ip", "to trap",
	} {
		p.at("%s", stage)
		dir := p.dir()
		when := stack.During(stage)
		if stage == "before" {
			when = stack.Before
		}
		err := p.cut("checkpoint", when, cutAfter(took), func(ctx context.Context) error {
			shim, _ := p.shim(p.c)
			_, err := shim.Checkpoint(ctx, &taskapi.CheckpointTaskRequest{
				ID: "c", Path: dir, Options: p.any(&options.CheckpointOptions{OpenTcp: true, Exit: i%2 == 1}),
			})
			return err
		}, p.idle)
		p.idle()
		p.f.Reset()
		if err == nil {
			p.fatalf("the dump succeeded")
		}
		p.fine()
		if files := list(dir); len(files) > 0 {
			p.errorf("left in the checkpoint's folder: %q", files)
		}
	}
	p.again()
}

// TestDeadlineInRestore has the time of a restore run out.
func TestDeadlineInRestore(t *testing.T) {
	t.Parallel()
	p := newPatient(t)
	dir := p.dir()
	p.must("checkpoint", p.dump(dir, true))
	begin := time.Now()
	p.c.Restore(p.ctx, dir)
	took := time.Since(begin)
	p.must("checkpoint", p.dump(dir, true))
	p.must("create", p.c.Create(p.ctx, client.WithRestoreImagePath(dir)))
	for _, when := range []stack.When{stack.Before, stack.During("Forking task"), stack.During("nr_restored_pages")} {
		p.at("%v", when)
		err := p.cut("restore", when, cutAfter(took), func(ctx context.Context) error {
			shim, _ := p.shim(p.c)
			_, err := shim.Start(ctx, &taskapi.StartRequest{ID: "c"})
			return err
		}, p.idle)
		p.idle()
		p.f.Reset()
		if err == nil {
			p.fatalf("the restore succeeded")
		}
		p.retryable()
	}
	p.must("start", p.start())
	p.fine()
}

// any packs options for a call.
func (p *patient) any(v any) *anypb.Any {
	p.scene.t.Helper()
	a, err := typeurl.MarshalAnyToProto(v)
	p.must("options", err)
	return a
}

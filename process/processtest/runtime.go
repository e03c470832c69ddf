package processtest

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"

	runc "github.com/containerd/go-runc"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/process"
)

// Op is a call of a Runtime.
type Op string

const (
	Create     Op = "create"
	Start      Op = "start"
	Exec       Op = "exec"
	Kill       Op = "kill"
	Pause      Op = "pause"
	Resume     Op = "resume"
	Update     Op = "update"
	Delete     Op = "delete"
	Checkpoint Op = "checkpoint"
	PreDump    Op = "pre-dump" // a Checkpoint with runc.PreDump
	Restore    Op = "restore"
)

// Runtime is a process.Runtime for one container. Its init and execs are children of
// the test that do nothing: cat, which waits for the end of its input (End). As with
// runc, a created init executes another program until it is started.
//
// The zero value is not usable; see NewRuntime. All processes end with the test.
type Runtime struct {
	t testing.TB
	// Group is linux.cgroupsPath of a control group that init is put into, from
	// NewGroup, or "". Without it, Pause and Resume have no effect.
	Group string

	mu            sync.Mutex
	bundle, id    string
	calls         []string
	dumps         []runc.CheckpointOpts
	before, after map[Op]func(context.Context) error
	init          *child
	execs         map[string]*child
	started       bool
}

var _ process.Runtime = (*Runtime)(nil)

// NewRuntime returns a runtime that knows no container.
func NewRuntime(t testing.TB) *Runtime {
	t.Helper()
	sh, err := os.Stat("/bin/sh")
	if err != nil {
		t.Skip(err)
	}
	cat, err := exec.LookPath("cat")
	if err != nil {
		t.Skip(err)
	}
	if st, err := os.Stat(cat); err != nil || os.SameFile(sh, st) {
		t.Skip("sh and cat are one program")
	}
	r := &Runtime{t: t, before: map[Op]func(context.Context) error{}, after: map[Op]func(context.Context) error{}, execs: map[string]*child{}}
	t.Cleanup(r.EndAll)
	return r
}

// For is process.NewRuntime: it returns r, for the container in a bundle.
func (r *Runtime) For(_ process.RuntimeConfig, _, bundle, id string) process.Runtime {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.bundle, r.id = bundle, id
	return r
}

// Before has fn called in each call of op, before that has any effect. If fn fails, the
// call fails with its error. nil: nothing. fn runs where the code under test does, so it
// must not call FailNow.
func (r *Runtime) Before(op Op, fn func(context.Context) error) { r.hook(r.before, op, fn) }

// After is Before for when the call has had its effect.
func (r *Runtime) After(op Op, fn func(context.Context) error) { r.hook(r.after, op, fn) }

func (r *Runtime) hook(hooks map[Op]func(context.Context) error, op Op, fn func(context.Context) error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	hooks[op] = fn
}

// Calls are the calls so far, in order of their beginning: an Op each, with Exec the ID
// and with Kill the signal after it, and "all".
func (r *Runtime) Calls() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.calls)
}

// Hold starts another process of the container, and returns when that has so many bytes
// of memory.
func (r *Runtime) Hold(size int64) {
	r.t.Helper()
	out, in, err := os.Pipe()
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { out.Close() })
	// It reads one block of that size, and waits for a reader of the rest.
	c, err := r.spawn(output{w: in}, "dd", "if=/dev/zero", "count=1", fmt.Sprintf("bs=%d", size))
	in.Close()
	if err != nil {
		r.t.Fatal(err)
	}
	r.mu.Lock()
	r.execs[fmt.Sprintf("hold %d", c.process.Pid)] = c
	r.mu.Unlock()
	if _, err := out.Read(make([]byte, 1)); err != nil {
		r.t.Fatal(err)
	}
}

// output are the streams of a process of which only the output matters.
type output struct {
	runc.IO
	w *os.File
}

func (o output) Set(cmd *exec.Cmd) { cmd.Stdout = o.w }

// Dumps are the options of the calls of Checkpoint so far that were no pre-dumps.
func (r *Runtime) Dumps() []runc.CheckpointOpts {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.dumps)
}

// End has a process of the container, init for "", end by itself with status 0.
func (r *Runtime) End(execID string) {
	r.t.Helper()
	c := r.child(execID)
	if c == nil {
		r.t.Errorf("there is no process %q", execID)
		return
	}
	c.input.Close()
}

// Write gives a process input, which it writes to its output.
func (r *Runtime) Write(execID, text string) {
	r.t.Helper()
	c := r.child(execID)
	if c == nil {
		r.t.Errorf("there is no process %q", execID)
		return
	}
	if _, err := c.input.WriteString(text); err != nil {
		r.t.Error(err)
	}
}

// Pid is that of a process, 0 if it was never started.
func (r *Runtime) Pid(execID string) int {
	if c := r.child(execID); c != nil {
		return c.process.Pid
	}
	return 0
}

// Living are the container's processes that have not ended.
func (r *Runtime) Living() (pids []int) {
	for _, c := range r.all() {
		if c.alive() {
			pids = append(pids, c.process.Pid)
		}
	}
	return pids
}

// Known tells whether the runtime knows of a container.
func (r *Runtime) Known() bool { return r.child("") != nil }

func (r *Runtime) child(execID string) *child {
	r.mu.Lock()
	defer r.mu.Unlock()
	if execID == "" {
		return r.init
	}
	return r.execs[execID]
}

func (r *Runtime) all() []*child {
	r.mu.Lock()
	defer r.mu.Unlock()
	var all []*child
	if r.init != nil {
		all = append(all, r.init)
	}
	for _, c := range r.execs {
		all = append(all, c)
	}
	return all
}

// call is a call of op, whose effect is that of fn.
func (r *Runtime) call(ctx context.Context, op Op, what string, fn func() error) error {
	r.mu.Lock()
	r.calls = append(r.calls, string(op)+what)
	before, after := r.before[op], r.after[op]
	r.mu.Unlock()
	err := ctx.Err()
	if err == nil && before != nil {
		err = before(ctx)
	}
	if err == nil {
		err = fn()
	}
	if err == nil && after != nil {
		err = after(ctx)
	}
	if err != nil {
		err = &process.RuntimeError{Op: string(op), Err: err}
	}
	return err
}

// errNone is an error of a call that needs a container.
var errNone = errors.New("container does not exist")

// known has fn called with init.
func (r *Runtime) known(fn func(init *child) error) func() error {
	return func() error {
		if init := r.child(""); init != nil {
			return fn(init)
		}
		return errNone
	}
}

func (r *Runtime) Create(ctx context.Context, opts *runc.CreateOpts) (pid int, err error) {
	err = r.call(ctx, Create, "", func() error {
		if r.Known() {
			return errors.New("container exists")
		}
		init, err := r.spawn(opts.IO, "/bin/sh", "-c", "read _ && exec cat")
		if err != nil {
			return err
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		r.init, pid = init, init.process.Pid
		return nil
	})
	if err != nil {
		return 0, err
	}
	return pid, nil
}

func (r *Runtime) Start(ctx context.Context) error {
	return r.call(ctx, Start, "", r.known(func(init *child) error {
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.started || !init.alive() {
			return errors.New("cannot start a container that is not created")
		}
		r.started = true
		_, err := init.input.Write([]byte("\n"))
		return err
	}))
}

func (r *Runtime) Exec(ctx context.Context, execID string, spec *specs.Process, opts *runc.ExecOpts) (pid int, err error) {
	err = r.call(ctx, Exec, " "+execID, r.known(func(init *child) error {
		if !init.alive() {
			return errors.New("cannot exec in a stopped container")
		}
		c, err := r.spawn(opts.IO, "cat")
		if err != nil {
			return err
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		r.execs[execID], pid = c, c.process.Pid
		return nil
	}))
	if err != nil {
		return 0, err
	}
	return pid, nil
}

func (r *Runtime) Kill(ctx context.Context, sig unix.Signal, all bool) error {
	what := fmt.Sprintf(" %d", sig)
	if all {
		what += " all"
	}
	return r.call(ctx, Kill, what, r.known(func(init *child) error {
		if !all {
			return init.process.Signal(sig)
		}
		for _, c := range r.all() {
			if err := c.process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
				return err
			}
		}
		return nil
	}))
}

func (r *Runtime) Pause(ctx context.Context) error {
	return r.call(ctx, Pause, "", r.known(func(init *child) error {
		return r.withCgroup(init, func(cg *process.Cgroup) error {
			return errors.Join(cg.Freeze(), cg.WaitFrozen(ctx))
		})
	}))
}

func (r *Runtime) Resume(ctx context.Context) error {
	return r.call(ctx, Resume, "", r.known(func(init *child) error {
		return r.withCgroup(init, (*process.Cgroup).Thaw)
	}))
}

func (r *Runtime) withCgroup(init *child, fn func(*process.Cgroup) error) error {
	if r.Group == "" {
		return nil
	}
	cg, err := process.LoadCgroup(init.process.Pid, r.Group)
	if err != nil {
		return err
	}
	return fn(cg)
}

func (r *Runtime) Update(ctx context.Context, resources *specs.LinuxResources) error {
	return r.call(ctx, Update, "", r.known(func(*child) error { return nil }))
}

func (r *Runtime) Delete(ctx context.Context) error {
	return r.call(ctx, Delete, "", func() error {
		r.EndAll()
		return nil
	})
}

// EndAll kills the container, which the runtime then does not know.
func (r *Runtime) EndAll() {
	for _, c := range r.all() {
		_ = c.process.Signal(unix.SIGKILL)
		c.input.Close()
	}
	process.KillCgroup(r.Group) // thaws it
	r.mu.Lock()
	defer r.mu.Unlock()
	r.init, r.started = nil, false
}

// Checkpoint runs the commands runc and criu of InstallCRIU, unless it is a pre-dump, and
// writes what no CRIU would restore. The log says that it is complete, and the
// inventory whether changes of memory are tracked from now on.
func (r *Runtime) Checkpoint(ctx context.Context, opts *runc.CheckpointOpts, actions ...runc.CheckpointAction) error {
	// An action changes the arguments of runc's command.
	args := []string{}
	for _, a := range actions {
		args = a(args)
	}
	op := Checkpoint
	if slices.Contains(args, "--pre-dump") {
		op = PreDump
	} else {
		r.mu.Lock()
		r.dumps = append(r.dumps, *opts)
		r.mu.Unlock()
	}
	write := r.known(func(init *child) error {
		if !init.alive() {
			return errors.New("cannot checkpoint a stopped container")
		}
		inventory := Inventory
		config, _ := os.ReadFile(filepath.Join(opts.WorkDir, "criu.conf"))
		if bytes.Contains(config, []byte("track-mem\n")) {
			inventory = trackedInventory
		}
		if opts.ParentPath != "" {
			if _, err := os.Stat(filepath.Join(opts.ImagePath, opts.ParentPath, "inventory.img")); err != nil {
				return err
			}
			inventory = trackedInventory
		}
		if err := errors.Join(
			os.WriteFile(filepath.Join(opts.ImagePath, "inventory.img"), inventory, 0o600),
			os.WriteFile(filepath.Join(opts.WorkDir, "dump.log"), []byte("(00.000001) Dumping finished successfully\n"), 0o600),
		); err != nil {
			return err
		}
		if slices.Contains(args, "--leave-running") || op == PreDump {
			return nil
		}
		for _, c := range r.all() {
			_ = c.process.Signal(unix.SIGKILL)
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		r.init = nil
		return nil
	})
	if op == PreDump {
		return r.call(ctx, op, "", write)
	}
	return r.dump(ctx, opts, actions, func() error { return r.call(ctx, op, "", write) })
}

// dump has the commands runc and criu play a dump, which is made by write: it is called
// when CRIU has told that it begins, and before it tells the result.
func (r *Runtime) dump(ctx context.Context, opts *runc.CheckpointOpts, actions []runc.CheckpointAction, write func() error) error {
	r.mu.Lock()
	bundle, id := r.bundle, r.id
	r.mu.Unlock()
	dir := r.t.TempDir()
	var fifos []*os.File
	for _, name := range []string{begunFIFO, answerFIFO} {
		path := filepath.Join(dir, name)
		if err := unix.Mkfifo(path, 0o600); err != nil {
			return err
		}
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		fifos = append(fifos, f)
	}
	begun, answer := fifos[0], fifos[1]
	done := make(chan error, 1)
	go func() {
		done <- process.NewRuntime(process.RuntimeConfig{Root: dir}, "test", bundle, id).Checkpoint(runc.WithExtraEnv(ctx, dumpEnv+"="+dir), opts, actions...)
		begun.Close()
	}()
	if _, err := begun.Read(make([]byte, 1)); err != nil {
		return <-done // it has not begun
	}
	err := write()
	result := []byte{dumped}
	if err != nil {
		result[0] = 0
	}
	_, werr := answer.Write(result)
	return cmp.Or(err, werr, <-done)
}

// Inventory is the smallest inventory.img: the magic number, a length, and
// img_version 2.
var Inventory = []byte{0x16, 0x31, 0x31, 0x58, 2, 0, 0, 0, 0x08, 0x02}

// trackedInventory also has dump_uptime, which CRIU sets if it tracks changes of memory.
var trackedInventory = []byte{0x16, 0x31, 0x31, 0x58, 4, 0, 0, 0, 0x08, 0x02, 0x40, 0x01}

// Restore runs the commands runc and criu of InstallCRIU.
func (r *Runtime) Restore(ctx context.Context, opts *runc.RestoreOpts) (pid int, err error) {
	err = r.call(ctx, Restore, "", func() error {
		r.mu.Lock()
		bundle, id := r.bundle, r.id
		r.mu.Unlock()
		dir, err := os.MkdirTemp(r.t.TempDir(), "restore")
		if err != nil {
			return err
		}
		fifo := filepath.Join(dir, "input")
		if err := unix.Mkfifo(fifo, 0o600); err != nil {
			return err
		}
		input, err := os.OpenFile(fifo, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		ctx := runc.WithExtraEnv(ctx, inputEnv+"="+fifo, groupEnv+"="+r.Group)
		pid, err = process.NewRuntime(process.RuntimeConfig{Root: dir}, "test", bundle, id).Restore(ctx, opts)
		if err != nil {
			input.Close()
			return err
		}
		p, err := os.FindProcess(pid)
		if err != nil {
			return err
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		r.init, r.started = &child{process: p, input: input}, true
		return nil
	})
	if err != nil {
		return 0, err
	}
	return pid, nil
}

func (r *Runtime) FreezerGroup() string { return "" }

func (r *Runtime) Version(context.Context) (name, version string) { return "fake", "1.0" }

// child is a process that ends when its input does. The test's reaper waits for it.
type child struct {
	process *os.Process // by its pidfd, so a signal goes to no other
	input   *os.File
}

func (c *child) alive() bool { return c.process.Signal(syscall.Signal(0)) == nil }

func (r *Runtime) spawn(io runc.IO, name string, args ...string) (*child, error) {
	in, input, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer in.Close()
	cmd := exec.Command(name, args...)
	if io != nil {
		io.Set(cmd)
	}
	cmd.Stdin = in
	if r.Group != "" {
		// What is done to the container's network must not be done to the host's.
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	}
	if err := cmd.Start(); err != nil {
		input.Close()
		return nil, err
	}
	if c, ok := io.(runc.StartCloser); ok {
		_ = c.CloseAfterStart()
	}
	if err := joinGroup(r.Group, cmd.Process.Pid); err != nil {
		_ = cmd.Process.Kill()
		input.Close()
		return nil, err
	}
	return &child{process: cmd.Process, input: input}, nil
}

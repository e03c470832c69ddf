package stack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/typeurl/v2"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"

	"github.com/stasis-run/stasis/checkpoint/layout"
)

// A Container is a container of a Stack, and its task.
type Container struct {
	client.Container
	// Task is the last one that Start or Restore made, or nil.
	Task client.Task
	// Stdin is what the next task reads; it has none if it is nil.
	Stdin io.Reader
	// Stdout and Stderr have what all tasks of the container have written. With
	// a terminal, all is in Stdout.
	Stdout, Stderr *Output

	s    *Stack
	exit <-chan client.ExitStatus
}

// NewContainer makes a container of one of this package's images, or of any
// that is imported. Its cgroup is one of those that Stop looks after.
func (s *Stack) NewContainer(ctx context.Context, name, image string, opts ...oci.SpecOpts) *Container {
	s.tb.Helper()
	return s.NewContainerWith(ctx, name, image, nil, opts...)
}

// NewContainerWith is NewContainer with options for the container itself, such
// as client.WithRuntime; they come last, so they override what it sets.
func (s *Stack) NewContainerWith(ctx context.Context, name, image string, copts []client.NewContainerOpts, opts ...oci.SpecOpts) *Container {
	s.tb.Helper()
	img := s.Image(ctx, image)
	copts = append([]client.NewContainerOpts{
		client.WithImage(img),
		client.WithSnapshotter(s.opts.Snapshotter),
		client.WithNewSnapshot(name, img),
		client.WithNewSpec(append([]oci.SpecOpts{oci.WithImageConfig(img), oci.WithCgroup(s.CgroupPath(name))}, opts...)...),
		client.WithRuntime(s.Runtime(), s.RuncOptions("")),
	}, copts...)
	c, err := s.client.NewContainer(ctx, name, copts...)
	if err != nil {
		s.tb.Fatalf("new container %s: %v", name, err)
	}
	return s.Wrap(c)
}

// Wrap gives a container that was made by other means the methods of Container.
// If it has a task whose output nobody reads, Load attaches to it.
func (s *Stack) Wrap(c client.Container) *Container {
	return &Container{Container: c, s: s, Stdout: newOutput(s.tb), Stderr: newOutput(s.tb)}
}

// Args sets what a container runs.
func Args(args ...string) oci.SpecOpts { return oci.WithProcessArgs(args...) }

// CRIUConfig makes CRIU read the lines as its configuration file, by the
// annotation that runc and crun know. It is for the sake of options that
// upstream's shim does not pass on; Stasis does not need it.
func (s *Stack) CRIUConfig(lines ...string) oci.SpecOpts {
	path := s.path("criu.conf")
	if err := os.WriteFile(path, []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
		s.tb.Fatalf("%v", err)
	}
	return oci.WithAnnotations(map[string]string{"org.criu.config": path})
}

// Bundle returns the folder of the container's bundle.
func (c *Container) Bundle() string {
	return filepath.Join(c.s.StateDir(), "io.containerd.runtime.v2.task", c.s.Namespace, c.ID())
}

// IO returns what a new task of the container wants: FIFOs, read into Stdout
// and Stderr, or a terminal if the container's spec has one.
func (c *Container) IO(ctx context.Context) cio.Creator {
	opts := []cio.Opt{cio.WithFIFODir(c.s.path("fifo")), cio.WithStreams(c.Stdin, c.Stdout, c.Stderr)}
	if spec, err := c.Spec(ctx); err == nil && spec.Process.Terminal {
		opts = append(opts, cio.WithTerminal)
	}
	return cio.NewCreator(opts...)
}

// Create makes a task and waits for it in the background.
func (c *Container) Create(ctx context.Context, opts ...client.NewTaskOpts) error {
	task, err := c.NewTask(ctx, c.IO(ctx), opts...)
	if err != nil {
		return fmt.Errorf("create task: %w", err)
	}
	c.Task = task
	if c.exit, err = task.Wait(ctx); err != nil {
		return fmt.Errorf("wait for task: %w", err)
	}
	return nil
}

// StartErr creates and starts a task. If only starting fails, the task stays in
// c.Task, to be looked at.
func (c *Container) StartErr(ctx context.Context, opts ...client.NewTaskOpts) error {
	if err := c.Create(ctx, opts...); err != nil {
		return err
	}
	if err := c.Task.Start(ctx); err != nil {
		return fmt.Errorf("start task: %w", err)
	}
	return nil
}

// Start creates and starts a task.
func (c *Container) Start(ctx context.Context, opts ...client.NewTaskOpts) {
	c.s.tb.Helper()
	if err := c.StartErr(ctx, opts...); err != nil {
		c.s.tb.Fatalf("container %s: %v", c.ID(), err)
	}
}

// Load attaches to the running task: after a restart of containerd, or if
// someone else started it.
func (c *Container) Load(ctx context.Context) {
	c.s.tb.Helper()
	task, err := c.Container.Task(ctx, cio.NewAttach(cio.WithStreams(nil, c.Stdout, c.Stderr)))
	if err == nil {
		c.Task = task
		c.exit, err = task.Wait(ctx)
	}
	if err != nil {
		c.s.tb.Fatalf("container %s: load task: %v", c.ID(), err)
	}
}

// Wait waits for the task to end and returns its exit code.
func (c *Container) Wait(ctx context.Context) uint32 {
	c.s.tb.Helper()
	ctx, cancel := context.WithTimeout(ctx, WaitTimeout())
	defer cancel()
	select {
	case status := <-c.exit:
		if err := status.Error(); err != nil {
			c.s.tb.Fatalf("container %s: wait: %v", c.ID(), err)
		}
		return status.ExitCode()
	case <-ctx.Done():
		c.s.tb.Fatalf("container %s: wait: %v", c.ID(), ctx.Err())
	}
	return 0
}

// Kill sends a signal that ends the task, and returns its exit code.
func (c *Container) Kill(ctx context.Context, sig syscall.Signal) uint32 {
	c.s.tb.Helper()
	if err := c.Task.Kill(ctx, sig); err != nil {
		c.s.tb.Fatalf("container %s: kill: %v", c.ID(), err)
	}
	return c.Wait(ctx)
}

// DeleteTask deletes a task that has ended. All that it wrote is then in
// Stdout and Stderr.
func (c *Container) DeleteTask(ctx context.Context) {
	c.s.tb.Helper()
	if _, err := c.Task.Delete(ctx); err != nil {
		c.s.tb.Fatalf("container %s: delete task: %v", c.ID(), err)
	}
	c.Task = nil
}

// Delete deletes a container, and its task if that has ended.
func (c *Container) Delete(ctx context.Context) {
	c.s.tb.Helper()
	if c.Task != nil {
		c.DeleteTask(ctx)
	}
	if err := c.Container.Delete(ctx, client.WithSnapshotCleanup); err != nil {
		c.s.tb.Fatalf("container %s: delete: %v", c.ID(), err)
	}
}

// Status returns the task's state.
func (c *Container) Status(ctx context.Context) client.ProcessStatus {
	c.s.tb.Helper()
	status, err := c.Task.Status(ctx)
	if err != nil {
		c.s.tb.Fatalf("container %s: status: %v", c.ID(), err)
	}
	return status.Status
}

// Result is what a process has left.
type Result struct {
	Code           uint32
	Stdout, Stderr string
}

var execs atomic.Int64

// ExecErr runs a further process in the container, as its init is run, and
// waits for it. A process that fails is no error.
func (c *Container) ExecErr(ctx context.Context, args ...string) (Result, error) {
	spec, err := c.Spec(ctx)
	if err != nil {
		return Result{}, err
	}
	p := *spec.Process
	p.Args, p.Terminal = args, false
	return c.ExecProcess(ctx, &p)
}

// ExecProcess is ExecErr for a process that differs from init by more than its
// arguments.
func (c *Container) ExecProcess(ctx context.Context, p *specs.Process) (Result, error) {
	stdout, stderr := newOutput(c.s.tb), newOutput(c.s.tb)
	id := fmt.Sprintf("exec-%d", execs.Add(1))
	var streams uncut
	creator := cio.NewCreator(cio.WithFIFODir(c.s.path("fifo")), cio.WithStreams(nil, stdout, stderr))
	proc, err := c.Task.Exec(ctx, id, p, func(id string) (cio.IO, error) {
		var err error
		streams.IO, err = creator(id)
		return &streams, err
	})
	if err != nil {
		return Result{}, fmt.Errorf("exec: %w", err)
	}
	exit, err := proc.Wait(ctx)
	if err == nil {
		err = proc.Start(ctx)
	}
	if err != nil {
		proc.Delete(ctx)
		return Result{}, fmt.Errorf("exec: %w", err)
	}
	streams.started = true
	select {
	case status := <-exit:
		if err := status.Error(); err != nil {
			return Result{}, fmt.Errorf("exec: wait: %w", err)
		}
	case <-ctx.Done():
		return Result{}, fmt.Errorf("exec: wait: %w", ctx.Err())
	}
	// On a busy machine, the client may not have come to open its end of the
	// FIFOs yet, and Delete would have it not do so. But a child of the process
	// may hold the other end open, so this is as long as the shim waits.
	read := make(chan struct{})
	go func() {
		proc.IO().Wait()
		close(read)
	}()
	select {
	case <-read:
	case <-time.After(Patience(10 * time.Second)):
	}
	status, err := proc.Delete(ctx)
	if err != nil {
		return Result{}, fmt.Errorf("exec: delete: %w", err)
	}
	return Result{status.ExitCode(), stdout.String(), stderr.String()}, nil
}

// uncut are streams that are read to their end. The client's own Delete closes
// them first, and what was written but not yet read is lost.
type uncut struct {
	cio.IO
	// started says that there is a shim to open the other ends, and close them.
	started bool
}

// Cancel implements cio.IO.
func (u *uncut) Cancel() {
	if !u.started {
		u.IO.Cancel()
	}
}

// Exec is ExecErr for a process that must succeed; it returns what that wrote
// on stdout.
func (c *Container) Exec(ctx context.Context, args ...string) string {
	c.s.tb.Helper()
	r, err := c.ExecErr(ctx, args...)
	if err != nil {
		c.s.tb.Fatalf("container %s: %q: %v", c.ID(), args, err)
	} else if r.Code != 0 {
		c.s.tb.Fatalf("container %s: %q: exit code %d\n%s%s", c.ID(), args, r.Code, r.Stdout, r.Stderr)
	}
	return r.Stdout
}

// CheckpointErr dumps the task into a folder, which it makes, by the call that
// containerd's clients make. Options may be nil. With Exit, the task is deleted.
func (c *Container) CheckpointErr(ctx context.Context, dir string, opts *options.CheckpointOptions) error {
	if opts == nil {
		opts = &options.CheckpointOptions{}
	}
	opts.ImagePath = dir
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	any, err := typeurl.MarshalAnyToProto(opts)
	if err != nil {
		return err
	}
	_, err = c.s.client.TaskService().Checkpoint(ctx, &tasks.CheckpointTaskRequest{ContainerID: c.ID(), Options: any})
	// containerd 1.7 stores the container's spec when it is dumped, and fails then
	// if it has done so before.
	if again := errdefs.IsAlreadyExists(errgrpc.ToNative(err)) && c.s.opts.Version == "1.7"; err != nil && !again {
		return fmt.Errorf("checkpoint: %w", errgrpc.ToNative(err))
	}
	if !opts.Exit {
		return nil
	}
	c.Wait(ctx)
	if _, err := c.Task.Delete(ctx); err != nil {
		return fmt.Errorf("checkpoint: delete task: %w", err)
	}
	c.Task = nil
	return nil
}

// Checkpoint is CheckpointErr for one that must succeed. If it does not, the
// test's log has CRIU's.
func (c *Container) Checkpoint(ctx context.Context, dir string, opts *options.CheckpointOptions) {
	c.s.tb.Helper()
	if err := c.CheckpointErr(ctx, dir, opts); err != nil {
		c.s.tb.Fatalf("container %s: %v\n%s", c.ID(), err, c.CRIULog("dump", dir))
	}
}

// RestoreErr starts a task from a folder that Checkpoint wrote.
func (c *Container) RestoreErr(ctx context.Context, dir string) error {
	if err := c.StartErr(ctx, client.WithRestoreImagePath(dir)); err != nil {
		return fmt.Errorf("restore: %w", err)
	}
	return nil
}

// Restore is RestoreErr for one that must succeed. If it does not, the test's
// log has CRIU's.
func (c *Container) Restore(ctx context.Context, dir string) {
	c.s.tb.Helper()
	if err := c.RestoreErr(ctx, dir); err != nil {
		c.s.tb.Fatalf("container %s: %v\n%s", c.ID(), err, c.CRIULog("restore", dir))
	}
}

// CheckpointImage makes a checkpoint image of the running container as `ctr
// containers checkpoint --rw --image --task` does.
func (c *Container) CheckpointImage(ctx context.Context, ref string, opts *options.CheckpointOptions) client.Image {
	c.s.tb.Helper()
	img, err := c.checkpointImage(ctx, ref, opts)
	if err != nil {
		c.s.tb.Fatalf("container %s: checkpoint to %s: %v\n%s", c.ID(), ref, err, c.CRIULog("dump", ""))
	}
	return img
}

func (c *Container) checkpointImage(ctx context.Context, ref string, opts *options.CheckpointOptions) (client.Image, error) {
	if err := c.Task.Pause(ctx); err != nil {
		return nil, err
	}
	img, err := c.Container.Checkpoint(ctx, ref, withCheckpointOptions(opts),
		client.WithCheckpointRuntime, client.WithCheckpointImage, client.WithCheckpointRW, client.WithCheckpointTask)
	if opts.GetExit() && err == nil {
		return img, nil
	}
	return img, errors.Join(err, c.Task.Resume(ctx))
}

// withCheckpointOptions sets the options of the dump, which ctr leaves empty.
func withCheckpointOptions(opts *options.CheckpointOptions) client.CheckpointOpts {
	return func(_ context.Context, _ *client.Client, _ *containers.Container, _ *imagespec.Index, o *options.CheckpointOptions) error {
		if opts != nil {
			proto.Merge(o, opts)
		}
		return nil
	}
}

// RestoreImage makes a container of a checkpoint image and starts it, as `ctr
// containers restore --rw --live` does.
func (s *Stack) RestoreImage(ctx context.Context, name string, checkpoint client.Image) *Container {
	s.tb.Helper()
	rc, err := s.client.Restore(ctx, name, checkpoint,
		client.WithRestoreImage, client.WithRestoreSpec, client.WithRestoreRuntime, client.WithRestoreRW)
	if err != nil {
		s.tb.Fatalf("restore %s: %v", name, err)
	}
	c := s.Wrap(rc)
	if err := c.StartErr(ctx, client.WithTaskCheckpoint(checkpoint)); err != nil {
		s.tb.Fatalf("restore %s: %v\n%s", name, err, c.CRIULog("restore", ""))
	}
	return c
}

// CRIULog returns the end of what CRIU logged when it dumped into a folder, or
// restored from it ("dump" or "restore"), wherever the shim put that.
func (c *Container) CRIULog(kind, dir string) string {
	bundle := c.Bundle()
	for _, pattern := range []string{
		filepath.Join(dir, kind+".log"),
		filepath.Join(dir, layout.Partial, kind+".log"),
		filepath.Join(bundle, "criu-dump.log"),
		filepath.Join(bundle, "work", kind+".log"),
		filepath.Join(bundle, "*"+kind+".log"),
		filepath.Join(bundle, "*", "*"+kind+".log"),
		filepath.Join(bundle, "*", "*", kind+".log"),
		filepath.Join(c.s.path("root"), "io.containerd.runtime.v2.task", c.s.Namespace, c.ID(), "*", kind+".log"),
	} {
		files, _ := filepath.Glob(pattern)
		for _, f := range slices.Backward(files) {
			if b, err := os.ReadFile(f); err == nil {
				return f + ":\n" + tail(string(b), 40)
			}
		}
	}
	return "(no log of CRIU)"
}

// An Output collects what a process writes.
type Output struct {
	tb      TB
	mu      sync.Mutex
	buf     bytes.Buffer
	changed chan struct{} // closed and replaced at each write
}

func newOutput(tb TB) *Output { return &Output{tb: tb, changed: make(chan struct{})} }

// Write implements io.Writer.
func (o *Output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	close(o.changed)
	o.changed = make(chan struct{})
	return o.buf.Write(p)
}

// String returns all that was written so far.
func (o *Output) String() string {
	s, _ := o.get()
	return s
}

func (o *Output) get() (string, <-chan struct{}) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String(), o.changed
}

// Reset forgets what was written so far.
func (o *Output) Reset() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.buf.Reset()
}

// WaitFor waits until text has been written.
func (o *Output) WaitFor(ctx context.Context, text string) {
	o.tb.Helper()
	ctx, cancel := context.WithTimeout(ctx, WaitTimeout())
	defer cancel()
	for {
		s, changed := o.get()
		if strings.Contains(s, text) {
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			o.tb.Fatalf("waiting for %q to be written: %v; so far: %q", text, ctx.Err(), s)
		}
	}
}

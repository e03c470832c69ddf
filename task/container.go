package task

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/stasis-run/stasis/process"
)

// container is one container: its init, its execs, and what they share. Fields
// above mu do not change once the container is created.
type container struct {
	service    *Service
	id         string
	namespace  string
	bundle     bundle
	options    *options.Options
	config     *config
	specDigest string
	nodeConfig string // path of the node's configuration, or "" for the default
	request    restoreRequest
	runtime    process.Runtime
	plan       *RestorePlan // by which init comes back; nil: it is created, and starts cold
	init       *proc
	rootfs     []mount.Mount // as containerd wants it mounted

	// ops queues the calls that change the container: everyone for all of
	// it, but for starts of execs, which may run side by side. A hanging exec
	// must not keep another from starting, nor the container from being
	// killed; but nothing starts in the middle of a dump.
	ops *semaphore.Weighted
	// tracked is what a checkpoint can build on. It belongs to whoever holds all of ops.
	tracked tracked

	// running counts the execs that are started or about to be.
	running sync.WaitGroup
	// alive ends when init dies, and with it the starts of execs that hang.
	alive context.Context
	died  context.CancelFunc

	mu         sync.Mutex
	execs      map[string]*proc
	stopping   bool               // init has died; no exec starts any more
	cgroup     *process.Cgroup    // nil until there is a process
	stopOOM    func()             // nil if OOM is not watched
	abortStart context.CancelFunc // ends the start of init that is under way
	deleting   bool               // a Delete has begun, and may have failed
	deleted    bool
}

const allOps = 1 << 20

// exclusive waits until no other call changes the container. Call release to
// end the exclusion. The returned context is for what is done meanwhile: it
// keeps the request's deadline, and outlives its connection, because a
// containerd that restarts must not have a runtime call cut short.
func (c *container) exclusive(ctx context.Context) (_ context.Context, release func(), _ error) {
	return c.acquire(ctx, allOps)
}

// shared is exclusive for calls that may run side by side.
func (c *container) shared(ctx context.Context) (_ context.Context, release func(), _ error) {
	return c.acquire(ctx, 1)
}

func (c *container) acquire(ctx context.Context, n int64) (context.Context, func(), error) {
	if err := c.ops.Acquire(ctx, n); err != nil {
		return nil, nil, fmt.Errorf("container %s is busy with another call: %w", c.id, err)
	}
	ctx, cancel := detach(ctx)
	return ctx, func() {
		cancel()
		c.ops.Release(n)
	}, nil
}

// detach returns a context with ctx's deadline and values, that does not end
// with it otherwise.
func detach(ctx context.Context) (context.Context, context.CancelFunc) {
	deadline, ok := ctx.Deadline()
	ctx = context.WithoutCancel(ctx)
	if !ok {
		return ctx, func() {}
	}
	return context.WithDeadline(ctx, deadline)
}

// dyingTimeout is how long the runtime may go on starting a process once init
// has died; a sound one takes milliseconds.
const dyingTimeout = 2 * time.Second

// whileAlive returns a context for starting a process: a runtime that hangs must
// not outlive init, whose exit waits for it. Call cancel when done.
func (c *container) whileAlive(ctx context.Context) (_ context.Context, cancel context.CancelFunc) {
	ctx, end := context.WithCancel(ctx)
	stop := context.AfterFunc(c.alive, func() {
		select {
		case <-time.After(dyingTimeout):
			end()
		case <-ctx.Done():
		}
	})
	return ctx, func() {
		stop()
		end()
	}
}

// mountRootfs mounts what containerd wants as the container's root.
func (c *container) mountRootfs() error {
	if len(c.rootfs) == 0 {
		return nil
	}
	if err := os.Mkdir(c.bundle.rootfs(), 0o711); err != nil && !os.IsExist(err) {
		return err
	}
	if err := mount.All(c.rootfs, c.bundle.rootfs()); err != nil {
		return fmt.Errorf("mount the rootfs of container %s: %w", c.id, err)
	}
	return nil
}

// watch loads the cgroup of a container whose init there is now, and has its OOM
// kills published. It serves a cold start and a restore alike.
func (c *container) watch(init *process.Child) {
	logger := log.L.WithField("container", c.id)
	cg, err := process.LoadCgroup(init.Pid, c.config.cgroupsPath())
	if err != nil {
		// init may be gone already.
		logger.WithError(err).Warn("no stats and OOM events")
		return
	}
	cg.FreezeIn(c.runtime.FreezerGroup())
	if err := cg.EnableControllers(); err != nil {
		logger.WithError(err).Debug("enable the cgroup's controllers")
	}
	stop, err := cg.WatchOOM(func() {
		c.service.publish(&events.TaskOOM{ContainerID: c.id})
	})
	if err != nil {
		logger.WithError(err).Warn("no OOM events")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cgroup, c.stopOOM = cg, stop
}

func (c *container) unwatch() {
	c.mu.Lock()
	stop := c.stopOOM
	c.stopOOM = nil
	c.mu.Unlock()
	if stop != nil {
		stop()
	}
}

// initDied lets no further exec start, and ends the starts under way.
func (c *container) initDied() {
	c.mu.Lock()
	c.stopping = true
	c.mu.Unlock()
	c.died()
}

// endExecs kills what init has left, if its death did not, and waits until all
// execs' exits are published.
func (c *container) endExecs() {
	if c.config.sharesPIDs() {
		if err := c.runtime.Kill(context.Background(), unix.SIGKILL, true); err != nil {
			log.L.WithError(err).WithField("container", c.id).Debug("kill what init left")
		}
	}
	c.running.Wait()
}

// find returns a process by its exec ID, init by none.
func (c *container) find(execID string) (*proc, error) {
	if execID == "" {
		return c.init, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.execs[execID]
	if p == nil {
		return nil, fmt.Errorf("process %s does not exist in container %s: %w", execID, c.id, errdefs.ErrNotFound)
	}
	return p, nil
}

// errKilled is why a start ends that Kill aborted.
var errKilled = errors.New("killed before it was started")

// start starts init: it lets the created one run, or restores it.
func (c *container) start(ctx context.Context) (int, error) {
	ctx, release, err := c.exclusive(ctx)
	if err != nil {
		return 0, err
	}
	defer release()
	p := c.init
	p.starting.Lock()
	defer p.starting.Unlock()
	aborted, abort := context.WithCancelCause(ctx)
	defer abort(nil)
	ctx, cancel := c.whileAlive(aborted)
	defer cancel()
	c.mu.Lock()
	err = p.check(opStart)
	if err == nil && c.stopping {
		// It died before it was started; its exit is being recorded.
		err = Stopped.check(opStart, p.kind(), p.id())
	}
	if err == nil {
		c.abortStart = func() { abort(errKilled) }
	}
	c.mu.Unlock()
	if err != nil {
		return 0, err
	}
	if c.plan == nil {
		err = c.runtime.Start(ctx)
	} else {
		err = c.restore(ctx, c.plan)
	}
	err = c.oneLine(err)
	c.mu.Lock()
	c.abortStart = nil
	if err == nil {
		p.state = Running
	}
	pid, child := p.pid(), p.child
	c.mu.Unlock()
	if err != nil {
		return 0, err
	}
	c.service.publish(&events.TaskStart{ContainerID: c.id, Pid: uint32(pid)})
	if context.Cause(aborted) == errKilled {
		// It came too late to stop the restore, and before there was a
		// process to signal.
		_ = child.Signal(unix.SIGKILL)
	}
	return pid, nil
}

// delete removes a container that is not running from the runtime, with all it
// holds.
func (c *container) delete(ctx context.Context) (process.Exit, error) {
	ctx, release, err := c.exclusive(ctx)
	if err != nil {
		return process.Exit{}, err
	}
	defer release()
	p := c.init
	c.mu.Lock()
	err = p.check(opDelete)
	if c.deleted {
		// By a call that was faster. The ID may be another container's by now.
		err = fmt.Errorf("container %s is deleted: %w", c.id, errdefs.ErrNotFound)
	}
	c.deleting = c.deleting || err == nil
	child := p.child
	c.mu.Unlock()
	if err != nil {
		return process.Exit{}, err
	}
	if err := c.runtime.Delete(ctx); err != nil {
		return process.Exit{}, fmt.Errorf("delete container %s: %w", c.id, err)
	}
	if child != nil {
		select {
		case <-p.exited:
		case <-ctx.Done():
			return process.Exit{}, fmt.Errorf("wait for container %s to end: %w", c.id, ctx.Err())
		}
	}
	c.mu.Lock()
	procs := []*proc{p}
	for _, e := range c.execs {
		procs = append(procs, e)
	}
	for _, p := range procs {
		// A restore or an exec that was never started.
		if p.state != Stopped {
			p.abandon(process.Exit{})
		}
	}
	c.mu.Unlock()
	for _, p := range procs {
		p.release(ctx)
	}
	if err := c.bundle.unmount(); err != nil {
		return process.Exit{}, fmt.Errorf("unmount the rootfs of container %s: %w", c.id, err)
	}
	if c.plan != nil {
		c.plan.Close()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.deleted = true
	return p.exit, nil
}

func (c *container) isDeleting() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.deleting
}

// release passes on the last output and closes the process's streams.
func (p *proc) release(ctx context.Context) {
	p.c.mu.Lock()
	pio := p.io
	p.c.mu.Unlock()
	if pio == nil {
		return
	}
	if err := pio.Drain(ctx); err != nil {
		log.G(ctx).WithError(err).WithField("process", p.id()).Warn("output may be incomplete")
	}
	pio.Close()
}

// pause freezes the container.
func (c *container) pause(ctx context.Context) error {
	ctx, release, err := c.exclusive(ctx)
	if err != nil {
		return err
	}
	defer release()
	if err := c.move(opPause, Pausing); err != nil {
		return err
	}
	c.waitExec(ctx)
	if err := c.runtime.Pause(ctx); err != nil {
		// Cut short, it may have frozen it all the same.
		if frozen, ferr := c.isFrozen(); ferr == nil && frozen {
			if terr := c.thaw(ctx); terr != nil {
				err = errors.Join(err, terr)
			}
		}
		c.settle(Pausing, Running, nil)
		return fmt.Errorf("pause container %s: %w", c.id, err)
	}
	c.settle(Pausing, Paused, &events.TaskPaused{ContainerID: c.id})
	return nil
}

// resume thaws the container. It takes no more than a write to its cgroup, and
// whoever talks to the container waits for it: starting the runtime takes longer.
func (c *container) resume(ctx context.Context) error {
	ctx, release, err := c.exclusive(ctx)
	if err != nil {
		return err
	}
	defer release()
	if err := c.move(opResume, Paused); err != nil {
		return err
	}
	if err := c.thaw(ctx); err != nil {
		return fmt.Errorf("resume container %s: %w", c.id, err)
	}
	c.settle(Paused, Running, &events.TaskResumed{ContainerID: c.id})
	return nil
}

// move puts init in state to, if its state allows o.
func (c *container) move(o op, to State) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.init.check(o); err != nil {
		return err
	}
	c.init.state = to
	return nil
}

// settle moves init from one state to another and publishes that, unless init
// has died meanwhile: its exit is the last that is heard of it.
func (c *container) settle(from, to State, event any) {
	c.init.starting.Lock()
	defer c.init.starting.Unlock()
	c.mu.Lock()
	ok := c.init.state == from
	if ok {
		c.init.state = to
	}
	c.mu.Unlock()
	if ok && event != nil {
		c.service.publish(event)
	}
}

// update changes the resource limits.
func (c *container) update(ctx context.Context, resources *specs.LinuxResources) error {
	ctx, release, err := c.exclusive(ctx)
	if err != nil {
		return err
	}
	defer release()
	c.mu.Lock()
	err = c.init.check(opUpdate)
	c.mu.Unlock()
	if err != nil {
		return err
	}
	if err := c.runtime.Update(ctx, resources); err != nil {
		return fmt.Errorf("update container %s: %w", c.id, err)
	}
	return nil
}

// isFrozen asks the kernel.
func (c *container) isFrozen() (bool, error) {
	cg := c.loadedCgroup()
	if cg == nil {
		return false, errdefs.ErrNotFound
	}
	return cg.Frozen()
}

// thaw leaves it to the runtime where the cgroup could not be loaded: the runtime
// may have found it, and the container must not stay frozen.
func (c *container) thaw(ctx context.Context) error {
	cg := c.loadedCgroup()
	if cg == nil {
		return c.runtime.Resume(ctx)
	}
	return cg.Thaw()
}

// loadedCgroup is nil before init runs, and where it could not be loaded.
func (c *container) loadedCgroup() *process.Cgroup {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.cgroup
}

// stateOf answers a State call.
func (c *container) stateOf(p *proc) *taskapi.StateResponse {
	c.mu.Lock()
	defer c.mu.Unlock()
	state, exited := p.state, timestamppb.New(p.exit.At)
	if p != c.init && state == Running && (c.init.state == Pausing || c.init.state == Paused) {
		state = c.init.state // a frozen container's execs are frozen too
	}
	return &taskapi.StateResponse{
		ID:         p.id(),
		Bundle:     string(c.bundle),
		Pid:        uint32(p.pid()),
		Status:     state.status(),
		Stdin:      p.stdio.Stdin,
		Stdout:     p.stdio.Stdout,
		Stderr:     p.stdio.Stderr,
		Terminal:   p.stdio.Terminal,
		ExitStatus: uint32(p.exit.Status),
		ExitedAt:   exited,
	}
}

package process

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"sync"
	"time"

	runc "github.com/containerd/go-runc"
	"golang.org/x/sys/unix"
)

// Exit is how a process ended.
type Exit struct {
	Pid    int
	Status int // exit code, or 128 + signal number
	At     time.Time
}

// Child is one process that the shim is the parent of. Its identity is the
// pointer, never the pid: the kernel may give the pid to another process as
// soon as this one is reaped.
type Child struct {
	Pid int

	reaper *Reaper
	done   chan struct{} // closed by the reaper, after exit is written
	exit   Exit
}

// Done is closed once the process has exited and was reaped.
func (c *Child) Done() <-chan struct{} { return c.done }

// Exit tells how the process ended. It may be called once Done is closed.
func (c *Child) Exit() Exit {
	<-c.done
	return c.exit
}

// Exited tells whether the process has exited, even if its SIGCHLD is still on
// its way.
func (c *Child) Exited() bool {
	c.reaper.reap()
	select {
	case <-c.done:
		return true
	default:
		return false
	}
}

// Signal sends sig to the process, and to no other: a pid cannot be given to
// another process before the reaper has collected it, and the reaper is held
// still meanwhile. It returns unix.ESRCH if the process has exited.
func (c *Child) Signal(sig unix.Signal) error {
	c.reaper.mu.Lock()
	defer c.reaper.mu.Unlock()
	select {
	case <-c.done:
		return unix.ESRCH
	default:
		return unix.Kill(c.Pid, sig)
	}
}

// Reaper is the only caller of wait4 in the shim. It collects every child, the
// adopted ones included (the shim is a child subreaper: a container's init
// becomes its child when the runtime that created it exits), and hands each
// exit to the Child it belongs to.
type Reaper struct {
	mu       sync.Mutex
	children map[int]*Child
	windows  map[*window]struct{}
}

// window keeps the exits of processes that nobody has claimed yet, for the
// time of one Launch.
type window struct {
	exits map[int]Exit
}

// NewReaper returns a reaper that collects children from now on, for as long
// as the process lives.
func NewReaper() *Reaper {
	r := &Reaper{children: map[int]*Child{}, windows: map[*window]struct{}{}}
	// One slot is enough: a signal that finds it full is followed by a reap
	// that sees its child too.
	sigchld := make(chan os.Signal, 1)
	signal.Notify(sigchld, unix.SIGCHLD)
	go func() {
		for range sigchld {
			r.reap()
		}
	}()
	return r
}

func (r *Reaper) reap() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, unix.WNOHANG, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil || pid <= 0 {
			return
		}
		exit := Exit{Pid: pid, Status: status.ExitStatus(), At: time.Now()}
		if status.Signaled() {
			exit.Status = 128 + int(status.Signal())
		}
		if child := r.children[pid]; child != nil {
			delete(r.children, pid)
			child.finish(exit)
			continue
		}
		for w := range r.windows {
			w.exits[pid] = exit
		}
	}
}

func (c *Child) finish(exit Exit) {
	c.exit = exit
	close(c.done)
}

// Launch runs fn, which has the OCI runtime start a process and returns its
// pid, and claims that process. An exit before the claim is neither lost nor
// given to another: while fn runs, unclaimed exits are kept; and a pid that is
// still a child of the shim is a live process, whatever an exit kept under the
// same number says of a former one.
func (r *Reaper) Launch(fn func() (pid int, err error)) (*Child, error) {
	w := &window{exits: map[int]Exit{}}
	r.mu.Lock()
	r.windows[w] = struct{}{}
	r.mu.Unlock()
	defer func() {
		r.mu.Lock()
		delete(r.windows, w)
		r.mu.Unlock()
	}()

	pid, err := fn()
	if err != nil {
		return nil, err
	}

	r.mu.Lock()
	defer r.mu.Unlock()
	// WNOWAIT leaves a zombie to reap, which then finds the Child.
	err = unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
	if err == nil {
		return r.register(pid), nil
	}
	if exit, ok := w.exits[pid]; ok {
		child := &Child{Pid: pid, reaper: r, done: make(chan struct{})}
		child.finish(exit)
		return child, nil
	}
	return nil, fmt.Errorf("the runtime started process %d, which is not a child of this shim: %w", pid, err)
}

// register makes pid a Child. mu is held, and the process is a child that was
// not reaped yet.
func (r *Reaper) register(pid int) *Child {
	child := &Child{Pid: pid, reaper: r, done: make(chan struct{})}
	r.children[pid] = child
	return child
}

// Command starts cmd and returns it as a Child. The caller calls cmd.Wait after
// Done, which ends cmd's copying goroutines; the error it returns means
// nothing, the exit being the reaper's.
//
// A command that leads a process group and whose context ends is killed with
// its whole group.
func (r *Reaper) Command(cmd *exec.Cmd) (*Child, error) {
	if cmd.Cancel != nil && cmd.SysProcAttr != nil && cmd.SysProcAttr.Setpgid {
		cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	}
	// Held across the start, so that the exit cannot be reaped before the
	// child is registered.
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return r.register(cmd.Process.Pid), nil
}

// stuckInterval is how often a command that leads a group is looked at.
const stuckInterval = 500 * time.Millisecond

// seeThrough waits for a command to exit. If it leads a process group and fails,
// the rest of the group is gone on return: what CRIU has called, such as
// iptables, must not end later than CRIU. And if CRIU is killed, the command is
// too: children of CRIU's, which wait for it forever, may hold the connection on
// which the runtime waits for its answer.
func (r *Reaper) seeThrough(cmd *exec.Cmd, child *Child) Exit {
	if cmd.SysProcAttr == nil || !cmd.SysProcAttr.Setpgid {
		return child.Exit()
	}
	look := time.NewTicker(stuckInterval)
	defer look.Stop()
	for stuck := false; ; {
		select {
		case <-look.C:
			was := stuck
			if stuck = isStuck(child.Pid); stuck && was {
				r.killGroup(child)
			}
			continue
		case <-child.Done():
		}
		exit := child.Exit()
		if exit.Status != 0 {
			_ = retry(func() error {
				if n := r.killOrphans(child.Pid); n > 0 {
					return fmt.Errorf("%d processes are left", n)
				}
				return nil
			})
		}
		return exit
	}
}

// killGroup kills the group that child leads, unless it has exited.
func (r *Reaper) killGroup(child *Child) {
	r.mu.Lock()
	defer r.mu.Unlock()
	select {
	case <-child.done:
	default:
		_ = unix.Kill(-child.Pid, unix.SIGKILL)
	}
}

// killOrphans kills the processes of a group that have become children of this
// one, because their parents have died, and returns their number.
func (r *Reaper) killOrphans(group int) (n int) {
	// Nothing is reaped meanwhile, so their pids stay theirs.
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, pid := range childrenOf(os.Getpid()) {
		if g, err := unix.Getpgid(pid); err == nil && g == group {
			_ = unix.Kill(pid, unix.SIGKILL)
			n++
		}
	}
	return n
}

// isStuck tells whether the first child of a runtime, which is CRIU, was killed and
// is not waited for: the runtime waits for CRIU's answer first. If CRIU has exited
// by itself, it has answered, and the runtime may only be waiting for a CPU. The
// command itself may be the runtime or something that has started it.
func isStuck(pid int) bool {
	var first *procStat
	for _, child := range childrenOf(pid) {
		if st := statOf(child); st != nil && (first == nil || st.started < first.started) {
			first = st
		}
	}
	switch {
	case first == nil:
		return false
	case first.state == 'Z':
		return first.killed
	}
	return !isCRIU(first.pid) && isStuck(first.pid)
}

// isCRIU tells whether a process is CRIU, by the arguments with which runtimes
// start it and those that it gives itself.
func isCRIU(pid int) bool {
	args, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return bytes.Contains(args, []byte("\x00swrk\x00")) || bytes.Contains(args, []byte("criu: "))
}

// The rest makes Reaper go-runc's process monitor, so that it collects the
// runtime's own processes too.
var _ runc.ProcessMonitor = (*Reaper)(nil)

// Start implements runc.ProcessMonitor.
func (r *Reaper) Start(cmd *exec.Cmd) (chan runc.Exit, error) {
	child, err := r.Command(cmd)
	if err != nil {
		return nil, err
	}
	exits := make(chan runc.Exit, 1)
	go func() {
		exit := r.seeThrough(cmd, child)
		exits <- runc.Exit{Pid: exit.Pid, Status: exit.Status, Timestamp: exit.At}
	}()
	return exits, nil
}

// StartLocked implements runc.ProcessMonitor. It keeps the starting thread for
// as long as the command lives: the kernel sends a parent-death signal when the
// thread that forked is gone, not the process.
func (r *Reaper) StartLocked(cmd *exec.Cmd) (chan runc.Exit, error) {
	started := make(chan error, 1)
	exits := make(chan runc.Exit, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		child, err := r.Command(cmd)
		started <- err
		if err != nil {
			return
		}
		exit := r.seeThrough(cmd, child)
		exits <- runc.Exit{Pid: exit.Pid, Status: exit.Status, Timestamp: exit.At}
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	return exits, nil
}

// Wait implements runc.ProcessMonitor.
func (r *Reaper) Wait(cmd *exec.Cmd, exits chan runc.Exit) (int, error) {
	exit := <-exits
	// The exit was collected already; what is left for Wait is to end the
	// goroutines that copy the command's output.
	if err := cmd.Wait(); err != nil && !errors.Is(err, unix.ECHILD) {
		var exitErr *exec.ExitError
		if !errors.As(err, &exitErr) {
			return exit.Status, err
		}
	}
	return exit.Status, nil
}

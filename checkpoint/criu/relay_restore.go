package criu

import (
	"context"
	"errors"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/process"
)

// restoreRelay is the relay of one restore. When all is restored, and each thread stands
// at the end of its last system call, held by CRIU's ptrace, CRIU says pre-resume and
// waits for an answer. That is when the processes can be looked at: no instruction of the
// container has run, and no signal can make one run, as it could with processes that are
// merely stopped (a timer whose signal is SIGCONT would do).
//
// The result is kept for verdict. Only CRIU waits while the processes are looked at.
type restoreRelay struct {
	*relay
	check    func(ctx context.Context, pids []int) error
	cgroup   string             // linux.cgroupsPath
	loopback bool               // whether the network namespace is the container's own
	ctx      context.Context    // of the restore
	stop     context.CancelFunc // ends the runtime, and CRIU with it

	mu        sync.Mutex
	init      int // once all processes are made; CRIU's end could let them run from then on
	criu      int // that one's
	cancelled bool
	passed    bool  // the check has passed, and the processes may run
	refused   error // why they may not
}

// newRelay returns a relay, and the environment with which the runtime is to be
// called, with a context that ends by stop only.
func (r *RestoreRequest) newRelay(ctx context.Context, stop context.CancelFunc) (_ *restoreRelay, env []string, err error) {
	l := &restoreRelay{check: r.Check, ctx: ctx, stop: stop}
	_, l.loopback = networkNamespace(r.Spec)
	if r.Spec.Linux != nil {
		l.cgroup = r.Spec.Linux.CgroupsPath
	}
	l.relay, env, err = newRelay(r.Bundle, r.Self, l)
	return l, env, err
}

func (l *restoreRelay) heard(m criuMessage, criu int) error {
	switch m.script {
	case "setup-namespaces":
		// Before there are sockets in it, and before the runtime calls the hooks.
		if l.loopback {
			if err := bringLoopbackUp(m.pid); err != nil {
				return l.fail(err)
			}
		}
	case "post-restore":
		// The last at which CRIU takes a failure for one.
		return l.made(m.pid, criu)
	case "pre-resume":
		l.restored(criu)
	}
	return nil
}

// made is called when all processes are there, with the pids of the first and of CRIU,
// which is still at work in them.
func (l *restoreRelay) made(init, criu int) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cancelled {
		return context.Cause(l.ctx)
	}
	l.init, l.criu = init, criu
	return nil
}

// restored is called while CRIU holds the processes and waits.
func (l *restoreRelay) restored(criu int) {
	l.mu.Lock()
	init := l.init
	l.mu.Unlock()
	pids := process.Tree(init)
	err := context.Cause(l.ctx)
	if err == nil {
		err = process.AllTraced(pids, criu)
	}
	// Should CRIU be killed now, or this shim, nothing runs all the same.
	defer process.FreezeCgroup(init, l.cgroup)()
	if err == nil {
		err = l.check(l.ctx, pids)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err == nil {
		err = context.Cause(l.ctx)
	}
	if err != nil {
		l.refused = err
		kill(pids)
		// It would wait for init, init for its children, and they for their tracer.
		kill([]int{criu})
		return
	}
	l.passed = true
}

func (l *restoreRelay) ended(criu int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.criu == criu && !l.passed {
		kill(process.Tree(l.init))
	}
}

// cancel ends the restore. CRIU's end would set processes free that it holds, so
// they have to be killed first.
func (l *restoreRelay) cancel() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cancelled = true
	if l.init != 0 && !l.passed {
		kill(process.Tree(l.init))
	}
	l.stop()
}

// verdict is what the restore has come to, of which the runtime has returned init
// and err.
func (l *restoreRelay) verdict(init int, err error) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.refused != nil:
		err = &refusal{l.refused}
	case err != nil:
	case l.cancelled:
		err = context.Cause(l.ctx)
	case !l.passed || l.init != init:
		kill(process.Tree(init))
		err = errors.New("CRIU has not told when the processes were restored")
	}
	if err != nil {
		return 0, err
	}
	return init, nil
}

// kill ends processes that have not run, of which none can make another, or CRIU.
func kill(pids []int) {
	for _, pid := range pids {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
}

package main

import (
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	mrand "math/rand/v2"
	"os"
	"runtime"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// attributes are what a process is told about itself.
func attributes(p *probe) (func() error, error) {
	cwd := p.dir + "/cwd"
	var core unix.Rlimit
	err := all(
		func() error { return os.MkdirAll(cwd, 0o755) },
		func() error { return os.Chdir(cwd) },
		func() error { return unix.Setpriority(unix.PRIO_PROCESS, os.Getpid(), 3) },
		func() error { return unix.Getrlimit(unix.RLIMIT_CORE, &core) },
		func() error {
			return unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{Cur: min(4096, core.Max), Max: core.Max})
		},
		func() error { return os.Setenv("PROBE", "set at run time") },
	)
	if err != nil {
		return nil, err
	}
	unix.Umask(0o027)
	before, err := attributesNow()
	return func() error {
		now, err := attributesNow()
		if err != nil {
			return err
		}
		for i := range before {
			if now[i] != before[i] {
				return fmt.Errorf("got %q, want %q", now[i], before[i])
			}
		}
		return nil
	}, err
}

func attributesNow() ([]string, error) {
	cwd, err := os.Getwd()
	if err != nil {
		return nil, err
	}
	hostname, err := os.Hostname()
	if err != nil {
		return nil, err
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return nil, err
	}
	limits, err := os.ReadFile("/proc/self/limits")
	if err != nil {
		return nil, err
	}
	nice, err := unix.Getpriority(unix.PRIO_PROCESS, os.Getpid())
	if err != nil {
		return nil, err
	}
	executable, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return nil, err
	}
	all := append(os.Environ(), os.Args...)
	all = append(all, strings.Split(string(limits), "\n")...)
	for line := range strings.Lines(string(status)) {
		switch name, _, _ := strings.Cut(line, ":"); name {
		case "Umask", "Tgid", "PPid", "Uid", "Gid", "Groups", "NoNewPrivs",
			"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "Seccomp", "SigIgn", "SigCgt":
			all = append(all, line)
		}
	}
	return append(all, ids(), cwd, hostname, fmt.Sprint("nice ", nice), executable), nil
}

// heap is memory that does not compress. Each check writes to the next hundredth of it: a
// kernel with huge pages notes changes of these.
func heap(p *probe) (func() error, error) {
	mem, err := randomBytes(p.mib << 20)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(mem)
	n := 0
	return func() error {
		if err := equal("sha256", sha256.Sum256(mem), sum); err != nil {
			return err
		}
		part := len(mem) / 100
		for i := 0; i < part; i += os.Getpagesize() {
			mem[n%100*part+i]++
		}
		n++
		sum = sha256.Sum256(mem)
		return nil
	}, nil
}

// randomBytes are outside of what Go's collector knows.
func randomBytes(size int) ([]byte, error) {
	mem, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, err
	}
	var seed [32]byte
	rand.Read(seed[:])
	mrand.NewChaCha8(seed).Read(mem)
	return mem, nil
}

// threads are some with names of their own.
func threads(*probe) (func() error, error) {
	type thread struct {
		name string
		tid  int
	}
	var started []thread
	ask := map[string]chan chan thread{}
	for i := range 3 {
		name := fmt.Sprintf("probe-%d", i)
		requests, ready := make(chan chan thread), make(chan error)
		ask[name] = requests
		go func() {
			runtime.LockOSThread()
			b, _ := unix.BytePtrFromString(name)
			ready <- unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(b)), 0, 0, 0)
			for r := range requests {
				var buf [16]byte
				unix.Prctl(unix.PR_GET_NAME, uintptr(unsafe.Pointer(&buf[0])), 0, 0, 0)
				r <- thread{unix.ByteSliceToString(buf[:]), unix.Gettid()}
			}
		}()
		if err := <-ready; err != nil {
			return nil, err
		}
		r := make(chan thread)
		requests <- r
		started = append(started, <-r)
	}
	return func() error {
		for i, t := range started {
			r := make(chan thread)
			ask[fmt.Sprintf("probe-%d", i)] <- r
			if err := equal("thread", <-r, t); err != nil {
				return err
			}
		}
		return nil
	}, nil
}

// counter is that the program goes on by itself.
func counter(p *probe) (func() error, error) {
	return func() error {
		before := p.counter.Load()
		for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
			if p.counter.Load() > before {
				return nil
			}
		}
		return fmt.Errorf("stands still at %d", before)
	}, nil
}

// tree is a child in a session of its own, and a grandchild.
func tree(*probe) (func() error, error) {
	child, err := startAgent(&syscall.SysProcAttr{Setsid: true})
	if err != nil {
		return nil, err
	}
	if err := child.expect("ok", "spawn"); err != nil {
		return nil, err
	}
	childIDs, err := child.ask("ids")
	if err != nil {
		return nil, err
	}
	grandchildIDs, err := child.ask("child ids")
	return func() error {
		return errors.Join(child.expect(childIDs, "ids"), child.expect(grandchildIDs, "child ids"))
	}, err
}

// zombie is a child that nobody has waited for.
func zombie(*probe) (func() error, error) {
	// It does not get a standard output to write to, and fails.
	pid, err := syscall.ForkExec("/proc/self/exe", []string{"probe", "nothing"}, &syscall.ProcAttr{})
	if err != nil {
		return nil, err
	}
	check := func() error {
		// struct siginfo: the status is the seventh int.
		var info [32]int32
		err := unix.Waitid(unix.P_PID, pid, (*unix.Siginfo)(unsafe.Pointer(&info)), unix.WEXITED|unix.WNOWAIT, nil)
		if err != nil {
			return err
		}
		return equal("exit code", info[6], 2)
	}
	return check, check()
}

// stopped is a child that was sent SIGSTOP.
func stopped(*probe) (func() error, error) {
	a, err := startAgent(nil)
	if err != nil {
		return nil, err
	}
	stop := func() error {
		if err := unix.Kill(a.pid, unix.SIGSTOP); err != nil {
			return err
		}
		return waitState(a.pid, 'T')
	}
	return func() error {
		return all(
			func() error { return waitState(a.pid, 'T') },
			func() error { return unix.Kill(a.pid, unix.SIGCONT) },
			func() error { _, err := a.ask("ids"); return err },
			stop,
		)
	}, stop()
}

// waitState waits a moment for a process to be in the state.
func waitState(pid int, want byte) error {
	var state byte
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return err
		}
		if state = b[strings.LastIndexByte(string(b), ')')+2]; state == want {
			return nil
		}
	}
	return fmt.Errorf("state %c, want %c", state, want)
}

// queued is a signal that carries a value, and of which several may be pending.
const queued = syscall.Signal(40)

// signals are some that are blocked and pending: for a process, with values,
// and for a single thread.
func signals(*probe) (func() error, error) {
	var a *agent
	err := blocked(queued, func() (err error) {
		a, err = startAgent(nil)
		return err
	})
	if err != nil {
		return nil, err
	}
	send := func() error {
		for value := range 3 {
			if err := queue(a.pid, queued, value); err != nil {
				return err
			}
		}
		return nil
	}
	if err := send(); err != nil {
		return nil, err
	}

	requests, results := make(chan struct{}), make(chan error)
	go func() {
		runtime.LockOSThread()
		set := sigset(queued)
		results <- all(
			func() error { return unix.PthreadSigmask(unix.SIG_BLOCK, &set, nil) },
			func() error { return unix.Tgkill(os.Getpid(), unix.Gettid(), queued) },
		)
		for range requests {
			got, err := dequeue(queued)
			if err == nil {
				err = equal("signals pending for a thread", got, "0")
			}
			results <- errors.Join(err, unix.Tgkill(os.Getpid(), unix.Gettid(), queued))
		}
	}()
	return func() error {
		requests <- struct{}{}
		return errors.Join(<-results, a.expect("0 1 2", "dequeue"), send())
	}, <-results
}

// siginfo is the kernel's struct siginfo, as far as it is about queued signals.
type siginfo struct {
	signo, errno, code, _ int32
	pid, uid              int32
	value                 uintptr
	_                     [96]byte
}

// queue sends a signal with a value.
func queue(pid int, sig syscall.Signal, value int) error {
	const siQueue = -1
	info := siginfo{signo: int32(sig), code: siQueue, pid: int32(os.Getpid()), value: uintptr(value)}
	_, _, errno := unix.Syscall(unix.SYS_RT_SIGQUEUEINFO, uintptr(pid), uintptr(sig), uintptr(unsafe.Pointer(&info)))
	if errno != 0 {
		return errno
	}
	return nil
}

// dequeue takes all pending signals of a kind and returns their values.
func dequeue(sig syscall.Signal) (string, error) {
	set := uint64(1) << (sig - 1)
	var values []string
	for {
		var info siginfo
		var zero unix.Timespec
		_, _, errno := unix.Syscall6(unix.SYS_RT_SIGTIMEDWAIT, uintptr(unsafe.Pointer(&set)),
			uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&zero)), unsafe.Sizeof(set), 0, 0)
		switch errno {
		case 0:
			values = append(values, fmt.Sprint(info.value))
		case unix.EAGAIN:
			return strings.Join(values, " "), nil
		case unix.EINTR:
		default:
			return "", errno
		}
	}
}

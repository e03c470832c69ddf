package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// newEventfd makes an eventfd with a value.
func newEventfd(value uint) (int, error) {
	return unix.Eventfd(value, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
}

func eventfd(*probe) (func() error, error) {
	const value = 7
	fd, err := newEventfd(value)
	return func() error {
		buf := make([]byte, 8)
		if _, err := unix.Read(fd, buf); err != nil {
			return err
		}
		err := equal("value", binary.NativeEndian.Uint64(buf), value)
		_, werr := unix.Write(fd, buf)
		return errors.Join(err, werr)
	}, err
}

func epoll(*probe) (func() error, error) {
	epfd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, err
	}
	// Of the two, one is ready.
	for value := range uint(2) {
		fd, err := newEventfd(value)
		if err != nil {
			return nil, err
		}
		event := unix.EpollEvent{Events: unix.EPOLLIN, Fd: 1000 + int32(value), Pad: 77}
		if err := unix.EpollCtl(epfd, unix.EPOLL_CTL_ADD, fd, &event); err != nil {
			return nil, err
		}
	}
	return func() error {
		events := make([]unix.EpollEvent, 10)
		n, err := unix.EpollWait(epfd, events, 0)
		return errors.Join(err,
			equal("ready", n, 1),
			equal("event", events[0], unix.EpollEvent{Events: unix.EPOLLIN, Fd: 1001, Pad: 77}))
	}, nil
}

// inotifyIn is a watch on a new folder in dir.
func inotifyIn(dir string) func(*probe) (func() error, error) {
	return func(*probe) (func() error, error) { return inotify(dir + "/inotify") }
}

func inotify(dir string) (func() error, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, err
	}
	wd, err := unix.InotifyAddWatch(fd, dir, unix.IN_CREATE)
	return func() error {
		if err := os.WriteFile(dir+"/new", nil, 0o600); err != nil {
			return err
		}
		defer os.Remove(dir + "/new")
		buf := make([]byte, 4096)
		n, err := unix.Read(fd, buf)
		if err != nil {
			return err
		}
		event := (*unix.InotifyEvent)(unsafe.Pointer(&buf[0]))
		name := unix.ByteSliceToString(buf[unix.SizeofInotifyEvent:n])
		return errors.Join(equal("watch", event.Wd, int32(wd)), equal("name", name, "new"))
	}, err
}

func signalfd(*probe) (func() error, error) {
	set := sigset(queued)
	fd, err := unix.Signalfd(-1, &set, unix.SFD_CLOEXEC|unix.SFD_NONBLOCK)
	return func() error {
		info, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
		if err == nil && !strings.Contains(string(info), fmt.Sprintf("sigmask:\t%016x", set.Val[0])) {
			err = fmt.Errorf("want mask %016x: %s", set.Val[0], info)
		}
		return err
	}, err
}

// A countdown returns what is left of a long time, which must only get less.
func countdown(left func() (time.Duration, error)) func() error {
	last := long
	return func() error {
		now, err := left()
		if err == nil && (now <= 0 || now > last) {
			err = fmt.Errorf("%v left, after %v", now, last)
		}
		last = now
		return err
	}
}

// long is for timers that shall not run out.
const long = 10 * time.Hour

func timerfd(*probe) (func() error, error) {
	fd, err := newTimerfd(long, 0)
	return countdown(func() (time.Duration, error) {
		var spec unix.ItimerSpec
		err := unix.TimerfdGettime(fd, &spec)
		return time.Duration(spec.Value.Nano()), err
	}), err
}

// ticker is a timerfd that runs out often. When it has run out and nobody has
// read it, as happens while it is frozen, CRIU restores it disarmed: it then
// runs out once more and never again (checkpoint-restore/criu#3162).
func ticker(*probe) (func() error, error) {
	fd, err := newTimerfd(10*time.Millisecond, 10*time.Millisecond)
	return func() error {
		buf := make([]byte, 8)
		_, err := fdReader(fd).Read(buf)
		_, err2 := fdReader(fd).Read(buf)
		return errors.Join(err, err2)
	}, err
}

func newTimerfd(first, interval time.Duration) (int, error) {
	fd, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_CLOEXEC)
	if err != nil {
		return -1, err
	}
	return fd, unix.TimerfdSettime(fd, 0, &unix.ItimerSpec{
		Value:    unix.NsecToTimespec(first.Nanoseconds()),
		Interval: unix.NsecToTimespec(interval.Nanoseconds()),
	}, nil)
}

func itimer(*probe) (func() error, error) {
	const which = unix.ItimerWhich(unix.ITIMER_REAL)
	_, err := unix.Setitimer(which, unix.Itimerval{Value: unix.NsecToTimeval(long.Nanoseconds())})
	return countdown(func() (time.Duration, error) {
		it, err := unix.Getitimer(which)
		return time.Duration(it.Value.Nano()), err
	}), err
}

func posixTimer(*probe) (func() error, error) {
	// struct sigevent, of 64 bytes: a value, a signal, and that there be none.
	event := struct {
		value       uintptr
		signo, kind int32
		_           [48]byte
	}{kind: 1}
	var id int32
	if _, err := ipc(unix.SYS_TIMER_CREATE, unix.CLOCK_MONOTONIC, uintptr(unsafe.Pointer(&event)), uintptr(unsafe.Pointer(&id))); err != nil {
		return nil, err
	}
	spec := unix.ItimerSpec{Value: unix.NsecToTimespec(long.Nanoseconds())}
	_, err := ipc(unix.SYS_TIMER_SETTIME, uintptr(id), 0, uintptr(unsafe.Pointer(&spec)), 0)
	return countdown(func() (time.Duration, error) {
		var spec unix.ItimerSpec
		_, err := ipc(unix.SYS_TIMER_GETTIME, uintptr(id), uintptr(unsafe.Pointer(&spec)))
		return time.Duration(spec.Value.Nano()), err
	}), err
}

// sleeping is a thread in a system call that takes long.
func sleeping(*probe) (func() error, error) {
	var done atomic.Bool
	var failed atomic.Value
	until := unix.NsecToTimespec(int64(clock(unix.CLOCK_MONOTONIC) + long))
	go func() {
		runtime.LockOSThread()
		for {
			err := unix.ClockNanosleep(unix.CLOCK_MONOTONIC, unix.TIMER_ABSTIME, &until, nil)
			if err == unix.EINTR {
				continue
			}
			failed.Store(fmt.Sprint(err))
			done.Store(true)
			return
		}
	}()
	return func() error {
		if done.Load() {
			return fmt.Errorf("woke up: %v", failed.Load())
		}
		return nil
	}, nil
}

// pidfd refers to a process.
func pidfd(*probe) (func() error, error) {
	a, err := startAgent(nil)
	if err != nil {
		return nil, err
	}
	fd, err := unix.PidfdOpen(a.pid, 0)
	return func() error { return unix.PidfdSendSignal(fd, 0, nil, 0) }, err
}

// ioUring is an idle io_uring.
func ioUring(*probe) (func() error, error) {
	var params [120]byte
	fd, err := ipc(unix.SYS_IO_URING_SETUP, 8, uintptr(unsafe.Pointer(&params)))
	return func() error {
		_, err := ipc(unix.SYS_IO_URING_ENTER, fd, 0, 0, 0, 0, 0)
		return err
	}, err
}

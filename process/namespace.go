package process

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// InNamespace runs fn on a thread that is in the namespace at path, of the kind that
// the flag of clone(2) names; "" is the caller's own. In a mount namespace the working
// folder and the root are the namespace's root.
func InNamespace(path string, kind int, fn func() error) error {
	if path == "" {
		return fn()
	}
	ns, err := os.Open(path)
	if err != nil {
		return err
	}
	defer ns.Close()
	done := make(chan struct{})
	var enter func()
	enter = func() {
		runtime.LockOSThread()
		if unix.Gettid() == os.Getpid() {
			// The main thread never ends, so it must stay where it is. While
			// it is taken here, it cannot be another goroutine's.
			defer runtime.UnlockOSThread()
			go enter()
			<-done
			return
		}
		// Not unlocked: the thread is in the wrong namespace, and ends with
		// the goroutine.
		defer close(done)
		if kind == unix.CLONE_NEWNS {
			// Threads share them, and then the kernel lets none change its namespace.
			if err = os.NewSyscallError("unshare", unix.Unshare(unix.CLONE_FS)); err != nil {
				return
			}
		}
		if err = unix.Setns(int(ns.Fd()), kind); err != nil {
			err = fmt.Errorf("enter %s: %w", path, err)
			return
		}
		err = fn()
	}
	go enter()
	<-done
	return err
}

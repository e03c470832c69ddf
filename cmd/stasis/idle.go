package main

import (
	"os"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"
)

// idleCPUs has all threads of this process give way to any other that wants to run,
// until the function that it returns is called. (A thread of weight alone, as nice
// gives it, is not put aside at once.)
func idleCPUs() (undo func()) {
	before, err := unix.SchedGetAttr(0, 0)
	if err != nil || before.Policy != unix.SCHED_NORMAL {
		return func() {}
	}
	idle := &unix.SchedAttr{Policy: unix.SCHED_IDLE}
	// The way back may need CAP_SYS_NICE, which a thread tries that ends here.
	possible := make(chan bool)
	go func() {
		runtime.LockOSThread()
		possible <- unix.SchedSetAttr(0, idle, 0) == nil && unix.SchedSetAttr(0, before, 0) == nil
	}()
	if !<-possible {
		return func() {}
	}
	eachThread(idle)
	return func() { eachThread(before) }
}

// eachThread sets how the threads of this process are scheduled. One that is begun
// meanwhile has it from the one that began it, hence twice.
func eachThread(attr *unix.SchedAttr) {
	for range 2 {
		threads, err := os.ReadDir("/proc/self/task")
		if err != nil {
			return
		}
		for _, t := range threads {
			if id, err := strconv.Atoi(t.Name()); err == nil {
				_ = unix.SchedSetAttr(id, attr, 0)
			}
		}
	}
}

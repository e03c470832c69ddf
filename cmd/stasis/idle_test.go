package main

import (
	"os"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

// TestIdleCPUs looks at all threads before, meanwhile and after.
func TestIdleCPUs(t *testing.T) {
	check := func(when string, want uint32) {
		t.Helper()
		threads, err := os.ReadDir("/proc/self/task")
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range threads {
			id, _ := strconv.Atoi(e.Name())
			attr, err := unix.SchedGetAttr(id, 0)
			if err == unix.ESRCH {
				continue
			}
			if err != nil || attr.Policy != want {
				t.Errorf("%s: thread %d has policy %d, %v; want %d", when, id, attr.Policy, err, want)
			}
		}
	}
	check("before", unix.SCHED_NORMAL)
	undo := idleCPUs()
	check("meanwhile", unix.SCHED_IDLE)
	undo()
	check("after", unix.SCHED_NORMAL)
}

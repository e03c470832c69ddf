package process

import (
	"context"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestAllTraced has a process with a child, of which only the parent is held.
func TestAllTraced(t *testing.T) {
	runtime.LockOSThread() // a tracer is a thread
	defer runtime.UnlockOSThread()
	cmd := exec.Command("sh", "-c", "sleep 1000 & echo; wait")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Skip(err)
	}
	pids := []int{cmd.Process.Pid}
	t.Cleanup(func() {
		for _, pid := range pids {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		_ = cmd.Wait()
	})
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if pids = Tree(cmd.Process.Pid); len(pids) != 2 || !slices.Equal(pids[1:], childrenOf(pids[0])) {
		t.Fatalf("%d has the tree %v", cmd.Process.Pid, pids)
	}
	held := func(pids []int, tracer int, want string) {
		t.Helper()
		err := AllTraced(pids, tracer)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	self := unix.Gettid()
	held(pids, self, "is not held by CRIU")
	if err := unix.PtraceSeize(pids[0]); err != nil {
		t.Fatal(err)
	}
	if err := unix.PtraceInterrupt(pids[0]); err != nil {
		t.Fatal(err)
	}
	// Not by wait4: that may be a reaper's of another test.
	for AllTraced(pids[:1], self) != nil {
		runtime.Gosched()
	}
	held(pids[:1], self+1, "is not held by CRIU")
	held(pids, self, "is not held by CRIU")
	held(nil, self, "no process")
}

func TestWaitExec(t *testing.T) {
	cmd := exec.Command("sh", "-c", "read x; exec sleep 1000")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Fatal(err)
	}
	var want unix.Stat_t
	if err := unix.Stat(sleep, &want); err != nil {
		t.Fatal(err)
	}
	shell, program := ProgramOf(cmd.Process.Pid), Program{want.Dev, want.Ino}
	if shell == (Program{}) || shell == program {
		t.Fatalf("the shell's program is %v", shell)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	WaitExec(ended, cmd.Process.Pid, shell) // returns with the context
	if _, err := stdin.Write([]byte("\n")); err != nil {
		t.Fatal(err)
	}
	WaitExec(t.Context(), cmd.Process.Pid, shell)
	if got := ProgramOf(cmd.Process.Pid); got != program {
		t.Errorf("program %v, want sleep's, %v", got, program)
	}
	WaitExec(t.Context(), cmd.Process.Pid, Program{}) // nothing is known, nothing waited for
	WaitExec(t.Context(), 1<<30, program)             // no such process
}

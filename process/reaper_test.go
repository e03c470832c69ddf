package process

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	runc "github.com/containerd/go-runc"
	"golang.org/x/sys/unix"
)

// reaper is the tests' one reaper: a process can have only one, and from the
// first test on nothing here may wait for a child by itself.
var reaper = sync.OnceValue(NewReaper)

func shell(script string) *exec.Cmd { return exec.Command("/bin/sh", "-c", script) }

// wait returns a child's exit, or fails the test.
func wait(t *testing.T, c *Child) Exit {
	t.Helper()
	select {
	case <-c.Done():
		return c.Exit()
	case <-time.After(10 * time.Second):
		t.Fatalf("process %d did not exit", c.Pid)
		panic("unreachable")
	}
}

func TestCommandExit(t *testing.T) {
	for _, tc := range []struct {
		script string
		want   int
	}{
		{"exit 0", 0},
		{"exit 3", 3},
		{"kill -KILL $$", 128 + 9},
		{"kill -TERM $$", 128 + 15},
	} {
		child, err := reaper().Command(shell(tc.script))
		if err != nil {
			t.Fatal(err)
		}
		exit := wait(t, child)
		if exit.Status != tc.want || exit.Pid != child.Pid || exit.At.IsZero() {
			t.Errorf("%s: exit %+v, want status %d of pid %d", tc.script, exit, tc.want, child.Pid)
		}
	}
}

// start starts a command without registering it, as the OCI runtime does with
// an init that the shim then adopts.
func start(t *testing.T, script string) int {
	t.Helper()
	pid, err := syscall.ForkExec("/bin/sh", []string{"sh", "-c", script}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

// gone waits until a pid is nobody's.
func gone(t *testing.T, pid int) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); err != nil {
			return
		}
	}
	t.Fatalf("process %d is still there", pid)
}

func TestLaunchClaimsALiveProcess(t *testing.T) {
	child, err := reaper().Launch(func() (int, error) { return start(t, "sleep 60; true"), nil })
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Signal(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if exit := wait(t, child); exit.Status != 137 {
		t.Errorf("status %d, want 137", exit.Status)
	}
	if err := child.Signal(unix.SIGKILL); err != unix.ESRCH {
		t.Errorf("signal after the exit: %v, want ESRCH", err)
	}
}

func TestLaunchKeepsAnExitBeforeTheClaim(t *testing.T) {
	child, err := reaper().Launch(func() (int, error) {
		pid := start(t, "exit 7")
		gone(t, pid) // reaped, before anyone claimed it
		return pid, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if exit := wait(t, child); exit.Status != 7 {
		t.Errorf("status %d, want 7", exit.Status)
	}
}

// A pid can be used twice while one runtime call is under way. Such an exit
// must not be taken for the new process's.
func TestLaunchPrefersTheLivingProcess(t *testing.T) {
	r := reaper()
	child, err := r.Launch(func() (int, error) {
		pid := start(t, "sleep 60; true")
		r.mu.Lock()
		for w := range r.windows {
			w.exits[pid] = Exit{Pid: pid, Status: 99} // of a former holder of the pid
		}
		r.mu.Unlock()
		return pid, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-child.Done():
		t.Fatalf("took the exit of another process: %+v", child.Exit())
	default:
	}
	_ = child.Signal(unix.SIGTERM)
	if exit := wait(t, child); exit.Status != 128+15 {
		t.Errorf("status %d, want %d", exit.Status, 128+15)
	}
}

func TestLaunchOfNoChild(t *testing.T) {
	if _, err := reaper().Launch(func() (int, error) { return 1, nil }); err == nil {
		t.Error("init of the host was taken for a child")
	}
	want := errors.New("no")
	if _, err := reaper().Launch(func() (int, error) { return 0, want }); !errors.Is(err, want) {
		t.Errorf("error %v, want %v", err, want)
	}
	if n := len(reaper().windows); n != 0 {
		t.Errorf("%d windows are left open", n)
	}
}

func TestManyExitsAtOnce(t *testing.T) {
	var wg sync.WaitGroup
	for i := range 100 {
		wg.Go(func() {
			want := i % 50
			child, err := reaper().Launch(func() (int, error) {
				return syscall.ForkExec("/bin/sh", []string{"sh", "-c", fmt.Sprintf("exit %d", want)}, nil)
			})
			if err != nil {
				t.Error(err)
				return
			}
			<-child.Done()
			if got := child.Exit().Status; got != want {
				t.Errorf("status %d, want %d", got, want)
			}
		})
	}
	wg.Wait()
	reaper().mu.Lock()
	defer reaper().mu.Unlock()
	if n := len(reaper().children); n != 0 {
		t.Errorf("%d children are left", n)
	}
}

// go-runc runs every command through the reaper.
func TestMonitor(t *testing.T) {
	defer func(m runc.ProcessMonitor) { runc.Monitor = m }(runc.Monitor)
	runc.Monitor = reaper()
	for name, startIt := range map[string]func(*exec.Cmd) (chan runc.Exit, error){
		"Start": reaper().Start, "StartLocked": reaper().StartLocked,
	} {
		cmd := shell("echo out; exit 5")
		var out fmtBuffer
		cmd.Stdout = &out
		exits, err := startIt(cmd)
		if err != nil {
			t.Fatal(err)
		}
		status, err := reaper().Wait(cmd, exits)
		if err != nil || status != 5 || string(out) != "out\n" {
			t.Errorf("%s: status %d, error %v, output %q", name, status, err, out)
		}
		if _, err := startIt(exec.Command("/does/not/exist")); err == nil {
			t.Errorf("%s: no error for a missing binary", name)
		}
	}
}

type fmtBuffer []byte

func (b *fmtBuffer) Write(p []byte) (int, error) { *b = append(*b, p...); return len(p), nil }

// TestStuckRuntime: a runtime whose CRIU was killed waits for its answer forever. One
// whose CRIU has exited has its answer, and may only be waiting for a CPU.
func TestStuckRuntime(t *testing.T) {
	for how, want := range map[string]bool{"kill -KILL $$": true, "kill -ABRT $$": true, "exit 0": false, "exit 1": false, "exec sleep 60": false} {
		t.Run(how, func(t *testing.T) {
			// The shell becomes a program that does not wait for its children.
			cmd := exec.Command("sh", "-c", `sh -c "$1" & exec sleep 60`, "sh", how)
			cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
			c, err := reaper().Command(cmd)
			if err != nil {
				t.Fatal(err)
			}
			defer cmd.Wait()
			defer wait(t, c)
			defer unix.Kill(-c.Pid, unix.SIGKILL)
			for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
				if children := childrenOf(c.Pid); len(children) == 1 {
					st := statOf(children[0])
					args, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", children[0]))
					if st != nil && st.state == 'Z' || strings.HasPrefix(string(args), "sleep") {
						break
					}
				}
				if time.Now().After(deadline) {
					t.Fatal("no child that sleeps or is dead")
				}
			}
			if got := isStuck(c.Pid); got != want {
				t.Errorf("stuck: %v, want %v", got, want)
			}
		})
	}
}

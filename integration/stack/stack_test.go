package stack

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/cgroups/v3"
	"golang.org/x/sys/unix"
)

var _ TB = testing.TB(nil)

// recorder is a TB that notes errors instead of failing.
type recorder struct {
	*testing.T
	errors []string
}

func (r *recorder) Errorf(format string, args ...any) {
	r.errors = append(r.errors, fmt.Sprintf(format, args...))
}

func (r *recorder) Failed() bool { return false }

func TestLeaks(t *testing.T) {
	// The stacks of other packages' tests, which run beside these, would report the
	// firewall rule too if it were the host's. The thread ends with the test.
	runtime.LockOSThread()
	must(t, unix.Unshare(unix.CLONE_NEWNET))
	r := &recorder{T: t}
	s := Start(r, Options{Upstream: true})

	marked := exec.Command("sleep", "1000")
	marked.Env = s.env
	if err := marked.Start(); err != nil {
		t.Fatal(err)
	}
	defer marked.Wait()
	inCgroup := exec.Command("sleep", "1001")
	if err := inCgroup.Start(); err != nil {
		t.Fatal(err)
	}
	defer inCgroup.Wait()
	hierarchy := "/sys/fs/cgroup/pids"
	if cgroups.Mode() == cgroups.Unified {
		hierarchy = "/sys/fs/cgroup"
	}
	cgroup := filepath.Join(hierarchy, s.CgroupPath("leak"))
	must(t, os.MkdirAll(cgroup, 0o755))
	must(t, os.WriteFile(filepath.Join(cgroup, "cgroup.procs"), fmt.Append(nil, inCgroup.Process.Pid), 0))
	must(t, os.Mkdir(s.path("mnt"), 0o755))
	must(t, syscall.Mount("none", s.path("mnt"), "tmpfs", 0, ""))
	must(t, os.WriteFile(filepath.Join(s.TempDir(), "ctrd-checkpoint1"), nil, 0o600))
	must(t, os.WriteFile(s.path("s", "socket"), nil, 0o600))
	n := s.NewNetns()
	inNet := exec.Command("ip", "netns", "exec", n.Name, "sleep", "1002")
	if err := inNet.Start(); err != nil {
		t.Fatal(err)
	}
	defer inNet.Wait()
	defer inNet.Process.Kill()
	must(t, exec.Command("iptables", "-N", "CRIU-"+s.ID).Run())
	defer exec.Command("iptables", "-X", "CRIU-"+s.ID).Run()
	// What a stack deletes without complaint.
	s.NewContainer(s.Ctx(), "running", Busybox, Args("sleep", "1003")).Start(s.Ctx())
	s.NewContainer(s.Ctx(), "created", Busybox, Args("sleep", "1004")).Create(s.Ctx())

	s.patience = 100 * time.Millisecond
	s.Stop()
	got := strings.Join(r.errors, "\n")
	for _, want := range []string{"(sleep 1000)", "(sleep 1001)", cgroup, s.path("mnt"), "ctrd-checkpoint1", s.path("s", "socket"), n.Name, "CRIU-" + s.ID} {
		if !strings.Contains(got, want) {
			t.Errorf("not reported: %s", want)
		}
	}
	for _, e := range r.errors {
		t.Log(e)
	}
	if strings.Contains(got, "1003") || strings.Contains(got, "1004") {
		t.Error("containers that were left are reported")
	}
	if _, err := os.Stat(s.Dir); !os.IsNotExist(err) {
		t.Errorf("%s is still there: %v", s.Dir, err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestMainCleansUp(t *testing.T) {
	var order []string
	code := Main("test", func(tb TB) {
		tb.Cleanup(func() { order = append(order, "first") })
		tb.Cleanup(func() { tb.Fatalf("second") })
		tb.Fatalf("body")
		order = append(order, "unreachable")
	})
	if code != 1 || strings.Join(order, " ") != "first" {
		t.Errorf("exit code %d, order %q", code, order)
	}
}

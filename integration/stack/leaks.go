package stack

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"golang.org/x/sys/unix"
)

const (
	// dirPrefix begins the name of a stack's folder and of its cgroup.
	dirPrefix = "stasis-"
	// idEnv marks the processes of a stack.
	idEnv = "STASIS_TEST_ID"
	// runtimeRoot is where shims let runc and crun keep their state.
	runtimeRoot = "/run/containerd/runc"
	// oldShimSockets is where shims listen under containerd before 2.4.
	oldShimSockets = "/run/containerd/s"
)

// A baseline is what the host had when a stack started, so that Stop does not
// report it.
type baseline struct {
	sockets []string
	rules   []string
	// What a kubelet sets for the whole host, unless it is in a machine.
	tunables map[string]string
}

func takeBaseline() baseline {
	return baseline{sockets: deadSockets(), rules: firewallRules(), tunables: readTunables()}
}

// Stop deletes what is left in the stack, stops containerd, and fails the test
// for each thing that is still there. Start arranges for it to be called; call
// it yourself only to do so earlier.
func (s *Stack) Stop() {
	s.tb.Helper()
	if s.stopped {
		return
	}
	s.stopped = true
	defer s.cancel()
	defer s.lock.Close()
	defer func() {
		for _, c := range s.claims {
			c.Close()
		}
	}()
	if s.faults != nil {
		s.faults.Reset()
	}
	if s.machine != nil {
		s.machine.stopRestarts()
	}
	var leaks []string
	leak := func(format string, args ...any) {
		if l := fmt.Sprintf(format, args...); !slices.Contains(leaks, l) {
			leaks = append(leaks, l)
		}
	}

	// The stack's own context may have ended, and the test's has.
	ctx, cancel := context.WithTimeout(context.Background(), WaitTimeout())
	defer cancel()
	if s.containerd != nil {
		if s.containerd.Exited() {
			s.ctx = namespaces.WithNamespace(ctx, s.Namespace)
			if err := s.boot(); err != nil {
				leak("containerd does not start again: %v", err)
			}
		}
		if s.client != nil && !s.containerd.Exited() {
			if s.opts.CRI {
				if err := s.removePods(ctx); err != nil {
					leak("%v", err)
				}
			}
			if err := s.deleteAll(ctx); err != nil {
				leak("%v", err)
			}
			s.client.Close()
		}
		stay := []int{s.Containerd()}
		mounted := []string{s.Dir, runtimeState(s.ID)}
		if s.machine != nil {
			stay = append(stay, s.machine.holder.Process.Pid)
			mounted = append(mounted, bare...)
		}
		for _, p := range s.waitProcesses(ctx, stay) {
			leak("process %v", p)
		}
		// While containerd lives, for it may have a mount namespace of its own.
		for _, m := range mountsBelow(fmt.Sprintf("/proc/%d/mountinfo", s.Containerd()), mounted...) {
			leak("mount %s", m)
		}
		if err := s.containerd.Signal(ctx, syscall.SIGTERM); err != nil {
			leak("containerd does not stop: %v", err)
		}
	}
	if s.machine != nil {
		if err := s.machine.end(); err != nil {
			leak("machine: %v", err)
		}
		states, _ := filepath.Glob(s.path("machine", runtimeRoot, "*", "*"))
		for _, state := range states {
			leak("runtime state %s", state)
		}
	}
	for _, n := range s.netns {
		if err := n.delete(); err != nil {
			leak("network namespace %s: %v", n.Name, err)
		}
	}
	if s.opts.CRI {
		// It has none if there never was a pod.
		ip("link del " + bridge(s.ID))
	}
	if entries, err := os.ReadDir(s.TempDir()); err == nil {
		for _, e := range entries {
			leak("temporary file %s", filepath.Join(s.TempDir(), e.Name()))
		}
	}
	if entries, err := os.ReadDir(s.path("s")); err == nil {
		for _, e := range entries {
			leak("shim socket %s", filepath.Join(s.path("s"), e.Name()))
		}
	}
	// A socket that is just being made looks dead, and another stack, or the
	// host's own containerd, may be making one.
	dead := func() []string { return added(s.baseline.sockets, deadSockets()) }
	brief, cancelBrief := context.WithTimeout(ctx, Patience(10*time.Second))
	defer cancelBrief()
	poll(brief, func() bool { return len(dead()) == 0 })
	for _, d := range dead() {
		leak("shim socket %s", d)
	}
	for _, r := range added(s.baseline.rules, firewallRules()) {
		// Other stacks may add theirs, but none has a reason to use CRIU in
		// the host's network namespace.
		if strings.Contains(r, "CRIU") || strings.Contains(r, "KUBE-") || strings.Contains(r, s.ID) {
			leak("firewall rule %s", r)
		}
	}
	for path, value := range readTunables() {
		if before := s.baseline.tunables[path]; value != before {
			leak("%s changed from %q to %q", path, before, value)
		}
	}
	if entries, err := os.ReadDir(filepath.Join(runtimeRoot, s.Namespace)); err == nil {
		for _, e := range entries {
			leak("runtime state %s", filepath.Join(runtimeRoot, s.Namespace, e.Name()))
		}
	}
	for _, c := range cgroupsBelow(s.ID) {
		leak("cgroup %s", c)
	}
	removeAll(s.ID, s.Dir, leak)

	for _, l := range leaks {
		if !slices.ContainsFunc(s.opts.KnownLeaks, func(known string) bool { return strings.Contains(l, known) }) {
			s.tb.Errorf("stack: leaked: %s", l)
		}
	}
	if s.tb.Failed() {
		s.tb.Logf("containerd's last words:\n%s", tail(s.Logs(), 60))
		if os.Getenv("STASIS_KEEP") != "" {
			s.tb.Logf("kept: %s", s.Dir)
			return
		}
	}
	if err := os.RemoveAll(s.Dir); err != nil {
		s.tb.Errorf("stack: %v", err)
	}
}

// deleteAll deletes all containers.
func (s *Stack) deleteAll(ctx context.Context) error {
	spaces, err := s.client.NamespaceService().List(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, ns := range spaces {
		ctx := namespaces.WithNamespace(ctx, ns)
		containers, err := s.client.Containers(ctx)
		if err != nil {
			return err
		}
		for _, c := range containers {
			if err := deleteContainer(ctx, c); err != nil {
				errs = append(errs, fmt.Errorf("container %s: %w", c.ID(), err))
			}
		}
	}
	return errors.Join(errs...)
}

func deleteContainer(ctx context.Context, c client.Container) error {
	if task, err := c.Task(ctx, nil); err == nil {
		// A frozen process does not die.
		task.Resume(ctx)
		if _, err := task.Delete(ctx, client.WithProcessKill); err != nil {
			return fmt.Errorf("delete task: %w", err)
		}
	}
	return c.Delete(ctx, client.WithSnapshotCleanup)
}

// waitProcesses waits until there is no process of this stack but the given
// ones, kills those that stay, and returns them.
func (s *Stack) waitProcesses(ctx context.Context, but []int) []process {
	left := func() []process {
		return slices.DeleteFunc(processes(s.ID), func(p process) bool { return slices.Contains(but, p.pid) })
	}
	ctx, cancel := context.WithTimeout(ctx, s.patience)
	defer cancel()
	if poll(ctx, func() bool { return len(left()) == 0 }) == nil {
		return nil
	}
	leaked := left()
	for _, p := range leaked {
		syscall.Kill(p.pid, syscall.SIGKILL)
	}
	return leaked
}

// removeAll removes what a stack has left behind, apart from its folder.
func removeAll(id, dir string, leak func(string, ...any)) {
	for range 100 {
		thawAll(id) // a frozen process does not die
		// Again and again, as they may be forking.
		left := processes(id)
		if len(left) == 0 {
			break
		}
		for _, p := range left {
			syscall.Kill(p.pid, syscall.SIGKILL)
		}
		time.Sleep(10 * time.Millisecond)
	}
	mounts := mountsBelow("/proc/self/mountinfo", dir, runtimeState(id))
	slices.Reverse(mounts)
	for _, m := range mounts {
		leak("mount %s", m)
		unix.Unmount(m, unix.MNT_DETACH)
	}
	os.RemoveAll(runtimeState(id))
	for _, root := range cgroupRoots(id) {
		var dirs []string
		filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, p)
			}
			return nil
		})
		slices.Reverse(dirs)
		for _, d := range dirs {
			// One whose processes have just died is busy for a moment, and
			// systemd may have removed its own meanwhile.
			err := os.Remove(d)
			for tries := 0; errors.Is(err, unix.EBUSY) && tries < 100; tries++ {
				time.Sleep(10 * time.Millisecond)
				err = os.Remove(d)
			}
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				leak("cgroup %s: %v", d, err)
			}
		}
	}
}

// A process, as far as it says who left it behind.
type process struct {
	pid  int
	args string
}

func (p process) String() string { return fmt.Sprintf("%d (%s)", p.pid, p.args) }

// processes returns the processes that belong to the stack: by the mark in
// their environment, by their cgroup, or by being a child of such a process.
func processes(id string) []process {
	var all []int
	parents := map[int]int{}
	ours := map[int]bool{}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		state, ppid := stat(pid)
		if state == 0 || state == 'Z' || state == 'X' {
			continue
		}
		all = append(all, pid)
		parents[pid] = ppid
		proc := filepath.Join("/proc", e.Name())
		environ, _ := os.ReadFile(filepath.Join(proc, "environ"))
		cgroup, _ := os.ReadFile(filepath.Join(proc, "cgroup"))
		ours[pid] = strings.Contains("\x00"+string(environ), "\x00"+idEnv+"="+id+"\x00") ||
			strings.Contains(string(cgroup), "/"+dirPrefix+id+"/") ||
			strings.Contains(string(cgroup), "/"+dirPrefix+id+".slice/")
	}
	var found []process
	for _, pid := range all {
		for p := pid; p > 1; p = parents[p] {
			if !ours[p] {
				continue
			}
			args, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
			found = append(found, process{pid, strings.TrimSpace(strings.ReplaceAll(string(args), "\x00", " "))})
			break
		}
	}
	return found
}

// stat returns a process's state and parent, or a state of 0.
func stat(pid int) (state byte, ppid int) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0
	}
	// The name in parentheses may contain anything.
	fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	ppid, _ = strconv.Atoi(fields[1])
	return fields[0][0], ppid
}

// runtimeState is where the OCI runtime keeps what it knows of a stack's
// containers, and mounts their rootfs in a restore.
func runtimeState(id string) string { return filepath.Join(runtimeRoot, "test-"+id) }

// mountsBelow returns the mount points below any of the folders.
func mountsBelow(mountinfo string, dirs ...string) []string {
	f, err := os.Open(mountinfo)
	if err != nil {
		return nil
	}
	defer f.Close()
	var found []string
	for lines := bufio.NewScanner(f); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		if len(fields) > 4 && slices.ContainsFunc(dirs, func(dir string) bool { return strings.HasPrefix(fields[4], dir+"/") }) {
			found = append(found, fields[4])
		}
	}
	return found
}

// cgroupRoots returns the folders of a stack's own cgroup: one, or with cgroup
// v1 one of each controller.
func cgroupRoots(id string) []string {
	v1, _ := filepath.Glob("/sys/fs/cgroup/*/" + dirPrefix + id)
	v2, _ := filepath.Glob("/sys/fs/cgroup/" + dirPrefix + id)
	systemd, _ := filepath.Glob("/sys/fs/cgroup/*.slice/" + dirPrefix + id + ".slice")
	return slices.Concat(v1, v2, systemd)
}

// thawAll thaws all cgroups of a stack.
func thawAll(id string) {
	for _, root := range cgroupRoots(id) {
		filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				for name, value := range map[string]string{"freezer.state": "THAWED", "cgroup.freeze": "0"} {
					if f, err := os.OpenFile(filepath.Join(p, name), os.O_WRONLY, 0); err == nil {
						f.WriteString(value)
						f.Close()
					}
				}
			}
			return nil
		})
	}
}

// cgroupsBelow returns the cgroups below a stack's own.
func cgroupsBelow(id string) []string {
	var found []string
	for _, root := range cgroupRoots(id) {
		filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() && p != root {
				found = append(found, p)
			}
			return nil
		})
	}
	return found
}

// deadSockets returns the sockets in the folder that all shims of older
// containerds share on which no one listens.
func deadSockets() []string {
	var dead []string
	entries, _ := os.ReadDir(oldShimSockets)
	for _, e := range entries {
		path := filepath.Join(oldShimSockets, e.Name())
		conn, err := net.Dial("unix", path)
		if errors.Is(err, unix.ECONNREFUSED) {
			dead = append(dead, path)
		} else if err == nil {
			conn.Close()
		}
	}
	return dead
}

// firewallRules returns the rules of iptables and the tables of nftables in the
// network namespace that we are in.
func firewallRules() []string {
	var rules []string
	for _, save := range []string{"iptables-save", "ip6tables-save"} {
		out, err := exec.Command(save).Output()
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(out)) {
			if !strings.HasPrefix(line, "#") {
				rules = append(rules, strings.TrimSpace(line))
			}
		}
	}
	for _, t := range nftTables() {
		rules = append(rules, "nft table "+t)
	}
	return rules
}

// added returns what is in after and not in before.
func added(before, after []string) []string {
	return slices.DeleteFunc(after, func(s string) bool { return slices.Contains(before, s) })
}

// lockDir marks the folder as that of a living stack, which sweep leaves alone,
// until the file is closed, if only because this process has died.
func lockDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	return f, unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
}

var sweepOnce sync.Once

// sweep removes the stacks of tests that did not live to call Stop.
func sweep(tb TB) {
	locks, _ := filepath.Glob(filepath.Join(os.TempDir(), dirPrefix+"*", "lock"))
	for _, lock := range locks {
		// One that has just been made may not be locked yet.
		if info, err := os.Stat(lock); err != nil || time.Since(info.ModTime()) < time.Minute {
			continue
		}
		fd, err := unix.Open(lock, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			continue
		}
		if unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) == nil {
			dir := filepath.Dir(lock)
			id := strings.TrimPrefix(filepath.Base(dir), dirPrefix)
			tb.Logf("stack: removing %s, which an earlier test left behind", dir)
			removeAll(id, dir, func(string, ...any) {})
			removeNetns(id)
			os.RemoveAll(dir)
		}
		unix.Close(fd)
	}
}

package stack

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
)

// Options choose what a Stack runs. The zero value is containerd 2.4 with
// Stasis under its own name and runc below it.
type Options struct {
	// Version is that of containerd: "2.4", "2.1" or "1.7". None is that of the
	// environment, or 2.4.
	Version string
	// DropIn installs Stasis as containerd-shim-runc-v2, so that it runs
	// under the name io.containerd.runc.v2.
	DropIn bool
	// Upstream runs containerd's own shim instead of Stasis.
	Upstream bool
	// Crun runs containers by crun instead of runc. Crun refuses hybrid
	// cgroups, so on a host that has them containerd then runs in a mount
	// namespace that hides their v2 half, and its mounts are not visible in the
	// host's mount namespace.
	Crun bool
	// SystemdCgroup has systemd make the containers' cgroups (the driver that
	// kubelets on most distributions use). It must be what runs this host.
	SystemdCgroup bool
	// Snapshotter is "overlayfs", "native", "erofs" or "blockfile".
	Snapshotter string
	// CRI enables Kubernetes' runtime interface; see Stack.RunPod.
	CRI bool
	// NodeConfig is what the node's configuration of Stasis says, with CRI, under
	// HandlerStasis.
	NodeConfig string
	// Machine makes the stack look like a host of its own, with a network and
	// the folders /etc, /usr/local, /var/lib, /var/log and /run/containerd of its
	// own, where nothing of Stasis is installed yet; CRI then knows HandlerRunc
	// only, which is its default, and what is in /etc/containerd/conf.d.
	Machine bool
	// ExtraConfig is added to containerd's configuration file.
	ExtraConfig string
	// NoGrants has Stasis give `stasis restore` no flags but a test's own. Else it
	// adds those that what NewContainer makes needs where nobody has signed its
	// checkpoint: no seccomp profile, and a cgroup that Stop looks after.
	NoGrants bool
	// Env is added to the environment of containerd, which shims and
	// runtimes inherit.
	Env []string
	// KnownLeaks are what Stop finds and must not report, each a part of the
	// report's text, for faults in other people's programs.
	KnownLeaks []string
}

// A Stack is a private containerd. It is made by Start and used by one test.
type Stack struct {
	// ID marks everything that belongs to this stack: it is part of the names
	// of its folder, cgroups and network devices, and the value of
	// STASIS_TEST_ID in the environment of its processes.
	ID string
	// Namespace is the containerd namespace of Ctx, Ctr and so of most tests. It
	// is not "default", as the state of runc is shared by all containerds: two
	// may not have a container of the same name in the same namespace.
	Namespace string
	// Dir holds all the files of the stack, and is deleted by Stop.
	Dir string

	tb   TB
	opts Options
	bins binaries
	env  []string
	lock *os.File // held while the stack lives

	client     *client.Client
	ctx        context.Context
	cancel     context.CancelFunc
	stopped    bool
	containerd *Daemon
	faults     *Faults
	baseline   baseline
	netns      []*Netns
	claims     []net.Listener // see claim
	machine    *machine
	patience   time.Duration // with processes that take their time to end
}

// Start runs a containerd and arranges for Stop when the test is over.
func Start(tb TB, opts Options) *Stack {
	tb.Helper()
	if os.Geteuid() != 0 {
		tb.Fatalf("stack: must run as root")
	}
	heedHangup()
	if opts.Version == "" {
		opts.Version = cmp.Or(os.Getenv("STASIS_TEST_CONTAINERD"), "2.4")
	}
	if os.Getenv("STASIS_TEST_SYSTEMD") != "" {
		opts.SystemdCgroup = true
	}
	if opts.Snapshotter == "" {
		opts.Snapshotter = "overlayfs"
	}
	if os.Getenv("STASIS_UPSTREAM") != "" {
		opts.Upstream = true
	}
	opts.KnownLeaks = slices.Clone(opts.KnownLeaks)
	if opts.hidesUnified() {
		// The half that is hidden is where CRIU then restores what it takes
		// for the container's cgroups.
		opts.KnownLeaks = append(opts.KnownLeaks, "cgroup /sys/fs/cgroup/unified/")
	}
	if opts.Crun {
		// It keeps its state there, for commands that are not told where, even
		// if it is only asked for its version.
		opts.KnownLeaks = append(opts.KnownLeaks, filepath.Join("tmp", "crun"))
	}
	bins, err := findBinaries(opts)
	if err != nil {
		tb.Fatalf("stack: %v", err)
	}
	sweepOnce.Do(func() { sweep(tb) })
	tb.Logf("stack: on %s", describe(opts, bins))

	s := &Stack{tb: tb, opts: opts, bins: bins, baseline: takeBaseline(), patience: Patience(time.Minute)}
	if err := s.makeDir(); err != nil {
		tb.Fatalf("stack: %v", err)
	}
	s.ctx, s.cancel = namespaces.WithNamespace(tb.Context(), s.Namespace), func() {}
	if t, ok := tb.(interface{ Deadline() (time.Time, bool) }); ok {
		if d, ok := t.Deadline(); ok {
			// A test that hangs shall fail and clean up, not panic.
			s.ctx, s.cancel = context.WithDeadline(s.ctx, d.Add(-20*time.Second))
		}
	}
	tb.Cleanup(s.Stop)
	if opts.Machine {
		if err := s.startMachine(); err != nil {
			tb.Fatalf("stack: %v", err)
		}
	}
	if err := s.boot(); err != nil {
		tb.Fatalf("stack: %v\n%s", err, tail(s.Logs(), 20))
	}
	return s
}

// makeDir makes the folder of the stack and what containerd needs in it.
func (s *Stack) makeDir() error {
	var id [4]byte
	rand.Read(id[:])
	s.ID = hex.EncodeToString(id[:])
	s.Namespace = "test-" + s.ID
	s.Dir = filepath.Join(os.TempDir(), dirPrefix+s.ID)
	// A socket's path has at most 107 bytes; the longest is that of a shim.
	if n := len(s.Dir + "/s/" + strings.Repeat("f", 64)); n > 107 {
		return fmt.Errorf("TMPDIR (%s) is too long for the paths of sockets", os.TempDir())
	}
	for _, d := range []string{"", "bin", "fifo", "s", "tmp"} {
		if err := os.Mkdir(s.path(d), 0o700); err != nil {
			return err
		}
	}
	var err error
	if s.lock, err = lockDir(s.Dir); err != nil {
		return err
	}
	for name, target := range s.bins.path {
		if s.opts.Machine && name == stasisShim {
			continue
		}
		if err := os.Symlink(target, s.path("bin", name)); err != nil {
			return err
		}
	}
	s.env = slices.Concat(os.Environ(), []string{
		"PATH=" + s.path("bin") + ":" + filepath.Join(cacheDir(), "bin") + ":" + os.Getenv("PATH") + ":/usr/local/sbin:/usr/local/bin",
		idEnv + "=" + s.ID,
		// Where containerd puts checkpoints on their way.
		"TMPDIR=" + s.path("tmp"),
		"XDG_RUNTIME_DIR=" + s.path("tmp"),
		// Where Stasis has its keys and its configuration.
		"STASIS_CONFIG_DIR=" + s.ConfigDir(),
	}, s.opts.Env)
	return s.writeConfig()
}

func (s *Stack) path(elem ...string) string {
	return filepath.Join(append([]string{s.Dir}, elem...)...)
}

// boot starts containerd and waits until it serves.
func (s *Stack) boot() error {
	args := []string{s.bins.containerd, "--config", s.path("config.toml")}
	if s.opts.hidesUnified() {
		// What is mounted in the host's namespace later reaches this one if the
		// host lets it, but not the other way; ip makes it let network
		// namespaces.
		if err := makeNetnsShared(s.ID); err != nil {
			return err
		}
		args = append([]string{"unshare", "--mount", "--propagation", "slave", "sh", "-c", `
			if mountpoint -q /sys/fs/cgroup/unified; then umount /sys/fs/cgroup/unified; fi
			exec "$@"`, "sh"}, args...)
	}
	d, err := s.StartDaemon("containerd", s.Command(context.Background(), args[0], args[1:]...))
	if err != nil {
		return err
	}
	s.containerd = d

	// Only then the client: its connection would back off for a second.
	dialed := func() bool {
		conn, err := net.Dial("unix", s.Address())
		if err != nil {
			return false
		}
		conn.Close()
		return true
	}
	ctx, cancel := context.WithTimeout(s.ctx, WaitTimeout())
	defer cancel()
	if err := poll(ctx, func() bool { return d.Exited() || dialed() }); err != nil {
		return fmt.Errorf("containerd does not serve: %w", err)
	}
	if s.client == nil {
		s.client, err = client.New(s.Address(), client.WithTimeout(Patience(time.Second)))
	} else {
		err = s.client.Reconnect()
	}
	if err != nil {
		return err
	}
	for {
		if ok, err := s.client.IsServing(ctx); ok {
			return nil
		} else if d.Exited() {
			return fmt.Errorf("containerd exited: %w", d.err)
		} else if ctx.Err() != nil {
			return fmt.Errorf("containerd does not serve: %w", err)
		}
	}
}

// Ctx returns a context with the namespace that Ctr uses too. It ends with the
// test's own context, so before functions given to Cleanup are called, or
// shortly before the test would be stopped for taking too long.
func (s *Stack) Ctx() context.Context { return s.ctx }

// Client returns a client of the stack's containerd, which stays valid after
// Restart. Give it contexts that Ctx is the parent of.
func (s *Stack) Client() *client.Client { return s.client }

// Address returns the path of containerd's gRPC socket.
func (s *Stack) Address() string { return s.path("c.sock") }

// StateDir returns the folder with the bundle of each container: the one of
// container c in namespace n is <StateDir>/io.containerd.runtime.v2.task/n/c; see
// Container.Bundle.
func (s *Stack) StateDir() string {
	if s.opts.Machine {
		return "/run/containerd"
	}
	return s.path("state")
}

// TempDir returns the temporary folder of containerd and of all below it.
func (s *Stack) TempDir() string { return s.path("tmp") }

// ConfigDir returns the folder with the keys and the configuration of Stasis, which a
// test may make. Each stack has its own, so each is a node of its own.
func (s *Stack) ConfigDir() string {
	if s.opts.Machine {
		return "/etc/stasis"
	}
	return s.path("etc-stasis")
}

// Env returns the environment of what belongs to the stack: programs that are
// started with it are looked for when it stops.
func (s *Stack) Env() []string { return slices.Clone(s.env) }

// Containerd returns the pid of containerd.
func (s *Stack) Containerd() int { return s.containerd.cmd.Process.Pid }

// Runtime returns the name under which containers of this stack run.
func (s *Stack) Runtime() string {
	if s.opts.Upstream || s.opts.DropIn {
		return "io.containerd.runc.v2"
	}
	return "io.containerd.stasis.v1"
}

// OCIRuntime returns the path of the OCI runtime, runc or crun, that containers
// of this stack are given. After Faults it is faultrunc, which runs that.
func (s *Stack) OCIRuntime() string {
	if s.faults != nil {
		return s.faults.binary
	}
	return s.bins.runtime
}

// RuncOptions returns runtime options that name the OCI runtime: binary, or
// OCIRuntime if it is empty.
func (s *Stack) RuncOptions(binary string) *options.Options {
	if binary == "" {
		binary = s.OCIRuntime()
	}
	return &options.Options{BinaryName: binary, SystemdCgroup: s.opts.SystemdCgroup}
}

// CgroupPath returns the cgroup path for the spec of a container of the given
// name. All lie below one cgroup, which Stop deletes.
func (s *Stack) CgroupPath(name string) string {
	if s.opts.SystemdCgroup {
		return s.cgroupParent() + ":" + scopePrefix + ":" + name
	}
	return s.cgroupParent() + "/" + name
}

// CgroupDirs returns the folders of the cgroup that all others of the stack lie
// below, which need not be there: one, or with cgroup v1 one of each controller.
func (s *Stack) CgroupDirs() []string {
	var dirs []string
	mounts, _ := filepath.Glob("/sys/fs/cgroup/cgroup.procs")
	if len(mounts) == 0 {
		mounts, _ = filepath.Glob("/sys/fs/cgroup/*/cgroup.procs")
	}
	for _, m := range mounts {
		dirs = append(dirs, filepath.Join(filepath.Dir(m), filepath.Dir(s.Cgroup("c"))))
	}
	return dirs
}

// Cgroup returns the control group that CgroupPath stands for: its path below
// the root of a hierarchy, as in /proc/<pid>/cgroup.
func (s *Stack) Cgroup(name string) string {
	if s.opts.SystemdCgroup {
		// Each dash of a slice's name is a level of the tree.
		return "/" + strings.TrimSuffix(dirPrefix, "-") + ".slice/" + s.cgroupParent() + "/" + scopePrefix + "-" + name + ".scope"
	}
	return s.CgroupPath(name)
}

// ContainerCgroups returns the folders of a container's control group that there are:
// with version 1, one for each controller. Those that this host hides from crun, and
// CRIU makes all the same, are no shim's to remove.
func (s *Stack) ContainerCgroups(name string) []string {
	v1, _ := filepath.Glob("/sys/fs/cgroup/*" + s.Cgroup(name))
	v2, _ := filepath.Glob("/sys/fs/cgroup" + s.Cgroup(name))
	return slices.DeleteFunc(append(v1, v2...), func(dir string) bool {
		return s.opts.hidesUnified() && strings.HasPrefix(dir, "/sys/fs/cgroup/unified/")
	})
}

// cgroupParent is what the stack's cgroups lie below: a path, or systemd's slice.
func (s *Stack) cgroupParent() string {
	if s.opts.SystemdCgroup {
		return dirPrefix + s.ID + ".slice"
	}
	return "/" + dirPrefix + s.ID
}

// scopePrefix is what precedes a container's name in that of systemd's unit.
const scopePrefix = "stasis"

// Ctr runs ctr and returns what it printed on stdout.
func (s *Stack) Ctr(args ...string) string {
	s.tb.Helper()
	out, err := s.CtrErr(args...)
	if err != nil {
		s.tb.Fatalf("%v", err)
	}
	return out
}

// CtrErr is Ctr for a command that may fail. The error has what ctr printed on
// stderr.
func (s *Stack) CtrErr(args ...string) (string, error) {
	cmd := s.Command(s.ctx, s.bins.ctr, append([]string{"--address", s.Address(), "--namespace", s.Namespace}, args...)...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	// Let it put the terminal right and delete its container.
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 5 * time.Second
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("ctr %s: %w\n%s", strings.Join(args, " "), err, stderr.String())
	}
	return string(out), err
}

// Kill9 kills containerd as a crash would. Shims and containers live on.
func (s *Stack) Kill9() {
	s.tb.Helper()
	if err := s.containerd.Signal(s.ctx, syscall.SIGKILL); err != nil {
		s.tb.Fatalf("kill containerd: %v", err)
	}
}

// Restart starts containerd again, after it was stopped in good order if Kill9
// did not.
func (s *Stack) Restart() {
	s.tb.Helper()
	if err := s.reboot(); err != nil {
		s.tb.Fatalf("restart: %v\n%s", err, tail(s.Logs(), 20))
	}
}

// reboot is Restart, for other goroutines than the test's.
func (s *Stack) reboot() error {
	if err := s.containerd.Signal(s.ctx, syscall.SIGTERM); err != nil {
		return fmt.Errorf("stop containerd: %w", err)
	}
	return s.boot()
}

// Logs returns what containerd and its shims have logged.
func (s *Stack) Logs() string {
	b, err := os.ReadFile(s.path("containerd.log"))
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// tail returns the last n lines of text that may be of interest.
func tail(text string, n int) string {
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	lines = slices.DeleteFunc(lines, func(l string) bool { return strings.Contains(l, "loading plugin") })
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// Poll waits until cond is true, which it asks every few milliseconds.
func (s *Stack) Poll(ctx context.Context, what string, cond func() bool) {
	s.tb.Helper()
	ctx, cancel := context.WithTimeout(ctx, WaitTimeout())
	defer cancel()
	if err := poll(ctx, cond); err != nil {
		s.tb.Fatalf("waiting for %s: %v", what, err)
	}
}

// WaitTimeout returns how long to wait, at most, for what takes milliseconds on
// an idle machine. It is long enough for a slow disk and busy CPUs, and costs time
// only when something hangs.
func WaitTimeout() time.Duration { return Patience(3 * time.Minute) }

// Patience returns how long to wait on this host, at most, for what has happened
// within d on any ordinary one.
func Patience(d time.Duration) time.Duration {
	slow, err := strconv.Atoi(os.Getenv("STASIS_TEST_SLOW"))
	if err != nil || slow < 1 {
		return d
	}
	return d * time.Duration(slow)
}

func poll(ctx context.Context, cond func() bool) error {
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-ctx.Done():
			if cond() {
				return nil
			}
			return ctx.Err()
		case <-tick.C:
		}
	}
	return nil
}

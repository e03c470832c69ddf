package integration

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/containerd/v2/pkg/rootfs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/integration/stack"
)

// everything are the options that all items of the probe together need.
func everything() *options.CheckpointOptions {
	return &options.CheckpointOptions{Exit: true, OpenTcp: true, FileLocks: true}
}

// needed are the options that one item needs.
func needed(item stack.ProbeItem) *options.CheckpointOptions {
	return &options.CheckpointOptions{
		Exit:      true,
		OpenTcp:   strings.Contains(item.Needs, "open_tcp"),
		FileLocks: strings.Contains(item.Needs, "file_locks"),
	}
}

// newProbe makes a container with all items, in a network namespace that it can
// be restored into, and starts it.
func newProbe(ctx context.Context, t *testing.T, s *stack.Stack, name string, opts ...oci.SpecOpts) *stack.Container {
	t.Helper()
	network := s.NewNetns()
	opts = append(opts, network.With(), stack.ProbeArgs("-connect", stack.EchoServer(t, network.HostAddr)))
	return startProbe(ctx, s, name, opts...)
}

// startProbe starts a probe with all items but a connection to the outside,
// unless its arguments are given.
func startProbe(ctx context.Context, s *stack.Stack, name string, opts ...oci.SpecOpts) *stack.Container {
	c := s.NewContainer(ctx, name, stack.Probe, append([]oci.SpecOpts{stack.ProbeArgs()}, opts...)...)
	c.StartProbe(ctx)
	return c
}

// TestRestoreItems restores a container for each kind of state that there is.
func TestRestoreItems(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	network := s.NewNetns()
	echo := stack.EchoServer(t, network.HostAddr)
	for _, item := range stack.ProbeItems(t) {
		// CRIU cannot do that one, but Stasis can.
		if strings.HasPrefix(item.Needs, "extra") && item.Name != "ticker" && item.Name != "pidfd" {
			continue // See TestLimits.
		}
		t.Run(item.Name, func(t *testing.T) {
			c := s.NewContainer(ctx, item.Name, stack.Probe, stack.ProbeArgs("-items", item.Name, "-connect", echo), network.With())
			c.StartProbe(ctx)
			before, err := c.ProbeErr(ctx)
			if err != nil {
				t.Fatal(err)
			}
			dir := filepath.Join(s.Dir, "checkpoints", item.Name)
			if err := c.CheckpointErr(ctx, dir, needed(item)); err != nil {
				t.Fatal(err)
			}
			if err := c.RestoreErr(ctx, dir); err != nil {
				t.Fatal(err)
			}
			// The second check sees whether what the first has done works.
			for range 2 {
				after, err := c.ProbeErr(ctx)
				if err == nil {
					err = after.Err()
				}
				if err != nil {
					t.Fatal(err)
				}
				checkSame(t, before, after)
				before = after
			}
			c.Kill(ctx, syscall.SIGKILL)
			c.Delete(ctx)
		})
	}
}

// TestRestoreEverywhere restores a container with all kinds of state at once,
// by each of the ways that a client has, on each thing that Stasis runs on.
func TestRestoreEverywhere(t *testing.T) {
	t.Parallel()
	for name, opts := range map[string]stack.Options{
		"stasis":       {},
		"drop-in":      {DropIn: true},
		"2.1":          {Version: "2.1"},
		"1.7":          {Version: "1.7"},
		"1.7, drop-in": {Version: "1.7", DropIn: true},
		"crun":         {Crun: true},
		"native":       {Snapshotter: "native"},
	} {
		t.Run(name, func(t *testing.T) {
			s := stack.Start(t, opts)
			ctx := s.Ctx()
			var c *stack.Container
			if opts.Crun {
				c = startProbe(ctx, s, "c") // It would not see our network namespaces.
			} else {
				c = newProbe(ctx, t, s, "c")
			}
			last := c.Probe(ctx)

			// By a folder (criu_image_path).
			dir := filepath.Join(s.Dir, "checkpoint")
			c.Checkpoint(ctx, dir, everything())
			c.Restore(ctx, dir)
			check := func(c *stack.Container) {
				t.Helper()
				now := c.Probe(ctx)
				checkSame(t, last, now)
				last = now
			}
			check(c)

			// By a descriptor: an image with the rw layer too.
			img := c.CheckpointImage(ctx, "stasis.test/checkpoint:1", everything())
			c.Wait(ctx)
			c.Delete(ctx)
			restored := s.RestoreImage(ctx, "restored", img)
			check(restored)
			noTemporary(t, s)

			// By a path and a tar of changes of the rootfs, as CRI did.
			if opts.Version == "1.7" {
				return // It has not heard of that.
			}
			archive := filepath.Join(s.Dir, "archive")
			restored.Checkpoint(ctx, filepath.Join(archive, "checkpoint"), everything())
			writeRootfsDiff(ctx, t, s, restored, archive)
			again := renewed(ctx, t, s, restored, "again")
			startFromPath(ctx, t, again, filepath.Join(archive, "checkpoint"))
			check(again)
			again.Kill(ctx, syscall.SIGKILL)
			again.Delete(ctx)
		})
	}
}

// TestRestoreRounds checkpoints and restores a container time and again. Its
// counter never goes back, and the processes stay what they are.
func TestRestoreRounds(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	c := newProbe(ctx, t, s, "c")
	last := c.Probe(ctx)
	for round := range 8 {
		dir := filepath.Join(s.Dir, "checkpoints", fmt.Sprint(round%3))
		c.Checkpoint(ctx, dir, everything())
		c.Restore(ctx, dir)
		now := c.Probe(ctx)
		checkSame(t, last, now)
		if t.Failed() {
			t.Fatalf("in round %d", round+1)
		}
		last = now
	}
	c.Kill(ctx, syscall.SIGKILL)
	c.Delete(ctx)
}

// TestRestoredContainer does with a restored container what can be done with
// any.
func TestRestoredContainer(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	watch := watchEvents(t, s)
	c := s.NewContainer(ctx, "c", stack.Busybox, oci.WithMemoryLimit(64<<20), oci.WithMemorySwap(64<<20), stack.Args("sh", "-c",
		`trap 'exit 3' USR1; echo up; echo "up too" >&2; while read line; do case $line in
			hog) tail /dev/zero; echo "hog: $?";;
			*) echo "got $line"; echo "err $line" >&2;;
		esac; done; echo end; sleep 1000 & wait`))
	stdin, feed := io.Pipe()
	c.Stdin = stdin
	c.Start(ctx)
	c.Stdout.WaitFor(ctx, "up\n")
	c.Stderr.WaitFor(ctx, "up too\n")
	dir := filepath.Join(s.Dir, "checkpoint")
	must := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	for round := range 3 {
		c.Checkpoint(ctx, dir, &options.CheckpointOptions{Exit: true})
		stdin, feed = io.Pipe()
		c.Stdin = stdin
		c.Stdout.Reset()
		c.Stderr.Reset()
		c.Restore(ctx, dir)

		line := fmt.Sprint("line ", round)
		_, err := fmt.Fprintln(feed, line)
		must("write to stdin", err)
		c.Stdout.WaitFor(ctx, "got "+line+"\n")
		c.Stderr.WaitFor(ctx, "err "+line+"\n")
		pids, err := c.Task.Pids(ctx)
		if err != nil || len(pids) != 1 || pids[0].Pid != c.Task.Pid() {
			t.Errorf("pids %v, %v; want %d only", pids, err, c.Task.Pid())
		}
		if m, err := c.Task.Metrics(ctx); err != nil || len(m.Data.GetValue()) == 0 {
			t.Errorf("metrics: %v, %v", m, err)
		}
		must("pause", c.Task.Pause(ctx))
		stillPaused(t, ctx, c)
		must("resume", c.Task.Resume(ctx))
		runsOn(t, ctx, c)
		if r, err := c.ExecErr(ctx, "sh", "-c", "echo there; exit 4"); err != nil || r.Code != 4 || r.Stdout != "there\n" {
			t.Errorf("exec: %+v, %v", r, err)
		}
		limit := int64(70 + round)
		must("update", c.Task.Update(ctx, client.WithResources(&specs.LinuxResources{Pids: &specs.LinuxPids{Limit: new(limit)}})))
		if got, err := readCgroup(s, "pids", "c", "pids.max"); err != nil || got != fmt.Sprint(limit) {
			t.Errorf("pids.max is %q, %v; want %d", got, err, limit)
		}
	}
	_, err := fmt.Fprintln(feed, "hog")
	must("write to stdin", err)
	c.Stdout.WaitFor(ctx, "hog: 137\n")
	watch.waitFor(ctx, "/tasks/oom", 1)
	must("close stdin", feed.Close())
	must("close stdin", c.Task.CloseIO(ctx, client.WithStdinCloser))
	c.Stdout.WaitFor(ctx, "end\n")
	if code := c.Kill(ctx, syscall.SIGUSR1); code != 3 {
		t.Errorf("exit code %d, want 3", code)
	}
	c.Delete(ctx)
	watch.waitFor(ctx, "/tasks/delete", 4)
	// Of the last task's life.
	got := topics(t, watch, "c")
	_, got, _ = strings.Cut(got[strings.LastIndex(got, "create"):], " ")
	got = strings.ReplaceAll(got, "exec-added exec-started exit ", "")
	if want := "start paused resumed oom exit delete"; got != want {
		t.Errorf("events %s, want %s", got, want)
	}
}

// TestRestoreTerminal restores a container with a terminal: it has the new
// one, in the size that the client gives it.
func TestRestoreTerminal(t *testing.T) {
	t.Parallel()
	for name, opts := range map[string]stack.Options{"runc": {}, "crun": {Crun: true}} {
		t.Run(name, func(t *testing.T) {
			s := stack.Start(t, opts)
			ctx := s.Ctx()
			c := s.NewContainer(ctx, "c", stack.Busybox, oci.WithTTY,
				stack.Args("sh", "-c", `trap 'stty size' WINCH; echo up; while read line || true; do echo "got $line"; done`))
			stdin, _ := io.Pipe()
			c.Stdin = stdin
			c.Start(ctx)
			c.Stdout.WaitFor(ctx, "up")
			dir := filepath.Join(s.Dir, "checkpoint")
			for round := range 3 {
				c.Checkpoint(ctx, dir, &options.CheckpointOptions{Exit: true})
				made, err := checkpoint.Open(ctx, dir)
				if err != nil {
					t.Fatal(err)
				}
				if r := made.Manifest().Runtime; r.Name != name || r.Version == "" {
					t.Errorf("the manifest has runtime %+v", r)
				}
				stdin, feed := io.Pipe()
				c.Stdin = stdin
				c.Stdout.Reset()
				c.Restore(ctx, dir)
				if _, err := fmt.Fprintln(feed, "line", round); err != nil {
					t.Fatal(err)
				}
				c.Stdout.WaitFor(ctx, fmt.Sprintf("got line %d\r\n", round))
				// The shell hears of it as the terminal is its own.
				if err := c.Task.Resize(ctx, 91, uint32(31+round)); err != nil {
					t.Fatal(err)
				}
				if _, err := fmt.Fprintln(feed, "wake up"); err != nil {
					t.Fatal(err)
				}
				// Not with the line's end: the terminal may show before it what it was given.
				c.Stdout.WaitFor(ctx, fmt.Sprintf("%d 91", 31+round))
				if out := c.Exec(ctx, "sh", "-c", "ls -l /proc/1/fd"); !strings.Contains(out, "/dev/pts/0") {
					t.Errorf("init's streams: %s", out)
				}
			}
			// An exec has a terminal of its own beside it.
			if out := startExec(ctx, t, c, "terminal", "tty", true)(); !strings.Contains(out, "/dev/pts/") {
				t.Errorf("exec with a terminal printed %q", out)
			}
			c.Kill(ctx, syscall.SIGKILL)
			c.Delete(ctx)
		})
	}
}

// startExec starts a shell command in a container. The function that it returns
// waits for it to end, and returns what it wrote.
func startExec(ctx context.Context, t *testing.T, c *stack.Container, id, command string, terminal bool) (wait func() string) {
	t.Helper()
	spec, err := c.Spec(ctx)
	if err != nil {
		t.Fatal(err)
	}
	process := *spec.Process
	process.Args, process.Terminal = []string{"sh", "-c", command}, terminal
	var out strings.Builder
	streams := []cio.Opt{cio.WithFIFODir(t.TempDir()), cio.WithStreams(nil, &out, io.Discard)}
	if terminal {
		streams = append(streams, cio.WithTerminal)
	}
	p, err := c.Task.Exec(ctx, id, &process, cio.NewCreator(streams...))
	if err != nil {
		t.Fatal(err)
	}
	exit, err := p.Wait(ctx)
	if err == nil {
		err = p.Start(ctx)
	}
	if err != nil {
		t.Fatal(err)
	}
	return func() string {
		t.Helper()
		<-exit
		if _, err := p.Delete(ctx); err != nil {
			t.Error(err)
		}
		return out.String()
	}
}

// TestRestoreElsewhere restores a container under another name, in another
// control group, network namespace and rootfs.
func TestRestoreElsewhere(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	here, there := s.NewNetns(), s.NewNetns()
	const items = "heap,threads,counter,tree,zombie,tmpfs,pipe,socketpair,memfd,sysv,pty,signals,eventfd,epoll,timerfd,listen"
	c := s.NewContainer(ctx, "c", stack.Probe, stack.ProbeArgs("-items", items), here.With(), oci.WithHostname("first"))
	c.StartProbe(ctx)
	before := c.Probe(ctx)
	dir := filepath.Join(s.Dir, "checkpoint")
	c.Checkpoint(ctx, dir, needed(stack.ProbeItem{}))

	other := renewed(ctx, t, s, c, "other", there.With(), oci.WithHostname("second"))
	other.Restore(ctx, dir)
	after := other.Probe(ctx)
	checkSame(t, before, after)
	link := func(pid uint32, name string) string {
		target, err := os.Readlink(fmt.Sprintf("/proc/%d/%s", pid, name))
		if err != nil {
			t.Fatal(err)
		}
		return target
	}
	var ns unix.Stat_t
	if err := unix.Stat(there.Path, &ns); err != nil {
		t.Fatal(err)
	}
	if got := link(other.Task.Pid(), "ns/net"); got != fmt.Sprintf("net:[%d]", ns.Ino) {
		t.Errorf("network namespace %s, want %d", got, ns.Ino)
	}
	groups, err := os.ReadFile(procFile(other, "cgroup"))
	if err != nil || !strings.Contains(string(groups), s.Cgroup("other")) || strings.Contains(string(groups), s.Cgroup("c")+"\n") {
		t.Errorf("control groups %s, %v; want %s", groups, err, s.Cgroup("other"))
	}
	// What it has once asked for, it goes on to have.
	if out := other.Exec(ctx, "hostname"); out != "first\n" {
		t.Errorf("the host's name is %q", out)
	}
	// Both at once, out of one checkpoint.
	c.Restore(ctx, dir)
	checkSame(t, before, c.Probe(ctx))
	checkSame(t, after, other.Probe(ctx))
	for _, c := range []*stack.Container{c, other} {
		c.Kill(ctx, syscall.SIGKILL)
		c.Delete(ctx)
	}
}

// renewed makes a container like another, with a rootfs and control group of
// its own.
func renewed(ctx context.Context, t *testing.T, s *stack.Stack, c *stack.Container, name string, opts ...oci.SpecOpts) *stack.Container {
	t.Helper()
	img, err := c.Image(ctx)
	if err != nil {
		t.Fatal(err)
	}
	spec, err := c.Spec(ctx)
	if err != nil {
		t.Fatal(err)
	}
	same := func(_ context.Context, _ oci.Client, _ *containers.Container, s *oci.Spec) error {
		path := s.Linux.CgroupsPath
		*s = *spec
		s.Linux.CgroupsPath = path
		return nil
	}
	return s.NewContainer(ctx, name, img.Name(), append([]oci.SpecOpts{same}, opts...)...)
}

// writeRootfsDiff writes what a container has changed in its rootfs as CRI's
// archives have it.
func writeRootfsDiff(ctx context.Context, t *testing.T, s *stack.Stack, c *stack.Container, dir string) {
	t.Helper()
	info, err := c.Info(ctx)
	if err != nil {
		t.Fatal(err)
	}
	cl := s.Client()
	// The diff is garbage to containerd until it is read.
	ctx, done, err := cl.WithLease(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer done(ctx)
	desc, err := rootfs.CreateDiff(ctx, info.SnapshotKey, cl.SnapshotService(info.Snapshotter), cl.DiffService())
	if err != nil {
		t.Fatal(err)
	}
	data, err := content.ReadBlob(ctx, cl.ContentStore(), desc)
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "rootfs-diff.tar"), data, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// startFromPath restores a container as CRI did, by containerd's Create alone.
func startFromPath(ctx context.Context, t *testing.T, c *stack.Container, dir string) {
	t.Helper()
	if _, err := c.Container.Restore(ctx, c.IO(ctx), dir); err != nil {
		t.Fatal(err)
	}
	c.Load(ctx)
}

// noTemporary checks that containerd's temporary copies of checkpoints get
// removed, all but those named.
func noTemporary(t *testing.T, s *stack.Stack, but ...string) {
	t.Helper()
	var left []string
	s.Poll(s.Ctx(), "removal of temporary folders", func() bool {
		entries, err := os.ReadDir(s.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		left = nil
		for _, e := range entries {
			if strings.Contains(e.Name(), "checkpoint") {
				left = append(left, e.Name())
			}
		}
		slices.Sort(left)
		return len(left) <= len(but)
	})
	if !slices.Equal(left, slices.Sorted(slices.Values(but))) {
		t.Errorf("temporary folders %v, want %v", left, but)
	}
}

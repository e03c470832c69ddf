package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/regfile"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/pkg/oci"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/integration/stack"
)

// TestPolicyAfter has the checks of names pass, and what the names mean change before
// CRIU runs: the container's volume has links to the host's files then. The restored
// processes have the host's files open, and end before they run: the program's first
// act would be to make a folder.
func TestPolicyAfter(t *testing.T) {
	t.Parallel()
	for name, opts := range map[string]stack.Options{"runc": {}, "crun": {Crun: true}} {
		t.Run(name, func(t *testing.T) { policyAfter(t, stack.Start(t, opts)) })
	}
}

func policyAfter(t *testing.T, s *stack.Stack) {
	ctx := s.Ctx()
	faults := s.Faults()
	volume, host := filepath.Join(s.Dir, "volume"), filepath.Join(s.Dir, "host")
	program, err := os.ReadFile(filepath.Join(stack.Rootfs("busybox"), "bin", "busybox"))
	must(t, err)
	for _, dir := range []string{volume, host} {
		must(t, os.MkdirAll(filepath.Join(dir, "folder"), 0o755))
		must(t, os.MkdirAll(filepath.Join(dir, "jail"), 0o755))
		must(t, os.WriteFile(filepath.Join(dir, "program"), program, 0o755)) // CRIU compares its build ID
		for _, file := range []string{"out", "library"} {
			must(t, os.WriteFile(filepath.Join(dir, file), []byte("secret\n"), 0o600))
		}
	}
	c := s.NewContainer(ctx, "c", stack.Python,
		oci.WithMounts([]specs.Mount{{Type: "bind", Source: volume, Destination: "/volume", Options: []string{"rbind", "rw"}}}),
		stack.Args("python3", "-u", "-c", `
import mmap, os, time
os.chdir("/volume/folder")
out = open("/volume/out", "a")
library = os.open("/volume/library", os.O_RDONLY)
memory = mmap.mmap(library, 0, prot=mmap.PROT_READ)
os.close(library)
program = os.fork() # CRIU cannot wait for an init whose children it holds
if program == 0:
	os.execv("/volume/program", ["sleep", "1000"])
jail = os.fork()
if jail == 0:
	os.chroot("/volume/jail")
	time.sleep(1000)
while os.readlink(f"/proc/{program}/exe") != "/volume/program" or os.readlink(f"/proc/{jail}/root") != "/volume/jail":
	time.sleep(0.01)
print("ready")
while True:
	try: # not a file that is open for a moment, and then in the checkpoint
		os.mkdir("/volume/ran")
	except FileExistsError:
		pass
	time.sleep(0.001)`))
	c.Start(ctx)
	c.Stdout.WaitFor(ctx, "ready")
	good := filepath.Join(s.Dir, "good")
	c.Checkpoint(ctx, good, &options.CheckpointOptions{Exit: true})
	ran := filepath.Join(volume, "ran")
	must(t, os.RemoveAll(ran))

	refused := func(t *testing.T, err error, want ...string) {
		t.Helper()
		if err == nil {
			t.Fatal("restored")
		}
		for _, w := range append(want, "restore container c") {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%v; want %q in it", err, w)
			}
		}
		if c.Task != nil {
			c.DeleteTask(ctx)
		}
		nothingOf(ctx, t, s, c)
		if _, err := os.Lstat(ran); !os.IsNotExist(err) {
			t.Errorf("the container has run: %v", err)
		}
		for _, file := range []string{"out", "library"} {
			if data, err := os.ReadFile(filepath.Join(host, file)); err != nil || string(data) != "secret\n" {
				t.Errorf("the host's %s is %q, %v", file, data, err)
			}
		}
	}

	for what, want := range map[string]string{
		"out": "process 1 (python3): descriptor", "library": "process 1 (python3): mapping", "folder": "process 1 (python3): working folder",
		"program": " (program): executable", "jail": " (python3): root",
	} {
		t.Run(what, func(t *testing.T) {
			faults.Hold("restore", stack.Before)
			errc := make(chan error, 1)
			go func() { errc <- c.RestoreErr(ctx, good) }()
			faults.WaitReached(ctx, "restore", stack.Before)
			// The checks before CRIU have passed.
			path := filepath.Join(volume, what)
			must(t, os.Rename(path, path+".away"))
			must(t, os.Symlink(hostRoot+filepath.Join(host, what), path))
			faults.Release("restore", stack.Before)
			err := <-errc
			must(t, os.Remove(path))
			must(t, os.Rename(path+".away", path))
			refused(t, err, want, filepath.Join(host, what), "were ended before they ran")
		})
	}

	// By name, and without what CRIU would compare. The checks before CRIU refuse that
	// too, or this one does.
	for name, path := range map[string]string{
		"name": hostRoot + filepath.Join(host, "out"),
		"link": "/volume/link" + filepath.Join(host, "out"),
	} {
		t.Run(name, func(t *testing.T) {
			must(t, os.Symlink(hostRoot, filepath.Join(volume, "link")))
			defer os.Remove(filepath.Join(volume, "link"))
			dir := filepath.Join(s.Dir, "forged-"+name)
			must(t, os.CopyFS(dir, os.DirFS(good)))
			forge(t, dir, forgery{file: "files.img", kind: &fdinfo.FileEntry{}, do: func(all []*crit.CriuEntry) []*crit.CriuEntry {
				for _, e := range all {
					if r := e.Message.(*fdinfo.FileEntry).GetReg(); r.GetName() == "/volume/out" {
						forgeFile(r, path)
					}
				}
				return all
			}})
			refused(t, c.RestoreErr(ctx, dir))
		})
	}

	c.Restore(ctx, good)
	s.Poll(ctx, "container to run", func() bool {
		_, err := os.Lstat(ran)
		return err == nil
	})
	c.Kill(ctx, unix.SIGKILL)
	c.Delete(ctx)
}

// forgeFile gives a file another path and takes away what CRIU compares.
func forgeFile(r *regfile.RegFileEntry, path string) {
	*r.Name = path
	r.Size, r.Mode, r.BuildId, r.Checksum = nil, nil, nil, nil
}

// TestRestoreUnseen checks that a container does not notice that it was held and looked
// at before it ran: no process sees a signal, or that a child has stopped or gone on.
func TestRestoreUnseen(t *testing.T) {
	t.Parallel()
	for name, opts := range map[string]stack.Options{"runc": {}, "crun": {Crun: true}} {
		t.Run(name, func(t *testing.T) {
			s := stack.Start(t, opts)
			ctx := s.Ctx()
			c := s.NewContainer(ctx, "c", stack.Python, stack.Args("python3", "-u", "-c", `
import os, signal, time
seen = []
for n in (signal.SIGCONT, signal.SIGCHLD, signal.SIGTSTP):
	signal.signal(n, lambda n, _: seen.append(n))
signal.signal(signal.SIGUSR1, lambda *_: None)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
child = os.fork()
if child == 0:
	signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCONT])
	while True:
		time.sleep(0.01)
		with open("/pending.new", "w") as f:
			f.write(str(signal.SIGCONT in signal.sigpending()))
		os.rename("/pending.new", "/pending")
print("ready")
signal.sigwait([signal.SIGUSR1])
print("seen", seen, os.waitpid(child, os.WNOHANG | os.WUNTRACED | os.WCONTINUED), open("/pending").read())
time.sleep(1000)`))
			c.Start(ctx)
			c.Stdout.WaitFor(ctx, "ready")
			dir := filepath.Join(s.Dir, "checkpoint")
			c.Checkpoint(ctx, dir, &options.CheckpointOptions{Exit: true})
			c.Restore(ctx, dir)
			c.Exec(ctx, "rm", "-f", "/pending")
			s.Poll(ctx, "child to run", func() bool {
				r, err := c.ExecErr(ctx, "cat", "/pending")
				return err == nil && r.Code == 0
			})
			must(t, c.Task.Kill(ctx, unix.SIGUSR1))
			c.Stdout.WaitFor(ctx, "seen [] (0, 0) False\n")
		})
	}
}

package integration

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/oci"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/checkpoint/sign"
	"github.com/stasis-run/stasis/integration/stack"
)

// TestCLIBrokenOutput gives every command that prints a stdout that is full, and one
// that nobody reads: both are told, and nothing is left.
func TestCLIBrokenOutput(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	registry := startRegistry(t, s, registryConfig{})
	c := counter(ctx, s, "c")
	dir := t.TempDir()
	const ref = "stasis.test/cp:1"
	remote := registry.host + "/cp:1"
	tar, oci := filepath.Join(dir, "cp.tar"), filepath.Join(dir, "oci.tar")
	s.Stasis("checkpoint", "c", ref)
	s.Stasis("export", ref, tar)
	s.Stasis("export", ref, oci, "--format", "oci")
	s.Stasis("push", ref, remote)
	pub := filepath.Join(dir, "other.pub")
	other, err := sign.Dir(filepath.Join(dir, "other")).Key()
	must(t, err)
	public, err := other.Public()
	must(t, err)
	must(t, os.WriteFile(pub, public, 0o644))
	restored := 0
	for _, line := range []string{
		"checkpoint c stasis.test/broken:1", "checkpoint c stasis.test/broken:1 -o json", "checkpoint c --output -",
		"ls", "ls -o json", "inspect " + ref, "inspect -o json " + tar, "inspect --html - " + tar, "diff " + ref + " " + tar, "diff -o json " + ref + " " + tar,
		"push " + ref + " " + remote, "pull " + remote, "export " + ref + " -", "export --format oci " + ref + " -", "export " + ref + " " + dir + "/again",
		"import " + tar, "import " + oci, "convert " + ref + " stasis.test/broken:2 --format podman", "convert --format archive " + ref + " -",
		"restore " + ref + " NAME", "restore -o json " + ref + " NAME",
		"check", "check -o json", "version", "version -o json", "prune --keep 100 -o json", "rm stasis.test/broken:1", "completion bash", "--help",
		"key init", "key show", "key list", "key list -o json", "key trust " + pub, "key remove " + other.ID,
		"verify " + ref, "verify " + tar, "verify -o json " + tar, "sign stasis.test/signed:1", "sign stasis.test/signed:1 -o json",
	} {
		for _, full := range []bool{true, false} {
			if strings.HasPrefix(line, "rm ") {
				s.Stasis("convert", ref, "stasis.test/broken:1")
			}
			if strings.HasPrefix(line, "key remove ") {
				s.Stasis("key", "trust", pub)
			}
			name := fmt.Sprintf("r%d", restored)
			restored++
			cmd := s.StasisCommand(strings.Fields(strings.ReplaceAll(line, "NAME", name))...)
			if strings.HasPrefix(line, "sign ") {
				// With another key each time, or there is nothing to do.
				s.Stasis("convert", ref, "stasis.test/signed:1")
				cmd.Env = append(cmd.Env, "STASIS_CONFIG_DIR="+filepath.Join(t.TempDir(), "keys"))
			}
			var errs strings.Builder
			cmd.Stderr = &errs
			var out *os.File
			var err error
			want := 1
			if full {
				out, err = os.OpenFile("/dev/full", os.O_WRONLY, 0)
				must(t, err)
			} else {
				want = 141
				var r *os.File
				r, out, err = os.Pipe()
				must(t, err)
				must(t, r.Close())
			}
			cmd.Stdout = out
			_ = cmd.Run()
			must(t, out.Close())
			if code := cmd.ProcessState.ExitCode(); code != want {
				t.Errorf("%s (full: %v): exit code %d, want %d: %s", line, full, code, want, errs.String())
			}
			if said := errs.String(); full && (!strings.Contains(said, "write to stdout: ") || !strings.Contains(said, "no space left on device")) {
				t.Errorf("%s: says %q", line, errs.String())
			}
			checkTidy(t, s)
			if strings.HasPrefix(line, "restore") {
				// It runs, though it could not be said.
				d := load(t, s, name)
				d.Kill(ctx, syscall.SIGKILL)
				d.Delete(ctx)
			}
		}
	}
	countsOn(t, s, c)
	// A reader that takes one line, as head does.
	cmd := s.StasisCommand("inspect", tar)
	r, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	_, err = io.ReadFull(r, make([]byte, 1))
	must(t, err)
	must(t, r.Close())
	_ = cmd.Wait()
	checkTidy(t, s)
}

// TestCLIOutputFiles exports to what is no regular file: it stays what it is.
func TestCLIOutputFiles(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	counter(s.Ctx(), s, "c")
	dir := t.TempDir()
	const ref = "stasis.test/cp:1"
	s.Stasis("checkpoint", "c", ref)
	in := func(name string) string { return filepath.Join(dir, name) }
	full := in("full") // a device of our own: were it replaced, the host's would be missed
	must(t, unix.Mknod(full, unix.S_IFCHR|0o666, int(unix.Mkdev(1, 7))))
	fifo := in("fifo")
	must(t, unix.Mkfifo(fifo, 0o600))
	must(t, os.Mkdir(in("sub"), 0o700))
	must(t, os.Symlink("sub/target", in("link")))
	node := func(path string, want fs.FileMode) {
		t.Helper()
		if info, err := os.Lstat(path); err != nil || info.Mode().Type() != want {
			t.Errorf("%s: %v, %v", path, info, err)
		}
	}
	for _, args := range [][]string{{"export", ref}, {"export", ref, "--format", "oci"}, {"convert", ref, "--format", "archive"}, {"checkpoint", "c", "--output"}} {
		to := func(path string) []string {
			if args[0] == "checkpoint" {
				return append(append([]string{}, args...), path)
			}
			return append([]string{args[0], args[1], path}, args[2:]...)
		}
		if _, err := s.StasisErr(to(full)...); err == nil || !strings.Contains(err.Error(), "no space left on device") {
			t.Errorf("%q to a full device: %v", args, err)
		}
		node(full, fs.ModeDevice|fs.ModeCharDevice)
		data := make(chan []byte)
		go func() {
			all, _ := os.ReadFile(fifo)
			data <- all
		}()
		s.Stasis(to(fifo)...)
		node(fifo, fs.ModeNamedPipe)
		got := in("got")
		must(t, os.WriteFile(got, <-data, 0o600))
		s.Stasis("import", got, "stasis.test/got:1")
		s.Stasis(to(in("link"))...)
		node(in("link"), fs.ModeSymlink)
		if info, err := os.Lstat(in("sub/target")); err != nil || info.Mode() != 0o600 {
			t.Errorf("%q through a link: %v, %v", args, info, err)
		}
		s.Stasis("import", in("sub/target"), "stasis.test/got:1")
		must(t, os.Remove(in("sub/target")))
		// stdout, by its names: the archive and nothing else.
		for _, path := range []string{"-", "/dev/stdout"} {
			must(t, os.WriteFile(got, []byte(s.Stasis(to(path)...)), 0o600))
			s.Stasis("import", got, "stasis.test/got:1")
		}
	}
	if left, _ := filepath.Glob(in(".stasis-*")); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
	checkTidy(t, s)
}

// withUmask runs a command with umask 0, under which a file has the mode that it was
// made with.
func withUmask(cmd *exec.Cmd) *exec.Cmd {
	cmd.Args = append([]string{"sh", "-c", `umask 0; exec "$0" "$@"`, cmd.Path}, cmd.Args[1:]...)
	cmd.Path = "/bin/sh"
	return cmd
}

// checkPrivate looks that nobody but root can look into a folder, nor into what is in
// it, should it be moved. It returns what is there. CRIU makes its files 0644, by the
// umask of containerd, so it is their folder that keeps them; they are 0600 before they
// leave it.
func checkPrivate(t *testing.T, dir string) (seen []string) {
	t.Helper()
	must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if os.IsNotExist(err) {
			return nil // has just been moved
		}
		must(t, err)
		if d.IsDir() && d.Name() == "rootfs" {
			return filepath.SkipDir // a copy of the container's files, with their modes
		}
		info, err := d.Info()
		if err != nil {
			return nil
		}
		want := fs.FileMode(0o600)
		if d.IsDir() {
			want = 0o700
		}
		if filepath.Base(filepath.Dir(path)) == layout.Partial && !d.IsDir() {
			want |= 0o044
		}
		if info.Mode().Perm()&^want != 0 {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
		seen = append(seen, path)
		return nil
	}))
	return seen
}

// halfway feeds a command one half of a file on stdin (or on descriptor 3), waits until
// it has unpacked some, and returns what gives it the rest.
func halfway(t *testing.T, s *stack.Stack, cmd *exec.Cmd, extra bool, file, dir string) (rest func()) {
	t.Helper()
	data, err := os.ReadFile(file)
	must(t, err)
	r, w, err := os.Pipe()
	must(t, err)
	if cmd.Stdin = r; extra {
		cmd.Stdin, cmd.ExtraFiles = nil, []*os.File{r}
	}
	must(t, cmd.Start())
	must(t, r.Close())
	// In the midst of its content, and beyond what import looks at first.
	half := max(bytes.Index(data, []byte("checkpoint/pages-1.img"))+512+100, 66<<10)
	if half >= len(data) {
		t.Fatalf("the archive has %d bytes only", len(data))
	}
	_, err = w.Write(data[:half])
	must(t, err)
	s.Poll(s.Ctx(), "the command to unpack", func() bool {
		found, _ := filepath.Glob(filepath.Join(dir, "*", "checkpoint", "pages-1.img"))
		more, _ := filepath.Glob(filepath.Join(dir, "*", "*", "checkpoint", "pages-1.img"))
		return len(found)+len(more) > 0
	})
	return func() {
		_, _ = w.Write(data[half:])
		must(t, w.Close())
	}
}

// TestCLISignals ends a command that waits for its input: it cleans up.
func TestCLISignals(t *testing.T) {
	s := stack.Start(t, stack.Options{})
	counter(s.Ctx(), s, "c")
	file := filepath.Join(t.TempDir(), "c.tar")
	s.Stasis("checkpoint", "c", "--output", file, "--compress", "none")
	for _, sig := range []syscall.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGHUP} {
		cmd := s.StasisCommand("import", "-", "stasis.test/x:1")
		var errs strings.Builder
		cmd.Stderr = &errs
		rest := halfway(t, s, cmd, false, file, filepath.Join(s.Dir, "stasis", "work"))
		must(t, cmd.Process.Signal(sig))
		_ = cmd.Wait()
		rest()
		if code := cmd.ProcessState.ExitCode(); code != 130 || !strings.Contains(errs.String(), "interrupted") {
			t.Errorf("%v: exit code %d, %q", sig, code, errs.String())
		}
		checkTidy(t, s)
		checkNone(t, s, "stasis.test/x:1")
	}
	// Who is started by nohup does not end.
	cmd := s.StasisCommand("import", "-", "stasis.test/x:1")
	cmd.Args = append([]string{"sh", "-c", `trap "" HUP; exec "$0" "$@"`, cmd.Path}, cmd.Args[1:]...)
	cmd.Path = "/bin/sh"
	rest := halfway(t, s, cmd, false, file, filepath.Join(s.Dir, "stasis", "work"))
	must(t, cmd.Process.Signal(unix.SIGHUP))
	rest()
	must(t, cmd.Wait())
	s.Stasis("inspect", "stasis.test/x:1")
}

// TestCLIPrivate looks at what commands make, while they make it, with umask 0: no
// file of a checkpoint is for others, and no secret of its memory is in an argument or
// a log.
func TestCLIPrivate(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx, cancel := context.WithCancel(s.Ctx())
	defer cancel()
	f := s.Faults()
	const secret = "cumbersome-password"
	c := s.NewContainer(ctx, "c", stack.Busybox, stack.Args("sh", "-c", counting), oci.WithEnv([]string{"SECRET=" + secret}))
	c.Start(ctx)
	counts(s, c)
	found := make(chan string, 1)
	go func() {
		for ; ctx.Err() == nil; time.Sleep(time.Millisecond) {
			all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
			for _, path := range all {
				if data, _ := os.ReadFile(path); bytes.Contains(data, []byte(secret)) {
					select {
					case found <- string(data):
					default:
					}
				}
			}
		}
	}()

	file := filepath.Join(s.Dir, "files", "c.tar")
	must(t, os.Mkdir(filepath.Dir(file), 0o777))
	must(t, os.Chmod(filepath.Dir(file), 0o700))
	f.Hold("checkpoint", stack.After)
	cmd := withUmask(s.StasisCommand("checkpoint", "c", "--output", file, "--compress", "none"))
	cmd.Stderr = os.Stderr
	must(t, cmd.Start())
	f.WaitReached(ctx, "checkpoint", stack.After)
	state := filepath.Join(s.Dir, "stasis")
	if seen := checkPrivate(t, state); !strings.Contains(strings.Join(seen, "\n"), "pages-1.img") {
		t.Errorf("while a checkpoint is made there are %q", seen)
	}
	f.Release("checkpoint", stack.After)
	must(t, cmd.Wait())
	checkPrivate(t, filepath.Dir(file))

	for name, tc := range map[string]struct {
		args  []string
		extra bool
		dir   string // where it unpacks
	}{
		"import":  {[]string{"import", "-", "stasis.test/x:1"}, false, filepath.Join(state, "work")},
		"inspect": {[]string{"inspect", "/dev/stdin"}, false, filepath.Join(state, "work")},
		"stage":   {[]string{"stage", "--container", "c", "--archive", "--", filepath.Join(s.Dir, "staged", "dir")}, true, filepath.Join(s.Dir, "staged")},
	} {
		t.Run(name, func(t *testing.T) {
			must(t, os.MkdirAll(tc.dir, 0o700))
			cmd := withUmask(s.StasisCommand(tc.args...))
			var errs strings.Builder
			cmd.Stderr = &errs
			rest := halfway(t, s, cmd, tc.extra, file, tc.dir)
			checkPrivate(t, tc.dir)
			rest()
			if err := cmd.Wait(); err != nil {
				t.Errorf("%v: %s", err, errs.String())
			}
			checkPrivate(t, tc.dir)
		})
	}
	s.Stasis("restore", file, "d")
	d := load(t, s, "d")
	countsOn(t, s, d)
	d.Kill(ctx, syscall.SIGKILL)
	d.Delete(ctx)
	select {
	case args := <-found:
		t.Errorf("in the arguments of a process: %q", args)
	default:
	}
	logs, err := filepath.Glob(filepath.Join(s.Dir, "*.log"))
	must(t, err)
	for _, path := range logs {
		if data, err := os.ReadFile(path); err != nil || bytes.Contains(data, []byte(secret)) {
			t.Errorf("%s: %v, or a secret of the container's is in it", path, err)
		}
	}
	if strings.Contains(s.Logs(), secret) {
		t.Error("a secret of the container's is in a log")
	}
}

// TestCLIAttachHungUp attaches a container to what nobody reads: the command ends, and
// the container runs on.
func TestCLIAttachHungUp(t *testing.T) {
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	c := s.NewContainer(ctx, "c", stack.Busybox, stack.Args("sh", "-c", "while :; do echo line; sleep 0.1; done"))
	c.Start(ctx)
	c.Stdout.WaitFor(ctx, "line\n")
	ref := strings.TrimSpace(s.Stasis("checkpoint", "c"))
	cmd := s.StasisCommand("restore", ref, "d", "--attach")
	r, w, err := os.Pipe()
	must(t, err)
	must(t, r.Close())
	cmd.Stdout = w
	_ = cmd.Run()
	must(t, w.Close())
	if code := cmd.ProcessState.ExitCode(); code != 141 {
		t.Errorf("exit code %d", code)
	}
	d := load(t, s, "d")
	runsOn(t, ctx, d)
	d.Kill(ctx, syscall.SIGKILL)
	d.Delete(ctx)
	checkTidy(t, s)
}

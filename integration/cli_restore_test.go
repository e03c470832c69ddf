package integration

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/containerd/console"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/oci"

	"github.com/stasis-run/stasis/integration/stack"
)

// syncBuffer is a buffer that is read while a process writes to it.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// TestCLIRestore looks at what `stasis restore` can be asked for, and at what it
// refuses without leaving anything.
func TestCLIRestore(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	c := s.NewContainer(ctx, "c", stack.Busybox, stack.Args("sh", "-c", "trap 'exit 3' INT; i=0; while :; do i=$((i+1)); echo line $i; sleep 0.1; done"))
	c.Start(ctx)
	c.Stdout.WaitFor(ctx, "line 2\n")
	ref := strings.TrimSpace(s.Stasis("checkpoint", "c", "--exit"))
	c.Wait(ctx)
	c.DeleteTask(ctx)

	restored := func(t *testing.T, id string) *stack.Container {
		t.Helper()
		container, err := s.Client().LoadContainer(ctx, id)
		must(t, err)
		d := s.Wrap(container)
		d.Load(ctx)
		return d
	}
	end := func(t *testing.T, id string) {
		t.Helper()
		container, err := s.Client().LoadContainer(ctx, id)
		must(t, err)
		task, err := container.Task(ctx, nil)
		must(t, err)
		_, err = task.Delete(ctx, client.WithProcessKill)
		must(t, err)
		must(t, container.Delete(ctx, client.WithSnapshotCleanup))
	}

	t.Run("attach", func(t *testing.T) {
		cmd := s.StasisCommand("restore", ref, "attached", "--attach")
		var out, errs syncBuffer
		cmd.Stdout, cmd.Stderr = &out, &errs
		must(t, cmd.Start())
		s.Poll(ctx, "output", func() bool { return strings.Count(out.String(), "line ") > 2 })
		if strings.Contains(out.String(), "line 1\n") {
			t.Errorf("it begins anew: %q", out.String())
		}
		d := restored(t, "attached")
		// Beside the old one's, and made by who made that.
		spec, err := d.Spec(ctx)
		must(t, err)
		want := s.CgroupPath("attached")
		if slice, _, systemd := strings.Cut(want, ":"); systemd {
			want = slice + ":stasis-" + s.Namespace + ":attached" // the parent is granted, the scope is named here
		}
		if spec.Linux.CgroupsPath != want {
			t.Errorf("its control group is %s, want %s", spec.Linux.CgroupsPath, want)
		}
		must(t, d.Task.Kill(ctx, syscall.SIGKILL))
		err = cmd.Wait()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 137 {
			t.Errorf("%v, want the container's exit code, 137; %s", err, errs.String())
		}
		d.Task = nil
		d.Delete(ctx)
	})
	t.Run("signal", func(t *testing.T) {
		cmd := s.StasisCommand("restore", ref, "signalled", "--attach")
		var out, errs syncBuffer
		cmd.Stdout, cmd.Stderr = &out, &errs
		must(t, cmd.Start())
		s.Poll(ctx, "output", func() bool { return strings.Contains(out.String(), "line ") })
		// It may come while stasis does not know yet that all is restored, and
		// undoes the restore; or it goes to the shell, which has a trap.
		must(t, cmd.Process.Signal(os.Interrupt))
		err := cmd.Wait()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 3 && exit.ExitCode() != 130 {
			t.Fatalf("%v, want exit code 3 of the trap: %s", err, errs.String())
		}
		container, err := s.Client().LoadContainer(ctx, "signalled")
		if exit.ExitCode() == 130 {
			if err == nil {
				t.Errorf("interrupted, and the container is there: %s", errs.String())
			}
			return
		}
		must(t, err)
		must(t, container.Delete(ctx, client.WithSnapshotCleanup))
	})
	t.Run("healthy", func(t *testing.T) {
		log := filepath.Join(s.Dir, "log")
		s.Stasis("restore", ref, "healthy", "--wait-healthy", "test -e /proc/1/fd", "--log-uri", "file://"+log)
		s.Poll(ctx, "the log", func() bool {
			data, _ := os.ReadFile(log)
			return bytes.Contains(data, []byte("line "))
		})
		end(t, "healthy")
		must(t, os.Remove(log))
	})
	t.Run("not healthy", func(t *testing.T) {
		_, err := s.StasisErr("restore", ref, "ill", "--wait-healthy", "echo not yet; exit 3", "--wait-timeout", "10s")
		if err == nil || !strings.Contains(err.Error(), "exit code 3: not yet") || !strings.Contains(err.Error(), "runs") {
			t.Errorf("error %v", err)
		}
		end(t, "ill") // it was told that it runs
	})
	t.Run("json", func(t *testing.T) {
		out := s.Stasis("restore", ref, "j", "-o", "json")
		if !strings.Contains(out, `"container": "j"`) {
			t.Errorf("printed %s", out)
		}
		end(t, "j")
	})
	for name, tc := range map[string]struct {
		args []string
		code int
		says string
	}{
		"name is taken":    {[]string{ref, "c"}, 1, "another NAME"},
		"the same name":    {[]string{ref}, 1, "another NAME"},
		"bad name":         {[]string{ref, "a/b"}, 2, "NAME"},
		"no such image":    {[]string{"localhost/none:1"}, 1, "stasis ls"},
		"no such file":     {[]string{"./none.tar"}, 1, "no such file"},
		"no checkpoint":    {[]string{stack.Busybox}, 1, "no checkpoint"},
		"a folder":         {[]string{s.Dir}, 1, "folder"},
		"unknown network":  {[]string{ref, "x", "--network", "bridge"}, 2, "--network"},
		"missing argument": {nil, 2, "arg"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := s.StasisErr(append([]string{"restore"}, tc.args...)...)
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != tc.code || !strings.Contains(err.Error(), tc.says) {
				t.Errorf("error %v, want exit code %d and %q", err, tc.code, tc.says)
			}
		})
	}
	containers, err := s.Client().Containers(ctx)
	must(t, err)
	if len(containers) != 1 {
		t.Errorf("%d containers, want the first one only", len(containers))
	}
	c.Delete(ctx)
}

// TestCLIAttachTerminal restores a shell at a terminal, and types.
func TestCLIAttachTerminal(t *testing.T) {
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	c := s.NewContainer(ctx, "c", stack.Busybox, oci.WithTTY, stack.Args("sh"))
	c.Start(ctx)
	ref := strings.TrimSpace(s.Stasis("checkpoint", "c", "--exit"))
	c.Wait(ctx)
	c.Delete(ctx)

	pty, slave, err := console.NewPty()
	must(t, err)
	defer pty.Close()
	must(t, pty.Resize(console.WinSize{Width: 77, Height: 33}))
	tty, err := os.OpenFile(slave, os.O_RDWR, 0)
	must(t, err)
	defer tty.Close()
	cmd := s.StasisCommand("restore", ref, "--attach")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	must(t, cmd.Start())
	var out syncBuffer
	read := make(chan struct{})
	go func() {
		defer close(read)
		_, _ = io.Copy(&out, pty) // ends with the terminal
	}()
	typed := func(line, want string) {
		t.Helper()
		_, err := pty.Write([]byte(line + "\n"))
		must(t, err)
		s.Poll(ctx, "the answer to "+line, func() bool { return strings.Contains(out.String(), want) })
	}
	typed("echo $((6*7))", "42")
	// The size comes after the start. Each question waits for the answer to the one
	// before, or a slow shell would be left with thousands.
	for i := 1; i < 1000 && !strings.Contains(out.String(), "33 77"); i++ {
		typed(fmt.Sprintf("stty size; echo $((%d+5000))", i), fmt.Sprint(i+5000))
	}
	if !strings.Contains(out.String(), "33 77") {
		t.Errorf("the terminal has another size: %q", out.String())
	}
	_, err = pty.Write([]byte("exit 5\n"))
	must(t, err)
	err = cmd.Wait()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 5 {
		t.Errorf("%v, want exit code 5; %q", err, out.String())
	}
	tty.Close()
	<-read
	container, err := s.Client().LoadContainer(ctx, "c")
	must(t, err)
	must(t, container.Delete(ctx, client.WithSnapshotCleanup))
}

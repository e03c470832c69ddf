package integration

import (
	"bytes"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/oci"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/integration/stack"
)

// TestStdin checks that a process sees the end of its input when the client
// says so.
func TestStdin(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	c := s.NewContainer(ctx, "c", stack.Busybox, stack.Args("sh", "-c", "cat; echo end"))
	r, w := io.Pipe()
	c.Stdin = r
	c.Start(ctx)
	fmt.Fprintln(w, "in")
	c.Stdout.WaitFor(ctx, "in\n")
	w.Close()
	if err := c.Task.CloseIO(ctx, client.WithStdinCloser); err != nil {
		t.Fatal(err)
	}
	if code := c.Wait(ctx); code != 0 {
		t.Errorf("exit code %d, want 0", code)
	}
	c.DeleteTask(ctx)
	if got := c.Stdout.String(); got != "in\nend\n" {
		t.Errorf("stdout %q", got)
	}
}

// TestReattach checks that a client which goes away is no end of input, and that
// what is written meanwhile waits for the next one.
func TestReattach(t *testing.T) {
	t.Parallel()
	sh := startShim(t, stack.Options{})
	r := sh.createRequest("c", stack.Args("sh", "-c", "while read line; do echo $line; done; echo end"))
	r.Stdin, r.Stdout = filepath.Join(sh.s.Dir, "in"), filepath.Join(sh.s.Dir, "out")
	for _, path := range []string{r.Stdin, r.Stdout} {
		sh.must("mkfifo", unix.Mkfifo(path, 0o600))
	}
	open := func(path string, flags int) *os.File {
		f, err := os.OpenFile(path, flags, 0)
		sh.must("open "+path, err)
		return f
	}
	read := func(f *os.File, want string) {
		t.Helper()
		got := make([]byte, len(want))
		if _, err := io.ReadFull(f, got); err != nil || string(got) != want {
			t.Fatalf("read %q, %v; want %q", got, err, want)
		}
	}
	// The shim waits for a reader.
	out := open(r.Stdout, os.O_RDWR)
	sh.deleteAfter("c")
	_, err := sh.Create(sh.ctx, r)
	sh.must("create", err)
	_, err = sh.Start(sh.ctx, &taskapi.StartRequest{ID: "c"})
	sh.must("start", err)

	in := open(r.Stdin, os.O_WRONLY)
	fmt.Fprintln(in, "one")
	read(out, "one\n")
	fmt.Fprintln(in, "meanwhile")
	in.Close()
	out.Close()

	in, out = open(r.Stdin, os.O_WRONLY), open(r.Stdout, os.O_RDONLY)
	read(out, "meanwhile\n")
	fmt.Fprintln(in, "two")
	read(out, "two\n")
	_, err = sh.CloseIO(sh.ctx, &taskapi.CloseIORequest{ID: "c", Stdin: true})
	sh.must("close io", err)
	fmt.Fprintln(in, "three")
	read(out, "three\n")
	in.Close()
	read(out, "end\n")
	out.Close()
}

// TestBigOutput checks that much output arrives whole, though the process is gone
// when most of it is read, from init and an exec side by side.
func TestBigOutput(t *testing.T) {
	const line, size = "0123456789abcde\n", 64 << 20
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	c := s.NewContainer(ctx, "c", stack.Busybox, stack.Args("sh", "-c", fmt.Sprintf("yes 0123456789abcde | head -c %d; read line", size)))
	r, w := io.Pipe()
	c.Stdin = r
	c.Start(ctx)
	for name, out := range map[string]string{
		"exec": c.Exec(ctx, "sh", "-c", fmt.Sprintf("yes 0123456789abcde | head -c %d", size)),
		"init": func() string {
			fmt.Fprintln(w)
			c.Wait(ctx)
			c.DeleteTask(ctx)
			return c.Stdout.String()
		}(),
	} {
		if len(out) != size || !bytes.Equal([]byte(out), bytes.Repeat([]byte(line), size/len(line))) {
			t.Errorf("%s: %d bytes, want %d of the same line", name, len(out), size)
		}
	}
}

// TestShortLivedOutput checks that the output of a process which ends at once
// arrives: the shim must not be done with it before the client begins.
func TestShortLivedOutput(t *testing.T) {
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	c := s.NewContainer(ctx, "c", stack.Busybox, stack.Args("sleep", "1000"))
	c.Start(ctx)
	for i := range 20 {
		if out := c.Exec(ctx, "echo", "there"); out != "there\n" {
			t.Fatalf("exec %d printed %q", i, out)
		}
	}
}

// TestLogURIs checks the ways to log that need no client: a file, and a program
// of either protocol.
func TestLogURIs(t *testing.T) {
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	for scheme, ready := range map[string]string{"file": "", "binary": "", "binary-v2": "printf r >&5"} {
		for _, terminal := range []bool{false, true} {
			if scheme == "file" && terminal {
				continue // upstream's shim has it not, nor do clients make it
			}
			t.Run(fmt.Sprintf("%s, terminal %v", scheme, terminal), func(t *testing.T) {
				log := filepath.Join(t.TempDir(), "logs", "log")
				uri := &url.URL{Scheme: scheme, Path: log}
				if scheme != "file" {
					uri.Path = logger(t, ready)
					uri.RawQuery = "file=" + log
				}
				opts := []oci.SpecOpts{stack.Args("sh", "-c", "echo out; echo err >&2")}
				if terminal {
					opts = append(opts, oci.WithTTY)
				}
				c := s.NewContainer(ctx, "c", stack.Busybox, opts...)
				task, err := c.NewTask(ctx, func(id string) (cio.IO, error) {
					log, err := cio.LogURI(uri)(id)
					return logIO{log, terminal}, err
				})
				if err != nil {
					t.Fatal(err)
				}
				c.Task = task
				exited, err := task.Wait(ctx)
				if err == nil {
					err = task.Start(ctx)
				}
				if err != nil {
					t.Fatal(err)
				}
				if status := <-exited; status.ExitCode() != 0 {
					t.Errorf("exit %+v", status)
				}
				c.Delete(ctx)
				data, err := os.ReadFile(log)
				if err != nil {
					t.Fatal(err)
				}
				got := strings.Fields(string(data))
				want := []string{"c", "out", "err"}
				if scheme == "file" {
					// It has both streams, in no order.
					slices.Sort(got)
					want = []string{"err", "out"}
				}
				if !slices.Equal(got, want) {
					t.Errorf("logged %q, want %q", data, want)
				}
			})
		}
	}
}

// logIO is where a process logs, with or without a terminal.
type logIO struct {
	cio.IO
	terminal bool
}

func (l logIO) Config() cio.Config {
	c := l.IO.Config()
	c.Terminal = l.terminal
	return c
}

// logger makes a logging program that writes the container's ID and both
// streams, one after the other, to the file that its arguments name.
func logger(t *testing.T, ready string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "logger")
	script := "#!/bin/sh\ntrap '' TERM\n" + ready + "\nexec 5>&-\n" +
		"mkdir -p ${2%/*}\n{ printf \"$CONTAINER_ID \"; cat <&3; cat <&4; } > $2\n"
	if err := os.WriteFile(path, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestTerminal talks to a shell on a terminal whose size changes, as init and as
// exec.
func TestTerminal(t *testing.T) {
	t.Parallel()
	for name, opts := range map[string]stack.Options{"runc": {}, "crun": {Crun: true}, "1.7": {Version: "1.7", DropIn: true}} {
		t.Run(name, func(t *testing.T) {
			s := stack.Start(t, opts)
			ctx := s.Ctx()
			c := s.NewContainer(ctx, "c", stack.Busybox, oci.WithTTY, stack.Args("sh"))
			r, w := io.Pipe()
			c.Stdin = r
			c.Start(ctx)
			if err := c.Task.Resize(ctx, 100, 30); err != nil {
				t.Fatal(err)
			}
			fmt.Fprintln(w, "test -t 0 && test -t 2 && stty size")
			c.Stdout.WaitFor(ctx, "30 100")

			spec, err := c.Spec(ctx)
			if err != nil {
				t.Fatal(err)
			}
			p := *spec.Process
			p.ConsoleSize = &specs.Box{Width: 90, Height: 20}
			out := s.Wrap(c.Container).Stdout
			er, ew := io.Pipe()
			exec, err := c.Task.Exec(ctx, "e", &p, cio.NewCreator(cio.WithFIFODir(filepath.Join(s.Dir, "fifo")), cio.WithStreams(er, out, nil), cio.WithTerminal))
			if err != nil {
				t.Fatal(err)
			}
			exited, err := exec.Wait(ctx)
			if err == nil {
				err = exec.Start(ctx)
			}
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprintln(ew, "stty size")
			out.WaitFor(ctx, "20 90")
			if err := exec.Resize(ctx, 120, 40); err != nil {
				t.Fatal(err)
			}
			fmt.Fprintln(ew, "stty size; exit 6")
			out.WaitFor(ctx, "40 120")
			if status := <-exited; status.ExitCode() != 6 {
				t.Errorf("exec: exit %+v, want code 6", status)
			}
			if _, err := exec.Delete(ctx); err != nil {
				t.Error(err)
			}
			fmt.Fprintln(w, "exit 5")
			if code := c.Wait(ctx); code != 5 {
				t.Errorf("exit code %d, want 5", code)
			}
			c.Delete(ctx)
		})
	}
}

package process

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// ioConfig is what the tests' processes run with.
func ioConfig() IOConfig {
	return IOConfig{ID: "c", Namespace: "ns", Reaper: reaper()}
}

func mkfifo(t *testing.T, name string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// runWithIO runs a shell script on stdio, as the runtime would start it, and
// returns when its output has been passed on.
func runWithIO(t *testing.T, script string, stdio Stdio, meanwhile func(*IO)) {
	t.Helper()
	pio, err := OpenIO(context.Background(), stdio, ioConfig())
	if err != nil {
		t.Fatal(err)
	}
	defer pio.Close()
	cmd := shell(script)
	pio.Pipes().Set(cmd)
	child, err := reaper().Command(cmd)
	if err != nil {
		t.Fatal(err)
	}
	if c, ok := pio.Pipes().(interface{ CloseAfterStart() error }); ok {
		if err := c.CloseAfterStart(); err != nil {
			t.Fatal(err)
		}
	}
	if err := pio.Attach(context.Background()); err != nil {
		t.Fatal(err)
	}
	if meanwhile != nil {
		meanwhile(pio)
	}
	wait(t, child)
	if err := pio.Drain(context.Background()); err != nil {
		t.Fatal(err)
	}
}

// readAll reads a FIFO to its end.
func readAll(t *testing.T, path string) <-chan string {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	// As long as nobody writes, a read is an end of file; so hold it open
	// until the shim has.
	hold, err := os.OpenFile(path, os.O_WRONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	out := make(chan string, 1)
	go func() {
		defer f.Close()
		var b bytes.Buffer
		buf := make([]byte, 1024)
		for {
			n, err := f.Read(buf)
			b.Write(buf[:n])
			if n > 0 && hold != nil {
				hold.Close()
				hold = nil
			}
			if err != nil {
				break
			}
		}
		out <- b.String()
	}()
	return out
}

func TestFIFOs(t *testing.T) {
	in, out, errs := mkfifo(t, "in"), mkfifo(t, "out"), mkfifo(t, "err")
	stdout, stderr := readAll(t, out), readAll(t, errs)
	runWithIO(t, "cat; echo oops >&2", Stdio{Stdin: in, Stdout: out, Stderr: errs}, func(pio *IO) {
		// Two clients, one after the other: the first one's end is no end
		// of file, CloseStdin is.
		for _, s := range []string{"hello ", "world\n"} {
			client, err := os.OpenFile(in, os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			io.WriteString(client, s)
			client.Close()
		}
		if err := pio.CloseStdin(); err != nil {
			t.Error(err)
		}
		if err := pio.CloseStdin(); err != nil {
			t.Error("the second CloseStdin:", err)
		}
	})
	if got := <-stdout; got != "hello world\n" {
		t.Errorf("stdout %q", got)
	}
	if got := <-stderr; got != "oops\n" {
		t.Errorf("stderr %q", got)
	}
}

func TestFileOutput(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a", "b", "log")
	// Many times, with a stdout that ends at once: its copier is done before
	// that of stderr, which goes to the same file, has begun.
	const times = 100
	for range times {
		runWithIO(t, "echo one; exec >&-; echo two >&2", Stdio{Stdout: "file://" + path, Stderr: "file://" + path}, nil)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{"one\n", "two\n"} {
		if n := strings.Count(string(data), line); n != times {
			t.Errorf("the log has %q %d times, not %d", line, n, times)
		}
	}
}

func TestNoOutput(t *testing.T) {
	runWithIO(t, "echo one; echo two >&2", Stdio{}, nil)
}

// logBinary writes a logging binary that stores what it gets beside itself.
func logBinary(t *testing.T, ready string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "logger")
	script := "#!/bin/sh\ntrap '' TERM\n" + ready + "\nexec 5>&-\n" +
		"{ echo \"$CONTAINER_NAMESPACE/$CONTAINER_ID $*\"; cat <&3; cat <&4; } > \"$0.out\"\n"
	if err := os.WriteFile(path, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestLoggingBinary(t *testing.T) {
	for scheme, ready := range map[string]string{"binary": ":", "binary-v2": "printf r >&5"} {
		path := logBinary(t, ready)
		runWithIO(t, "echo one; echo two >&2", Stdio{Stdout: scheme + "://" + path + "?key=value"}, nil)
		// runWithIO has closed the streams, which waits for the binary.
		data, err := os.ReadFile(path + ".out")
		if err != nil {
			t.Fatal(err)
		}
		if got, want := string(data), "ns/c key value\none\ntwo\n"; got != want {
			t.Errorf("%s: %q, want %q", scheme, got, want)
		}
	}
}

func TestLoggingBinaryThatFails(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for name, stdout := range map[string]string{
		"missing":   "binary:///does/not/exist",
		"not ready": "binary-v2://" + logBinary(t, ":"),
	} {
		if _, err := OpenIO(ctx, Stdio{Stdout: stdout}, ioConfig()); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestBadStdio(t *testing.T) {
	for _, stdout := range []string{"http://host/", "%zz"} {
		_, err := OpenIO(context.Background(), Stdio{Stdout: stdout}, ioConfig())
		if err == nil || !strings.Contains(err.Error(), "stdout") {
			t.Errorf("%q: error %v, want one that names stdout", stdout, err)
		}
	}
}

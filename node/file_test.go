package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func write(text string) func(io.Writer) error {
	return func(w io.Writer) error { _, err := io.WriteString(w, text); return err }
}

// A regular file is replaced when all is written, anything else is written to.
func TestWriteFile(t *testing.T) {
	old := unix.Umask(0)
	defer unix.Umask(old)
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	content := func(name, want string) {
		t.Helper()
		if data, err := os.ReadFile(in(name)); err != nil || string(data) != want {
			t.Errorf("%s: %q, %v; want %q", name, data, err, want)
		}
	}
	isLink := func(name string) {
		t.Helper()
		if info, err := os.Lstat(in(name)); err != nil || info.Mode()&os.ModeSymlink == 0 {
			t.Errorf("%s is no link any more: %v, %v", name, info, err)
		}
	}
	must0(t, WriteFile(t.Context(), in("new"), func(w io.Writer) error {
		made, err := filepath.Glob(in(".stasis-*"))
		must0(t, err)
		if info, err := os.Stat(made[0]); err != nil || info.Mode() != 0o600 {
			t.Errorf("%v, %v", info, err)
		}
		return write("one")(w)
	}))
	content("new", "one")
	must0(t, os.Chmod(in("new"), 0o644))
	must0(t, WriteFile(t.Context(), in("new"), write("two")))
	content("new", "two")
	if info, err := os.Stat(in("new")); err != nil || info.Mode() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	boom := errors.New("boom")
	if err := WriteFile(t.Context(), in("new"), func(w io.Writer) error { io.WriteString(w, "x"); return boom }); !errors.Is(err, boom) {
		t.Errorf("%v", err)
	}
	content("new", "two")

	must0(t, os.Mkdir(in("sub"), 0o700))
	must0(t, os.Symlink("sub/target", in("link")))
	must0(t, os.Symlink("link", in("link2")))
	for _, text := range []string{"dangling", "there"} {
		must0(t, WriteFile(t.Context(), in("link2"), write(text)))
		content("sub/target", text)
		isLink("link")
		isLink("link2")
	}
	must0(t, os.Symlink("loop", in("loop")))
	if err := WriteFile(t.Context(), in("loop"), write("x")); !errors.Is(err, unix.ELOOP) {
		t.Errorf("a loop: %v", err)
	}
	if err := WriteFile(t.Context(), in("sub"), write("x")); !errors.Is(err, unix.EISDIR) {
		t.Errorf("a folder: %v", err)
	}

	must0(t, unix.Mkfifo(in("fifo"), 0o600))
	read := make(chan string)
	go func() {
		data, _ := os.ReadFile(in("fifo"))
		read <- string(data)
	}()
	must0(t, WriteFile(t.Context(), in("fifo"), write("through")))
	if got := <-read; got != "through" {
		t.Errorf("a FIFO gave %q", got)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := WriteFile(ctx, in("fifo"), write("x")); !errors.Is(err, context.Canceled) {
		t.Errorf("a FIFO that nobody reads: %v", err)
	}
	if info, err := os.Lstat(in("fifo")); err != nil || info.Mode()&os.ModeNamedPipe == 0 {
		t.Errorf("%v, %v", info, err)
	}

	must0(t, os.Symlink("/dev/full", in("full")))
	for _, path := range []string{"/dev/full", in("full")} {
		if err := WriteFile(t.Context(), path, write("x")); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("%s: %v", path, err)
		}
	}
	if info, err := os.Lstat("/dev/full"); err != nil || info.Mode()&os.ModeCharDevice == 0 {
		t.Errorf("/dev/full: %v, %v", info, err)
	}
	// An open file is written, and not replaced.
	f, err := os.OpenFile(in("open"), os.O_CREATE|os.O_RDWR, 0o600)
	must0(t, err)
	defer f.Close()
	must0(t, WriteFile(t.Context(), fmt.Sprintf("/proc/self/fd/%d", f.Fd()), write("by descriptor")))
	if got, err := io.ReadAll(f); err != nil || string(got) != "by descriptor" {
		t.Errorf("%q, %v", got, err)
	}
	if left, _ := filepath.Glob(in(".stasis-*")); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// A reader of what never comes ends with the context.
func TestInterruptedInput(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "fifo")
	must0(t, unix.Mkfifo(fifo, 0o600))
	hold, err := os.OpenFile(fifo, os.O_RDWR, 0) // a writer, so that opening succeeds
	must0(t, err)
	defer hold.Close()
	r, w := io.Pipe()
	defer w.Close()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for _, path := range []string{fifo, "-"} {
		var f io.ReadCloser
		if path == "-" {
			f = interruptible(ctx, io.NopCloser(r))
		} else {
			f, err = openInput(ctx, path)
			must0(t, err)
		}
		read := make(chan error)
		go func() {
			_, err := f.Read(make([]byte, 10))
			read <- err
		}()
		if path == "-" {
			cancel()
			if err := <-read; !errors.Is(err, context.Canceled) {
				t.Errorf("%s: %v", path, err)
			}
		} else {
			_, err := hold.Write([]byte("x"))
			must0(t, err)
			must0(t, <-read)
		}
		must0(t, f.Close())
	}
	must0(t, hold.Close())
	if _, err := openInput(ctx, fifo); !errors.Is(err, context.Canceled) {
		t.Errorf("a FIFO that nobody writes: %v", err)
	}
}

package node

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestSumMappings(t *testing.T) {
	mapping := func(head, flags string, fields ...string) string {
		return head + "\nSize:                8 kB\n" + strings.Join(fields, "\n") + "\nVmFlags: " + flags + "\n"
	}
	const private, shared = "7f0000000000-7f0000002000 rw-p 00000000 00:00 0 ", "7f0000000000-7f0000002000 rw-s 00000000 00:05 7 /dev/zero (deleted)"
	for _, tc := range []struct {
		about, smaps string
		want         int64 // in KiB; -1: an error
	}{
		{"nothing", "", 0},
		{"anonymous", mapping(private, "rd wr", "Rss: 8 kB", "Anonymous: 4 kB", "Swap: 0 kB"), 4},
		{"swapped", mapping(private, "rd wr", "Anonymous: 4 kB", "Swap: 4 kB"), 8},
		{"a file, written to", mapping("400000-402000 r-xp 00000000 fe:00 9 /bin/a [b] c", "rd ex", "Anonymous: 4 kB", "Swap: 0 kB"), 4},
		{"shared", mapping(shared, "rd wr sh", "Anonymous: 0 kB", "Swap: 8 kB"), 0},
		{"may be dropped", mapping(private, "rd wr wf dd dp", "Anonymous: 4 kB", "Swap: 0 kB"), 0},
		{"the kernel's code", mapping("7f0000000000-7f0000002000 r-xp 00000000 00:00 0    [vdso]", "rd ex", "Anonymous: 4 kB", "Swap: 0 kB"), 8},
		{"several", mapping(private, "rd", "Anonymous: 4 kB") + mapping(private, "dp", "Anonymous: 4 kB") + mapping(private, "rd", "Anonymous: 8 kB"), 12},
		{"no number", mapping(private, "rd", "Anonymous: x kB"), -1},
	} {
		got, err := sumMappings(strings.NewReader(tc.smaps))
		if (err != nil) != (tc.want < 0) || err == nil && got != tc.want<<10 {
			t.Errorf("%s: %d, %v, want %d KiB", tc.about, got, err, tc.want)
		}
	}
}

// TestGrowing reads a file while it is written, as CRIU does, among others that are
// smaller.
func TestGrowing(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "later")
	e := &earlyLayer{dumped: make(chan struct{})}
	found := make(chan *os.File)
	go func() { found <- e.wait(dir, 10) }()
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"core-1.img", "pages-1.img"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("0123456789"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	w, err := os.Create(filepath.Join(dir, "pages-2.img"))
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if _, err := io.WriteString(w, "0123456789a"); err != nil {
		t.Fatal(err)
	}
	f := <-found
	defer f.Close()
	if filepath.Base(f.Name()) != "pages-2.img" {
		t.Fatalf("found %s", f.Name())
	}
	read := make(chan string)
	started := make(chan struct{})
	go func() {
		r := &growing{f, 14, e}
		head := make([]byte, 11)
		if _, err := io.ReadFull(r, head); err != nil {
			t.Error(err)
		}
		close(started)
		rest, err := io.ReadAll(r)
		if err != nil {
			t.Error(err)
		}
		read <- string(head) + string(rest)
	}()
	<-started
	if _, err := io.WriteString(w, "bc"); err != nil {
		t.Fatal(err)
	}
	select {
	case got := <-read:
		t.Errorf("ended with %q before CRIU has", got)
	case <-time.After(10 * pause):
	}
	if _, err := io.WriteString(w, "d"); err != nil {
		t.Fatal(err)
	}
	close(e.dumped)
	if got := <-read; got != "0123456789abcd" {
		t.Errorf("read %q", got)
	}
	if n, err := (&growing{f, 15, e}).Read(make([]byte, 1)); n != 0 || !errors.Is(err, errSize) {
		t.Errorf("another size: %d, %v", n, err)
	}
	if f := e.wait(t.TempDir(), 0); f != nil {
		t.Errorf("found %s after CRIU has ended", f.Name())
	}
}

func TestDirtyRoom(t *testing.T) {
	const vmstat = "nr_free_pages 100\nnr_dirty 5\nnr_writeback 2\nnr_writeback_temp 50\nnr_dirty_threshold 40\nnr_dirty_background_threshold 20\n"
	if got, want := dirtyRoom(vmstat), int64(23*os.Getpagesize()); got != want {
		t.Errorf("%d, want %d", got, want)
	}
	if got := dirtyRoom(""); got != 0 {
		t.Errorf("nothing known: %d", got)
	}
}

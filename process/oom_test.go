package process

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestParseOOMKills(t *testing.T) {
	for _, tc := range []struct {
		in   string
		want uint64
	}{
		{"low 1\nhigh 2\nmax 3\noom 4\noom_kill 5\noom_group_kill 6\n", 5},
		{"oom_kill_disable 0\nunder_oom 0\noom_kill 3\n", 3},
		{"oom_kill 7", 7},
	} {
		if got, err := parseOOMKills([]byte(tc.in)); err != nil || got != tc.want {
			t.Errorf("parseOOMKills(%q) = %d, %v; want %d", tc.in, got, err, tc.want)
		}
	}
	for _, in := range []string{"", "oom_kill_disable 0\nunder_oom 0\n"} {
		if _, err := parseOOMKills([]byte(in)); !errors.Is(err, errNoKillCount) {
			t.Errorf("parseOOMKills(%q): %v, want errNoKillCount", in, err)
		}
	}
	if _, err := parseOOMKills([]byte("oom_kill many\n")); err == nil || errors.Is(err, errNoKillCount) {
		t.Errorf("a count that is no number: %v", err)
	}
}

// groupV1 is a folder with the files of a group of cgroup v1 that are looked at.
type groupV1 struct {
	t   *testing.T
	dir string
}

func (g groupV1) write(name, format string, args ...any) {
	g.t.Helper()
	path := filepath.Join(g.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		g.t.Fatal(err)
	}
	// In one step: a reader never sees a file that is cut off.
	if err := os.WriteFile(path+".new", fmt.Appendf(nil, format, args...), 0o600); err != nil {
		g.t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		g.t.Fatal(err)
	}
}

func (g groupV1) kills(below string, n int) {
	g.t.Helper()
	g.write(filepath.Join(below, "memory.oom_control"), "oom_kill_disable 0\nunder_oom 0\noom_kill %d\n", n)
}

func TestKillCounter(t *testing.T) {
	g := groupV1{t, t.TempDir()}
	g.kills("", 3)
	c, err := oomCounterV1(g.dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		name string
		do   func()
		want int
	}{
		{"what was there before", func() {}, 0},
		{"one kill", func() { g.kills("", 4) }, 1},
		{"nothing new", func() {}, 0},
		{"two kills at once", func() { g.kills("", 6) }, 2},
		{"a kill in a new group below", func() { g.kills("sub/deep", 1); g.kills("sub", 0) }, 1},
		{"kills in both", func() { g.kills("sub/deep", 2); g.kills("", 7) }, 2},
		{"the group below is removed", func() { _ = os.RemoveAll(filepath.Join(g.dir, "sub")) }, 0},
		{"and made again", func() { g.kills("sub", 1) }, 1},
	} {
		step.do()
		// However often the kernel signals, a kill is counted once.
		if got, err := c.more(true); err != nil || got != step.want {
			t.Errorf("%s: %d, %v; want %d", step.name, got, err, step.want)
		}
	}
	if err := os.RemoveAll(g.dir); err != nil {
		t.Fatal(err)
	}
	if _, err := c.more(true); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a group that is gone: %v", err)
	}
	if _, err := oomCounterV1(g.dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a group that never was: %v", err)
	}
}

// Linux before 4.13 has no counter.
func TestSignalCounter(t *testing.T) {
	g := groupV1{t, t.TempDir()}
	g.write("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\n")
	g.write("memory.limit_in_bytes", "4096\n")
	g.write("memory.usage_in_bytes", "4096\n")
	c, err := oomCounterV1(g.dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		usage     string
		signalled bool
		want      int
	}{
		{"4096", false, 0},
		{"4096", true, 1},
		{"4096", true, 0}, // the same kill
		{"4096", false, 0},
		{"2048", false, 0},
		{"4096", true, 1},
		{"4096", true, 0},
	} {
		g.write("memory.usage_in_bytes", "%s\n", step.usage)
		if got, err := c.more(step.signalled); err != nil || got != step.want {
			t.Errorf("usage %s, signalled %v: %d, %v; want %d", step.usage, step.signalled, got, err, step.want)
		}
	}
}

// watchSignals needs no cgroup, only an eventfd and files that change.
func TestWatchSignals(t *testing.T) {
	g := groupV1{t, t.TempDir()}
	g.kills("", 1)
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fd), "eventfd")
	signal := func() {
		t.Helper()
		if _, err := file.Write([]byte{1, 0, 0, 0, 0, 0, 0, 0}); err != nil {
			t.Fatal(err)
		}
	}
	kills, err := oomCounterV1(g.dir)
	if err != nil {
		t.Fatal(err)
	}
	told := make(chan struct{}, 10)
	stop := watchSignals(file, kills, func() { told <- struct{}{} })
	await := func(what string) {
		t.Helper()
		select {
		case <-told:
		case <-time.After(time.Minute):
			t.Fatalf("%s was not noticed", what)
		}
	}
	signal()
	g.kills("", 2) // the kernel signals first
	await("a kill after its signal")
	signal() // another signal of the same kill
	signal()
	g.kills("", 3)
	signal()
	await("a second kill")
	signal()
	g.kills("", 4)
	stop()
	stop() // twice is fine
	await("a kill before the end")
	if len(told) != 0 {
		t.Errorf("%d kills too many", len(told))
	}
	if _, err := file.Write([]byte{1, 0, 0, 0, 0, 0, 0, 0}); !errors.Is(err, os.ErrClosed) {
		t.Errorf("the eventfd is not closed: %v", err)
	}
}

// A watch ends with its group.
func TestWatchSignalsGroupGone(t *testing.T) {
	g := groupV1{t, t.TempDir()}
	g.kills("", 0)
	kills, err := oomCounterV1(g.dir)
	if err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	stop := watchSignals(r, kills, func() { t.Error("a kill in a group that is gone") })
	if err := os.RemoveAll(g.dir); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		if _, err := w.Write(make([]byte, 8)); err != nil {
			break // the watch has closed its end
		}
		if time.Now().After(deadline) {
			t.Fatal("the watch of a group that is gone does not end")
		}
	}
	stop()
	w.Close()
}

// watchMemoryEvents needs no cgroup of version 2, only a file that changes.
func TestWatchMemoryEvents(t *testing.T) {
	path := filepath.Join(t.TempDir(), "memory.events")
	write := func(s string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("oom 0\noom_kill 1\n")
	kills := make(chan struct{}, 10)
	stop, err := watchMemoryEvents(path, func() { kills <- struct{}{} })
	if err != nil {
		t.Fatal(err)
	}
	write("oom 1\noom_kill 1\n") // an OOM that killed nobody
	write("oom 1\noom_kill 3\n") // two kills
	for range 2 {
		select {
		case <-kills:
		case <-time.After(time.Minute):
			t.Fatal("an OOM kill was not noticed")
		}
	}
	stop()
	stop() // twice is fine
	write("oom 1\noom_kill 4\n")
	memoryModified(1, 0) // of a watch that is gone
	if len(kills) != 0 {
		t.Error("notified after stop, or twice")
	}
	if _, err := watchMemoryEvents(path+".none", func() {}); err == nil {
		t.Error("no error for a file that does not exist")
	}
}

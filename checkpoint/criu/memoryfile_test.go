package criu

import (
	"context"
	"errors"
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

func TestAnonymousMemory(t *testing.T) {
	for status, want := range map[string]int64{ // in KiB; -1: an error
		"": 0, // a kernel thread has none
		"Name:\tRssAnon: 9 kB\nVmRSS:\t    20 kB\nRssAnon:\t    8 kB\nRssFile:\t   12 kB\nVmSwap:\t    4 kB\n": 12,
		"RssAnon:\t x kB\n": -1,
	} {
		got, err := anonymousMemory(strings.NewReader(status))
		if (err != nil) != (want < 0) || err == nil && got != want<<10 {
			t.Errorf("%q: %d, %v, want %d KiB", status, got, err, want)
		}
	}
}

// TestOwnMemory asks the kernel of this process.
func TestOwnMemory(t *testing.T) {
	own, err := ownMemory(os.Getpid())
	if err != nil || own <= 0 {
		t.Errorf("own memory: %d, %v", own, err)
	}
	dumped, err := dumpedMemory(os.Getpid())
	if err != nil || dumped <= 0 || dumped%int64(os.Getpagesize()) != 0 {
		t.Errorf("memory to dump: %d, %v", dumped, err)
	}
}

func TestLargest(t *testing.T) {
	const mib = 1 << 20
	for about, tc := range map[string]struct {
		sizes []int64 // of processes 1, 2, …; -1: it has ended
		pid   int     // 0: none is
	}{
		"none":             {nil, 0},
		"one":              {[]int64{64 * mib}, 1},
		"a small one":      {[]int64{64*mib - 1}, 0},
		"the first":        {[]int64{165 * mib, 100 * mib, 3 * mib}, 1},
		"the last":         {[]int64{3 * mib, 100 * mib, 165 * mib}, 3},
		"the second":       {[]int64{100 * mib, 165 * mib, 3 * mib}, 2},
		"two about as big": {[]int64{165 * mib, 164 * mib}, 0},
		"two the same":     {[]int64{165 * mib, 165 * mib}, 0},
		"one has ended":    {[]int64{-1, 65 * mib}, 2},
		"all have ended":   {[]int64{-1, -1}, 0},
	} {
		var pids []uint32
		for i := range tc.sizes {
			pids = append(pids, uint32(i+1))
		}
		pid, other, ok := largest(pids, func(pid int) (int64, error) {
			if size := tc.sizes[pid-1]; size >= 0 {
				return size, nil
			}
			return 0, os.ErrNotExist
		})
		if pid != tc.pid || ok != (tc.pid != 0) {
			t.Errorf("%s: process %d, %v; want %d", about, pid, ok, tc.pid)
		}
		for i, size := range tc.sizes {
			if ok && (i+1 != pid && size >= other || i+1 == pid && size <= other) {
				t.Errorf("%s: process %d has %d bytes, and others at most %d", about, i+1, size, other)
			}
		}
	}
}

// TestWaitLarger waits for a file in a folder that is made later and has others, which
// do not grow as large.
func TestWaitLarger(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "later")
	found := make(chan string)
	go func() { found <- waitLarger(t.Context(), dir, 10) }()
	must(t, os.Mkdir(dir, 0o700))
	must(t, os.WriteFile(filepath.Join(dir, "core-1.img"), []byte("0123456789a"), 0o600))
	must(t, os.WriteFile(filepath.Join(dir, "pages-1.img"), []byte("0123456789"), 0o600))
	must(t, os.Symlink("core-1.img", filepath.Join(dir, "pages-3.img")))
	want := filepath.Join(dir, "pages-2.img")
	must(t, os.WriteFile(want, []byte("0123456789"), 0o600))
	select {
	case file := <-found:
		t.Fatalf("found %s, which is not larger", file)
	case <-time.After(5 * memoryFileEvery):
	}
	must(t, os.WriteFile(want, []byte("0123456789a"), 0o600))
	if file := <-found; file != want {
		t.Errorf("found %s, want %s", file, want)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("CRIU has ended"))
	if file := waitLarger(ctx, t.TempDir(), 0); file != "" {
		t.Errorf("found %s after CRIU has ended", file)
	}
}

// TestNoMemoryWatch: nobody asked, or there is nothing to look for.
func TestNoMemoryWatch(t *testing.T) {
	told := func(MemoryFile) { t.Error("it tells of a file") }
	for about, r := range map[string]*DumpRequest{
		"nobody asked": {},
		"no cgroup":    {MemoryFile: told},
		"pre-dumps":    {MemoryFile: told, PreDumps: 1},
	} {
		w := r.watchMemory(t.Context(), t.TempDir())
		if w != nil {
			t.Errorf("%s: it watches", about)
		}
		w.end()
		w.wait()
	}
}

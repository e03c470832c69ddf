package main

import (
	"bytes"
	"os"
	"strings"
	"testing"

	"github.com/containerd/console"

	"github.com/stasis-run/stasis/checkpoint/api"
)

// On a terminal there is a bar while the work goes on, and none after it.
func TestProgress(t *testing.T) {
	pty, path, err := console.NewPty()
	must0(t, err)
	defer pty.Close()
	must0(t, pty.Resize(console.WinSize{Height: 24, Width: 120}))
	terminal, err := os.OpenFile(path, os.O_RDWR, 0)
	must0(t, err)
	defer terminal.Close()

	a := &app{err: terminal}
	bar := a.progress("backup/db:1")
	if bar.silent() {
		t.Fatal("no bar on a terminal")
	}
	bar.Stage("push")
	bar.Set(1<<20, 4<<20)
	var seen strings.Builder
	for buf := make([]byte, 4096); !strings.Contains(seen.String(), "1MiB of 4MiB"); {
		n, err := pty.Read(buf)
		seen.Write(buf[:n])
		if err != nil {
			t.Fatalf("%v after %q", err, seen.String())
		}
	}
	if !strings.Contains(seen.String(), "backup/db:1") || !strings.Contains(seen.String(), "push") {
		t.Errorf("%q", seen.String())
	}
	bar.Stage("push") // the same again changes nothing
	bar.Stage("next")
	bar.Set(5, 0)
	bar.Done()
	bar.Set(6, 7) // late words from another goroutine
	a.close()
}

func TestNoProgress(t *testing.T) {
	var out bytes.Buffer
	for _, a := range []*app{{err: &out}, {err: os.Stderr, quiet: true}} {
		bar := a.progress("x")
		bar.Stage("x")
		bar.Set(1, 2)
		bar.Done()
		a.close()
		if !bar.silent() || out.Len() != 0 {
			t.Errorf("%q", out.String())
		}
	}
}

// What the dump and the copy of the writable layer have done is one sum, and no
// stage takes the other's place.
func TestDumpProgress(t *testing.T) {
	var sum dumpProgress
	for _, step := range []struct {
		stage                   string
		done, total             uint64
		wantedDone, wantedTotal int64
	}{
		{"dump", 10, 100, 10, 100},
		{"rootfs", 5, 0, 15, 105},
		{"dump", 90, 100, 95, 105},
		{"rootfs", 20, 0, 110, 120},
		{"dump", 130, 100, 150, 150}, // the total was an estimate
	} {
		done, total := sum.add(&api.Progress{Stage: step.stage, DoneBytes: step.done, TotalBytes: step.total})
		if done != step.wantedDone || total != step.wantedTotal {
			t.Errorf("%+v: %d of %d", step, done, total)
		}
	}
}

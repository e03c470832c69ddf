package main

import (
	"bytes"
	"os"
	"strings"
	"testing"

	"github.com/containerd/console"

	"github.com/stasis-run/stasis/node"
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
	show := a.progress()
	if show == nil {
		t.Fatal("no bar on a terminal")
	}
	show(node.Update{Of: "backup/db:1", Stage: "push"})
	show(node.Update{Of: "backup/db:1", Stage: "push", Done: 1 << 20, Total: 4 << 20})
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
	show(node.Update{Of: "backup/db:1", Stage: "next", Done: 5})
	show(node.Update{Of: "backup/db:1"})
	a.close()
	show(node.Update{Of: "backup/db:1", Stage: "late", Done: 6, Total: 7})
}

func TestNoProgress(t *testing.T) {
	var out bytes.Buffer
	for _, a := range []*app{{err: &out}, {err: os.Stderr, quiet: true}} {
		show := a.progress()
		a.close()
		if show != nil || out.Len() != 0 {
			t.Errorf("%q", out.String())
		}
	}
}

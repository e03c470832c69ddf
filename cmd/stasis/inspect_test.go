package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stasis-run/stasis/checkpoint/inspect"
	"github.com/stasis-run/stasis/checkpoint/policy/allow"
	"github.com/stasis-run/stasis/node"
)

func TestInspectCommand(t *testing.T) {
	code, out, errs := stasis(t, "inspect", sleep)
	for _, part := range []string{"PROCESSES", "sleep 1000", "MEMORY OF 1 (sleep)", "heap", "OPEN IN 1", "pipe:[72924]", "A HOST MUST HAVE", "CHECKPOINT_RESTORE"} {
		if code != 0 || !strings.Contains(out, part) {
			t.Errorf("exit code %d, %s; no %q in\n%s", code, errs, part, out)
		}
	}
	for _, args := range [][]string{{}, {"-o", "json"}} {
		if _, out, _ := stasis(t, append([]string{"inspect", sleep}, args...)...); strings.Contains(out, "HOME=/root") {
			t.Errorf("%v shows the environment:\n%s", args, out)
		}
		if _, out, _ := stasis(t, append([]string{"inspect", sleep, "--show-secrets"}, args...)...); !strings.Contains(out, "HOME=/root") {
			t.Errorf("%v --show-secrets does not show the environment:\n%s", args, out)
		}
	}
	_, out, _ = stasis(t, "inspect", sleep, "-o", "json")
	var r inspect.Report
	must0(t, json.Unmarshal([]byte(out), &r))
	if len(r.Processes) != 1 || r.Processes[0].Comm != "sleep" {
		t.Errorf("%+v", r)
	}
}

func TestInspectPage(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.html")
	code, out, errs := stasis(t, "inspect", sleep, "--html", path)
	if code != 0 || out != "" {
		t.Fatalf("exit code %d, %q, %s", code, out, errs)
	}
	page, err := os.ReadFile(path)
	must0(t, err)
	for _, part := range []string{"sleep 1000", "<svg", "/usr/bin/busybox", "CHECKPOINT_RESTORE", "</html>"} {
		if !bytes.Contains(page, []byte(part)) {
			t.Errorf("no %q", part)
		}
	}
	if bytes.Contains(page, []byte("HOME=/root")) {
		t.Error("the page has the environment")
	}
	if ref := regexp.MustCompile(`(?i)(src|href)\s*=|url\(|@import|<script`).Find(page); ref != nil {
		t.Errorf("the page refers to something outside: %s", ref)
	}
}

// Whatever a process calls itself, it is text: in the page, and on a terminal.
func TestHostileNames(t *testing.T) {
	const evil = "<script>alert(1)</script>\"'\x1b[2J\n"
	r := &inspect.Report{
		Hostname: evil,
		Processes: []inspect.Process{{PID: 1, Comm: evil, Args: []string{evil}, Environment: []string{evil}, Cwd: evil,
			Memory:      inspect.Memory{Mappings: []inspect.Mapping{{Start: 4096, Size: 4096, Dumped: 4096, Kind: evil, File: evil}}},
			Descriptors: []inspect.Descriptor{{Kind: evil, Path: evil}}}},
		Sockets: []inspect.Socket{{Kind: evil, Local: evil}},
		Mounts:  []inspect.Mount{{Mountpoint: evil, Options: evil, External: evil}},
	}
	var page, text bytes.Buffer
	must0(t, (&node.Inspection{Report: r}).WritePage(&page, evil))
	if bytes.Contains(page.Bytes(), []byte("<script")) {
		t.Errorf("a script in\n%s", page.String())
	}
	asks := []allow.Ask{{Field: evil, What: evil, Verdict: allow.NeedsFlag, Flag: evil}}
	must0(t, printInspection(&text, evil, &node.Inspection{Report: r, AsksFor: asks}))
	if strings.ContainsRune(text.String(), '\x1b') {
		t.Errorf("%q", text.String())
	}
}

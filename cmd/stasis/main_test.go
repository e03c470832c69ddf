package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func must0(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// stasis runs a command line where there is no containerd.
func stasis(t testing.TB, args ...string) (code int, out, errs string) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	args = append([]string{"--address", filepath.Join(t.TempDir(), "none.sock"), "--state", filepath.Join(t.TempDir(), "state")}, args...)
	code = run(t.Context(), args, strings.NewReader(""), &stdout, &stderr)
	return code, stdout.String(), stderr.String()
}

const sleep = "../../checkpoint/testdata/runc-sleep"

func TestExitCodes(t *testing.T) {
	for _, tc := range []struct {
		line string
		code int
		part string // of stderr
	}{
		{"", 0, ""},
		{"--help", 0, ""},
		{"version", 0, ""},
		{"completion bash", 0, ""},
		{"nonsense", exitUsage, `unknown command "nonsense"`},
		{"version more", exitUsage, "unknown command"},
		{"version --nonsense", exitUsage, "unknown flag"},
		{"-o xml version", exitUsage, "it is one of table, json"},
		{"-n ../x ls", exitUsage, "--namespace"},
		{"inspect", exitUsage, "accepts 1 arg"},
		{"ls --format nonsense", exitUsage, "it is one of"},
		{"prune --older-than soon", exitUsage, "90m, 12h or 7d"},
		{"prune --keep -3", exitUsage, "number of checkpoints"},
		{"pull UPPER:case", exitUsage, "is no name for an image"},
		{"prune", 0, ""},
		{"ls", exitFailed, "no containerd at"},
		{"rm x", exitFailed, "no containerd at"},
		{"push x", exitFailed, "no containerd at"},
		{"inspect " + sleep, 0, ""},
		{"inspect ../../checkpoint/criu/testdata/logs", exitFailed, "no checkpoint"},
		{"inspect /nonexistent", exitFailed, "/nonexistent"},
		{"convert " + sleep + " x:1", exitFailed, "no containerd at"},
		{"diff " + sleep + " " + sleep, 0, ""},
		{"import /nonexistent", exitFailed, "/nonexistent"},
		{"--host unix:///none.sock ls", exitUsage, "--address is of this host"},
	} {
		code, _, errs := stasis(t, strings.Fields(tc.line)...)
		if code != tc.code || !strings.Contains(errs, tc.part) {
			t.Errorf("stasis %s: exit code %d, want %d; stderr %q", tc.line, code, tc.code, errs)
		}
		if code != 0 && !strings.HasPrefix(errs, "stasis: ") {
			t.Errorf("stasis %s: stderr %q", tc.line, errs)
		}
	}
}

func TestInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var out, errs bytes.Buffer
	if code := run(ctx, []string{"inspect", sleep}, nil, &out, &errs); code != exitInterrupted || !strings.HasPrefix(errs.String(), "stasis: interrupted") {
		t.Errorf("exit code %d, %q", code, errs.String())
	}
}

func TestVersion(t *testing.T) {
	_, out, _ := stasis(t, "version", "-o", "json")
	var v versions
	must0(t, json.Unmarshal([]byte(out), &v))
	if v.Version != "dev" || v.Containerd != nil || !strings.Contains(v.Error, "no containerd at") {
		t.Errorf("%+v", v)
	}
	_, out, _ = stasis(t, "version")
	if !strings.HasPrefix(out, "stasis ") || !strings.Contains(out, "\ncontainerd ") {
		t.Errorf("%q", out)
	}
}

// A shell that asks what may follow gets an answer, also without containerd.
func TestCompletions(t *testing.T) {
	for line, want := range map[string]string{
		"__complete -o ":                 "table\njson\n",
		"__complete convert x --format ": "runnable\nindex\narchive\npodman\n",
		"__complete inspect ":            ":0\n",
		"__complete rm ":                 ":0\n",
		"__complete checkpoint ":         ":4\n",
		"__complete version ":            ":4\n",
	} {
		args := strings.Fields(line)
		if strings.HasSuffix(line, " ") {
			args = append(args, "")
		}
		if code, out, _ := stasisAt(t, args); code != 0 || !strings.Contains(out, want) {
			t.Errorf("%s: exit code %d, %q", line, code, out)
		}
	}
}

// stasisAt is for command lines that must begin with their command.
func stasisAt(t *testing.T, args []string) (code int, out, errs string) {
	t.Setenv("CONTAINERD_ADDRESS", filepath.Join(t.TempDir(), "none.sock"))
	var stdout, stderr bytes.Buffer
	code = run(t.Context(), args, nil, &stdout, &stderr)
	return code, stdout.String(), stderr.String()
}

// Help is complete: a short text, an example, no arguments left without a word
// about what may be completed.
func TestHelp(t *testing.T) {
	root := newRootCommand(&app{})
	for _, cmd := range root.Commands() {
		if cmd.Hidden {
			continue
		}
		if cmd.Short == "" || cmd.Example == "" || cmd.ValidArgsFunction == nil {
			t.Errorf("stasis %s: needs Short, Example and ValidArgsFunction", cmd.Name())
		}
		if strings.HasSuffix(cmd.Short, ".") {
			t.Errorf("stasis %s: %q", cmd.Name(), cmd.Short)
		}
	}
}

func TestManualIsCurrent(t *testing.T) {
	have, err := os.ReadFile("../../docs/cli.md")
	must0(t, err)
	if !bytes.Equal(have, manual(newRootCommand(&app{}))) {
		t.Error("docs/cli.md is not what the commands say: run `go run ./cmd/stasis docs docs`")
	}
}

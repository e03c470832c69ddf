package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// failing is a stdout that takes so many bytes.
type failing struct {
	left int
	err  error
}

func (f *failing) Write(p []byte) (int, error) {
	if len(p) > f.left {
		return f.left, f.err
	}
	f.left -= len(p)
	return len(p), nil
}

// Whatever prints: what could not be printed is a failure, and nothing is left.
func TestOutputFails(t *testing.T) {
	for _, line := range []string{
		"", "--help", "version", "version -o json", "completion bash", "inspect --help", "check", "prune", "prune -o json",
		"inspect " + sleep, "inspect -o json " + sleep, "diff " + sleep + " " + sleep, "diff -o json " + sleep + " " + sleep,
		"inspect --html - " + sleep, "inspect --html /dev/stdout " + sleep, "__complete -o ",
	} {
		for _, tc := range []struct {
			err  error
			code int
		}{{unix.ENOSPC, exitFailed}, {unix.EPIPE, exitHungUp}} {
			state := filepath.Join(t.TempDir(), "state")
			args := strings.Fields(line)
			if strings.HasPrefix(line, "__complete") {
				args = append(args, "")
			} else {
				args = append([]string{"--address", filepath.Join(t.TempDir(), "none.sock"), "--state", state}, args...)
			}
			if line == "prune" {
				// Something to say.
				must0(t, os.MkdirAll(filepath.Join(state, "work", "left"), 0o700))
			}
			var errs bytes.Buffer
			code := run(t.Context(), args, strings.NewReader(""), &failing{3, tc.err}, &errs)
			if code != tc.code {
				t.Errorf("%q, %v: exit code %d, want %d: %s", line, tc.err, code, tc.code, errs.String())
			}
			if said := errs.String(); tc.code == exitFailed && !strings.Contains(said, "write to stdout: no space left on device") {
				t.Errorf("%q, %v: stderr %q", line, tc.err, said)
			}
			if left, _ := filepath.Glob(filepath.Join(state, "work", "*")); len(left) > 0 {
				t.Errorf("%q: left behind: %q", line, left)
			}
		}
	}
}

package main

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestAge(t *testing.T) {
	for s, want := range map[string]time.Duration{"90m": 90 * time.Minute, "7d": 7 * 24 * time.Hour, "1.5d": 36 * time.Hour, "d": 0, "-1h": 0, "": 0, "7": 0} {
		var a age
		err := a.Set(s)
		if time.Duration(a) != want || (err == nil) != (want > 0) {
			t.Errorf("%q: %v, %v", s, a.String(), err)
		}
	}
}

// What is left is said, a folder in a line.
func TestPruneCommand(t *testing.T) {
	state := filepath.Join(t.TempDir(), "state")
	left := filepath.Join(state, "work", "left")
	must0(t, os.MkdirAll(left, 0o700))
	for _, tc := range []struct{ args, want string }{{"--dry-run", left + "\n"}, {"--dry-run=false", left + "\n"}, {"--dry-run=false", ""}} {
		if code, out, errs := stasis(t, "--state", state, "prune", tc.args); code != 0 || out != tc.want {
			t.Errorf("exit code %d, %q, %s; want %q", code, out, errs, tc.want)
		}
	}
}

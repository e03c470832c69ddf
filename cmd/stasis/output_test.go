package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/sign"
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
	keys := filepath.Join(t.TempDir(), "keys")
	t.Setenv("STASIS_CONFIG_DIR", keys)
	key, err := sign.Dir(keys).Key()
	must0(t, err)
	signed := filepath.Join(t.TempDir(), "signed")
	must0(t, os.CopyFS(signed, os.DirFS(sleep)))
	must0(t, checkpoint.Sign(t.Context(), signed, key, checkpoint.Manifest{Container: checkpoint.Container{ID: "c"}}))
	other, err := sign.Dir(filepath.Join(t.TempDir(), "other")).Key()
	must0(t, err)
	public, err := other.Public()
	must0(t, err)
	pub := filepath.Join(t.TempDir(), "other.pub")
	must0(t, os.WriteFile(pub, public, 0o644))
	for _, line := range []string{
		"", "--help", "version", "version -o json", "completion bash", "inspect --help", "check", "prune", "prune -o json",
		"inspect " + sleep, "inspect -o json " + sleep, "diff " + sleep + " " + sleep, "diff -o json " + sleep + " " + sleep,
		"inspect --html - " + sleep, "inspect --html /dev/stdout " + sleep, "__complete -o ",
		"key init", "key init -o json", "key show", "key show -o json", "key list", "key list -o json",
		"key trust " + pub, "key trust -o json " + pub, "key remove " + other.ID, "key remove -o json " + other.ID,
		"verify " + signed, "verify -o json " + signed, "verify -o json " + sleep,
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
			if strings.HasPrefix(line, "key remove") {
				_, err := sign.Dir(keys).Add(public)
				must0(t, err)
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

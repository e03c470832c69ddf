package stack

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Stasis runs the command line `stasis` against this containerd and returns what
// it printed on stdout. Its state folder is the stack's.
func (s *Stack) Stasis(args ...string) string {
	s.tb.Helper()
	out, err := s.StasisErr(args...)
	if err != nil {
		s.tb.Fatalf("%v", err)
	}
	return out
}

// StasisErr is Stasis for a command that may fail. The error has what it printed
// on stderr, and wraps *exec.ExitError.
func (s *Stack) StasisErr(args ...string) (string, error) {
	cmd := s.StasisCommand(args...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("stasis %s: %w\n%s", strings.Join(args, " "), err, stderr.String())
	}
	return string(out), err
}

// StasisCommand is a call of `stasis` that was not started yet. Arguments that begin with
// --host are for another node than the stack's.
func (s *Stack) StasisCommand(args ...string) *exec.Cmd {
	s.tb.Helper()
	shim, err := Shim()
	if err != nil {
		s.tb.Fatalf("%v", err)
	}
	if slices.Contains(args[:min(len(args), 3)], "restore") && !s.opts.NoGrants {
		args = append(slices.Clone(args), "--allow-seccomp", "unconfined", "--cgroup-parent", s.cgroupParent())
	}
	node := []string{"--address", s.Address(), "--state", s.path("stasis"), "--namespace", s.Namespace}
	if len(args) > 1 && args[0] == "--host" {
		node = node[4:] // it has its own
	}
	cmd := s.Command(s.ctx, filepath.Join(filepath.Dir(shim), "stasis"), append(node, args...)...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 10 * time.Second
	return cmd
}

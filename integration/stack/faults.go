package stack

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Faults makes the OCI runtime of a stack go wrong, by means of the program
// integration/faultrunc. Commands are those of runc: checkpoint, create,
// delete, exec, kill, pause, ps, restore, resume, start, state, update.
//
//	f := s.Faults()
//	f.Hold("checkpoint", stack.Before)
//	go func() { errc <- c.CheckpointErr(ctx, dir, nil) }()
//	f.WaitReached(ctx, "checkpoint", stack.Before)
//	... // the shim waits for the runtime
//	f.Release("checkpoint", stack.Before)
type Faults struct {
	s      *Stack
	dir    string
	binary string
}

// When is a point in the course of a runtime's command.
type When struct{ phase, line string }

var (
	// Before the real runtime is run.
	Before = When{phase: "before"}
	// After the real runtime has ended, and before its caller knows.
	After = When{phase: "after"}
)

// During is when CRIU has just logged a line that contains text, of the commands
// checkpoint and restore. Who has logged it, CRIU or one of its children, does not
// go on; its children, or CRIU itself until it is stopped, may.
func During(text string) When { return When{phase: "during", line: text} }

// Faults installs faultrunc as the stack's OCI runtime, for all containers that
// are made from then on.
func (s *Stack) Faults() *Faults {
	s.tb.Helper()
	if s.faults != nil {
		return s.faults
	}
	program, err := TestProgram("faultrunc")
	if err != nil {
		s.tb.Fatalf("%v", err)
	}
	criulog, err := TestProgram("criulog.so")
	if err != nil {
		s.tb.Fatalf("%v", err)
	}
	// Under the name of the real one, for who looks at names.
	f := &Faults{s: s, dir: s.path("faults"), binary: s.path("faults", filepath.Base(s.bins.runtime))}
	if err := os.Mkdir(f.dir, 0o700); err != nil {
		s.tb.Fatalf("%v", err)
	}
	for link, target := range map[string]string{
		f.binary: program, filepath.Join(f.dir, "real"): s.bins.runtime, filepath.Join(f.dir, "criulog"): criulog,
	} {
		if err := os.Symlink(target, link); err != nil {
			s.tb.Fatalf("%v", err)
		}
	}
	s.faults = f
	if s.opts.CRI {
		// What the pods run by stands in containerd's configuration.
		config, err := os.ReadFile(s.path("config.toml"))
		if err == nil {
			config = bytes.ReplaceAll(config, []byte(strconv.Quote(s.bins.runtime)), []byte(strconv.Quote(f.binary)))
			err = os.WriteFile(s.path("config.toml"), config, 0o600)
		}
		if err != nil {
			s.tb.Fatalf("%v", err)
		}
		s.Restart()
	}
	return f
}

// Hold makes a command wait until it is released.
func (f *Faults) Hold(command string, w When) { f.request(command, w, "hold", w.line) }

// WaitReached waits until a command waits, as told by Hold.
func (f *Faults) WaitReached(ctx context.Context, command string, w When) {
	f.s.tb.Helper()
	f.s.Poll(ctx, "runtime to reach "+command+" "+w.phase, func() bool { return f.Reached(command, w) })
}

// Reached tells whether a command waits, or has waited, as told by Hold.
func (f *Faults) Reached(command string, w When) bool {
	_, err := os.Stat(f.file(command, w, "reached"))
	return err == nil
}

// Release lets a command that waits go on, and later ones not wait.
func (f *Faults) Release(command string, w When) { os.Remove(f.file(command, w, "hold")) }

// Fail makes a command fail, Before or After the real runtime has done its
// work.
func (f *Faults) Fail(command string, w When, message string) { f.request(command, w, "fail", message) }

// KillCRIU kills CRIU when its log contains text.
func (f *Faults) KillCRIU(command, text string) {
	f.request(command, During(text), "kill-criu", text)
}

// KillShim kills the shim that runs the command.
func (f *Faults) KillShim(command string, w When) { f.request(command, w, "kill-parent", w.line) }

// Clear takes back what is requested for a command.
func (f *Faults) Clear(command string) {
	files, _ := filepath.Glob(filepath.Join(f.dir, command+".*"))
	for _, file := range files {
		os.Remove(file)
	}
}

// Reset takes back all requests.
func (f *Faults) Reset() { f.Clear("*") }

// Calls returns the command lines, without the program, that the runtime was
// called with.
func (f *Faults) Calls() []string {
	b, err := os.ReadFile(filepath.Join(f.dir, "calls"))
	if err != nil {
		return nil
	}
	return strings.Split(strings.TrimSuffix(string(b), "\n"), "\n")
}

func (f *Faults) file(command string, w When, name string) string {
	return filepath.Join(f.dir, command+"."+w.phase+"."+name)
}

// request makes a request appear as a whole.
func (f *Faults) request(command string, w When, action, text string) {
	f.s.tb.Helper()
	file := f.file(command, w, action)
	if err := os.WriteFile(file+".new", []byte(text), 0o600); err != nil {
		f.s.tb.Fatalf("%v", err)
	}
	if err := os.Rename(file+".new", file); err != nil {
		f.s.tb.Fatalf("%v", err)
	}
}

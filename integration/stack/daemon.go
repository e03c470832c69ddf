package stack

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"syscall"
)

// A Daemon is one run of containerd, or of another program that serves until it
// is told to end.
type Daemon struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it has exited; then err is set
	err  error
}

// StartDaemon starts a program, which appends to <name>.log in the stack's folder.
// It must have ended when the stack is stopped.
func (s *Stack) StartDaemon(name string, cmd *exec.Cmd) (*Daemon, error) {
	log, err := os.OpenFile(s.path(name+".log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd.Dir = s.Dir
	cmd.Stdout, cmd.Stderr = log, log
	// Ctrl-C is for us; we then stop it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	d := &Daemon{cmd: cmd, done: make(chan struct{})}
	go func() {
		d.err = cmd.Wait()
		close(d.done)
	}()
	return d, nil
}

// Exited tells whether it has ended.
func (d *Daemon) Exited() bool {
	select {
	case <-d.done:
		return true
	default:
		return false
	}
}

// Signal sends sig and waits until the program has exited.
func (d *Daemon) Signal(ctx context.Context, sig syscall.Signal) error {
	if err := d.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-d.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

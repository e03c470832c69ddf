package process

import (
	"context"
	"fmt"

	runc "github.com/containerd/go-runc"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Runtime is the OCI runtime (runc, crun) for one container. NewRuntime returns the
// real one, package processtest a fake.
//
// A call returns when the runtime's own process has ended, and with it what it has
// called, such as CRIU; a context that ends kills both. What a call that failed or
// was cut short has done is not known: Delete removes it, whatever it is. Calls may
// run side by side; the runtime itself serves one at a time for most of them.
//
// If the runtime itself fails, the error is a *RuntimeError. No error has a class of
// errdefs.
type Runtime interface {
	// Create creates the container from its bundle, where config.json and the root
	// filesystem are, and returns init's pid. init waits for Start. It is a child of
	// this process, and the caller's to wait for: call Create in Reaper.Launch.
	//
	// The streams in opts stay the caller's, who closes them after a failure too. The
	// runtime sets opts.PidFile. The same holds for Exec and Restore.
	Create(ctx context.Context, opts *runc.CreateOpts) (pid int, err error)
	// Start lets the created init run. It returns before init executes the
	// container's program; see WaitExec.
	Start(ctx context.Context) error
	// Exec starts another process in the container and returns its pid. The process
	// is the caller's to wait for, as init is.
	Exec(ctx context.Context, execID string, spec *specs.Process, opts *runc.ExecOpts) (pid int, err error)
	// Kill signals init, or with all every process of the container.
	Kill(ctx context.Context, sig unix.Signal, all bool) error
	// Pause freezes the container. After an error it may be frozen all the same.
	Pause(ctx context.Context) error
	// Resume thaws the container.
	Resume(ctx context.Context) error
	// Update changes the container's resource limits.
	Update(ctx context.Context, resources *specs.LinuxResources) error
	// Delete removes the container from the runtime, killing what is left of it. A
	// container that the runtime does not know is no error: a checkpoint that stops
	// the container removes it too.
	Delete(ctx context.Context) error
	// Checkpoint has CRIU dump the container into the folder opts.ImagePath, which
	// exists. CRIU's log is in opts.WorkDir, also after an error. Unless the actions
	// have runc.LeaveRunning or runc.PreDump, the container ends with it.
	Checkpoint(ctx context.Context, opts *runc.CheckpointOpts, actions ...runc.CheckpointAction) error
	// Restore has CRIU bring the container back from opts.ImagePath, and returns
	// init's pid. It runs already. The process is the caller's to wait for.
	Restore(ctx context.Context, opts *runc.RestoreOpts) (pid int, err error)

	// FreezerGroup is the control group in which the runtime freezes the container, and
	// has CRIU do so, as the runtime has noted it; "" if it notes none.
	FreezerGroup() string
	// Version is the runtime's name and version, such as "runc", "1.5.2". If it
	// cannot be asked, the name is its program's, and the version empty.
	Version(ctx context.Context) (name, version string)
}

// DefaultRuntimeRoot is where the OCI runtime keeps its state, a folder per
// namespace below it, as for upstream's shim.
const DefaultRuntimeRoot = "/run/containerd/runc"

// RuntimeConfig says which OCI runtime runs a container, and how.
type RuntimeConfig struct {
	Binary        string // name or path; empty: runc
	Root          string // empty: DefaultRuntimeRoot
	SystemdCgroup bool
}

// RuntimeError is a failed call of the OCI runtime.
type RuntimeError struct {
	Op  string // create, start, exec, …
	Msg string // the runtime's last error line, "" if it wrote none
	Err error  // the exit status, with the output where no log was written
}

// Error reads "OCI runtime create failed: …", as upstream's shim words it:
// there are clients that look for it.
func (e *RuntimeError) Error() string {
	if e.Msg == "" {
		return fmt.Sprintf("OCI runtime %s failed: %v", e.Op, e.Err)
	}
	return fmt.Sprintf("OCI runtime %s failed: %s", e.Op, e.Msg)
}

func (e *RuntimeError) Unwrap() error { return e.Err }

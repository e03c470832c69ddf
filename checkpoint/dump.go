package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	runc "github.com/containerd/go-runc"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/process"
)

// DumpRequest is what Dump needs to know.
type DumpRequest struct {
	Runtime *process.Runtime
	Cgroup  *process.Cgroup // the container's; nil if it could not be loaded
	InitPid int

	Dir     string // where the checkpoint goes; may exist
	WorkDir string // where CRIU leaves dump.log and stats-dump
	Options Options
	Exit    bool // the container ends with the dump
	Paused  bool // the container is frozen, and stays so
	Durable bool // the checkpoint has to survive a power cut

	Container  Container // for the manifest
	TerminalIO bool
}

// Dump has CRIU write the container to a folder. CRIU freezes the container by
// itself, so nothing else is done meanwhile. Whatever fails, the container runs
// on (or stays paused), its network open, and the folder is as it was; the
// error holds CRIU's own error lines and says where its log is.
func Dump(ctx context.Context, r DumpRequest) error {
	if err := r.checkStopped(); err != nil {
		return err
	}
	folder, err := NewFolder(r.Dir)
	if err != nil {
		return err
	}
	if r.Exit {
		if err := folder.Reserve(); err != nil {
			return errors.Join(err, folder.Discard())
		}
	}
	if err := os.MkdirAll(r.WorkDir, 0o711); err != nil {
		return errors.Join(fmt.Errorf("make CRIU's work folder: %w", err), folder.Discard())
	}
	var actions []runc.CheckpointAction
	if !r.Exit {
		actions = append(actions, runc.LeaveRunning)
	}
	// Of use after init's end too.
	netns := fmt.Sprintf("/proc/%d/ns/net", r.InitPid)
	if ns, err := os.Open(netns); err == nil {
		defer ns.Close()
		netns = fmt.Sprintf("/proc/self/fd/%d", ns.Fd())
	}
	// A request whose time has run out ends CRIU, though not at any moment.
	callCtx, kill := context.WithCancel(context.WithoutCancel(ctx))
	defer kill()
	defer context.AfterFunc(ctx, func() {
		r.settle()
		kill()
	})()
	// Meanwhile, for nobody shall wait for it.
	version := make(chan string, 1)
	go func() { version <- r.Runtime.Version(callCtx) }()
	err = r.Runtime.Checkpoint(callCtx, r.Options.dumpOpts(folder.Path(), r.WorkDir), actions...)
	if err != nil && r.Exit && finished(r.logPath()) {
		// CRIU was killed while it killed the container, of which this is now
		// all there is.
		log.G(ctx).WithError(err).WithField("container", r.Container.ID).Warn("CRIU ended after it had written everything")
		err = nil
		if kerr := r.Runtime.Kill(context.WithoutCancel(ctx), unix.SIGKILL, true); kerr != nil {
			log.G(ctx).WithError(kerr).WithField("container", r.Container.ID).Warn("kill a container that was dumped")
		}
	}
	if err != nil {
		r.rescue(ctx, netns)
		if derr := folder.Discard(); derr != nil {
			log.G(ctx).WithError(derr).Warn("remove an unfinished checkpoint")
		}
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return criuError("checkpoint", r.Container.ID, err, r.logPath())
	}
	// CRIU gives back the state it found; with Exit that may be frozen, and a
	// frozen process does not die.
	if r.Exit || !r.Paused {
		r.thaw(ctx)
	}
	// It leaves a network namespace locked that outlives the container, so that
	// no answer of the kernel's ends a connection before the restore. Without
	// connections, that would only harm who shares the namespace.
	if r.Exit && !r.Options.OpenTCP {
		r.unlock(ctx, netns)
	}
	return folder.Commit(Manifest{
		Container:  r.Container,
		Options:    r.Options,
		Exit:       r.Exit,
		TerminalIO: r.TerminalIO,
		CRIU:       LogVersion(r.logPath()),
		Runtime:    Runtime{Name: filepath.Base(r.Runtime.Name()), Version: <-version},
	}, r.Durable)
}

// checkStopped refuses a container with a process that a signal has stopped, where
// CRIU freezes by the freezer of cgroup v1: it would wait for ever for that
// process, and the container would stay frozen.
func (r *DumpRequest) checkStopped() error {
	if r.Cgroup == nil || !r.Cgroup.IsV1() {
		return nil
	}
	pids, err := r.Cgroup.Pids()
	if err != nil {
		return nil // it is gone, or CRIU will tell
	}
	for _, pid := range pids {
		if process.IsStopped(int(pid)) {
			return fmt.Errorf("checkpoint container %s: process %d is stopped by a signal, which CRIU cannot dump on a host with cgroup v1; continue it (SIGCONT) or end it: %w",
				r.Container.ID, pid, errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

// logPath is that of CRIU's log.
func (r *DumpRequest) logPath() string { return filepath.Join(r.WorkDir, dumpLog) }

func (r *DumpRequest) thaw(ctx context.Context) {
	if r.Cgroup == nil {
		return
	}
	if frozen, err := r.Cgroup.Frozen(); err != nil || !frozen {
		return // an error: the group is gone, and the container with it
	}
	if err := r.Cgroup.Thaw(); err != nil {
		log.G(ctx).WithError(err).Error("thaw the container after a checkpoint")
	}
}

// dumpOpts are the runtime's options for a dump into dir.
func (o Options) dumpOpts(dir, workDir string) *runc.CheckpointOpts {
	return &runc.CheckpointOpts{
		ImagePath:                dir,
		WorkDir:                  workDir,
		AllowOpenTCP:             o.OpenTCP,
		AllowExternalUnixSockets: o.ExternalUnixSockets,
		AllowTerminal:            o.Terminal,
		FileLocks:                o.FileLocks,
		EmptyNamespaces:          o.EmptyNamespaces,
		Cgroups:                  runc.CgroupMode(o.CgroupsMode),
	}
}

// criuError makes an error of a failed runtime call that holds what CRIU said.
// It is one paragraph: clients show only the first lines of an error.
func criuError(op, id string, err error, logPath string) error {
	lines := LogErrors(logPath, 4)
	var fs unix.Statfs_t
	if len(lines) == 0 && unix.Statfs(filepath.Dir(logPath), &fs) == nil && fs.Bavail == 0 {
		return fmt.Errorf("%s container %s: %w: CRIU's log %s: %w", op, id, err, logPath, unix.ENOSPC)
	}
	if len(lines) == 0 {
		return fmt.Errorf("%s container %s: %w (CRIU's log: %s)", op, id, err, logPath)
	}
	return fmt.Errorf("%s container %s: %w: CRIU says: %s (its whole log: %s)",
		op, id, err, strings.Join(lines, "; "), logPath)
}

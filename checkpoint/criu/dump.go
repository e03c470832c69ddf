package criu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	runc "github.com/containerd/go-runc"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/criu/img"
	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/checkpoint/sign"
	"github.com/stasis-run/stasis/process"
)

// DumpRequest is what Dump needs to know.
type DumpRequest struct {
	Runtime process.Runtime
	Cgroup  *process.Cgroup // the container's; nil if it could not be loaded
	InitPid int

	Bundle  string // the container's
	Self    string // a program that runs Exec when called as Name
	Dir     string // where the checkpoint goes; may exist
	WorkDir string // where CRIU leaves dump.log and stats-dump
	Options checkpoint.Options
	// DumpOptions are those that no restore has to repeat.
	DumpOptions DumpOptions
	PreDumps    int  // how often its memory is written before, while it runs, or PreDumpAuto
	Exit        bool // the container ends with the dump
	Paused      bool // the container is frozen, and stays so
	Durable     bool // the checkpoint has to survive a power cut
	// Parent, if not nil, is a checkpoint of the container that the dump builds on: CRIU
	// writes only the pages that the kernel says have been written to, and the rest is
	// taken from Parent when the container runs again. The caller closes it.
	//
	// The caller has to know that nothing has reset the kernel's notes since Parent was
	// made: pages that were written to before the reset would be taken from Parent. CRIU
	// resets them in every pre-dump, and in a dump with Parent or Track, even in one
	// that fails.
	//
	// It is for a kernel with SoftDirty, and of no use with PreDumps.
	Parent *img.Lists
	// Track has the kernel note from this dump on which pages are written to, so that
	// the checkpoint can be a Parent. CRIU refuses a parent that was dumped without:
	// its inventory lacks the time by which CRIU tells that a process ID is used again.
	// It is for a kernel with SoftDirty.
	Track bool
	// LeaveSum leaves the sum of the largest file to checkpoint.AddSum. Until then no restore
	// takes the checkpoint, and an older one in Dir is gone; so not with Exit.
	LeaveSum bool

	// While, if not nil, is what else has to see the container stand still; it
	// runs beside CRIU, and the container is not thawed before both have ended. It
	// needs Cgroup.
	// Not with Exit: CRIU could have ended the container when this fails.
	While func(ctx context.Context) error

	// MemoryFile, if not nil, is called with the file of the largest process's memory
	// once CRIU has begun to write it: at most once, from another goroutine, and never
	// after Dump has returned. It must not wait. It is not called with PreDumps, without
	// Cgroup, or if no process has much more memory than the others.
	MemoryFile func(MemoryFile)

	Container  checkpoint.Container // for the manifest
	TerminalIO bool
	// Key signs the checkpoint; nil: it is not signed. With LeaveSum, AddSum does.
	Key *sign.Key
}

// DumpResult tells how a dump went.
type DumpResult struct {
	// Frozen is for how long the container stood still; with Exit, until CRIU
	// had written it.
	Frozen   time.Duration
	PreDumps []PreDump
	Stats    *DumpStats // nil if CRIU left none
	CRIU     string     // version; empty if its log does not tell
	Runtime  checkpoint.Runtime
	// Unsigned is for the caller, to say why there was no Key.
	Unsigned string
	// ManifestDigest is Checkpoint.ManifestDigest.
	ManifestDigest string
}

// Dump has CRIU write the container to a folder. The container is frozen when CRIU is
// about to look at it, and runs on when CRIU has left it and While has ended; see
// dumpRelay. One that is paused is frozen before and after. Whatever fails,
// it runs on (or stays paused), its network open, and the folder is as it was; the
// error holds CRIU's own error lines and says where its log is.
func Dump(ctx context.Context, r DumpRequest) (*DumpResult, error) {
	if err := r.stopped(); err != nil {
		return nil, fmt.Errorf("checkpoint container %s: %w", r.Container.ID, err)
	}
	folder, err := checkpoint.NewFolder(r.Dir)
	if err != nil {
		return nil, err
	}
	folder.LeaveSum, folder.Parent = r.LeaveSum, r.Parent
	if !r.LeaveSum {
		folder.Key = r.Key
	}
	if err := os.MkdirAll(r.WorkDir, 0o711); err != nil {
		return nil, errors.Join(fmt.Errorf("make CRIU's work folder: %w", err), folder.Discard())
	}
	// Remove a stale log: it would look complete.
	_ = os.Remove(r.logPath())
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
	// Before CRIU's work, as they may be gone after it.
	groups := r.subGroups(ctx)
	// Query in the background.
	version := sync.OnceValues(func() (name, version string) { return r.Runtime.Version(callCtx) })
	go version()
	criuCtx, removeConfig, err := withCRIUConfig(callCtx, r.WorkDir, r.criuConfig())
	if err != nil {
		return nil, errors.Join(err, folder.Discard())
	}
	defer removeConfig()
	opts := dumpOpts(r.Options, folder.Path(), r.WorkDir)
	if r.DumpOptions.TCPClose {
		opts.ExtraArgs = skipInFlight(version())
	}
	preDumps, err := r.preDump(ctx, callCtx, folder)
	if n := len(preDumps); n > 0 {
		opts.ParentPath = layout.PreDump(n)
	} else if r.Parent != nil && err == nil {
		opts.ParentPath = layout.ParentLink
		err = linkParent(folder.Path(), r.Parent.Dir())
	}
	_ = os.Remove(filepath.Join(r.WorkDir, layout.DumpStats))
	started := time.Now()
	var frozen window
	if err == nil {
		var watch *memoryWatch
		// Only after the thaw: it may be reading the mappings.
		defer func() { watch.wait() }()
		frozen, err = r.frozen(ctx, moments{
			begun: func() error {
				watch = r.watchMemory(ctx, folder.Path())
				return r.reserve(folder, len(preDumps) > 0)
			},
			written: func() { watch.end() },
		}, func(env []string) error {
			return r.Runtime.Checkpoint(runc.WithExtraEnv(criuCtx, env...), opts, actions...)
		})
		watch.end()
	}
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
		r.rollBack(ctx, netns)
		if derr := folder.Discard(); derr != nil {
			log.G(ctx).WithError(derr).Warn("remove an unfinished checkpoint")
		}
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		if own := (*ownError)(nil); errors.As(err, &own) {
			return nil, fmt.Errorf("checkpoint container %s: %w", r.Container.ID, own.error)
		}
		return nil, criuError("checkpoint", r.Container.ID, err, r.logPath())
	}
	// CRIU gives back the state it found; with Exit that may be frozen, and a
	// frozen process does not die.
	if r.Exit || !r.Paused {
		r.thaw(ctx)
	}
	if frozen.begun.IsZero() {
		frozen.begun = started
	}
	if frozen.ended.IsZero() {
		frozen.ended = time.Now()
	}
	result := &DumpResult{Frozen: frozen.ended.Sub(frozen.begun), PreDumps: preDumps, Stats: ReadDumpStats(filepath.Join(r.WorkDir, layout.DumpStats)),
		CRIU: LogVersion(r.logPath())}
	result.Runtime.Name, result.Runtime.Version = version()
	// Where this host's configuration has CRIU lock the network all the same, it
	// leaves a namespace locked that outlives the container. Without connections
	// to keep, that would only harm who shares the namespace.
	if r.Exit && !r.Options.OpenTCP {
		r.unlock(ctx, netns)
	}
	err = folder.Commit(checkpoint.Manifest{
		Container:  r.Container,
		Options:    r.Options,
		Exit:       r.Exit,
		TerminalIO: r.TerminalIO,
		Cgroups:    groups,
		CRIU:       result.CRIU,
		Runtime:    result.Runtime,
	}, r.Durable)
	result.ManifestDigest = folder.ManifestDigest()
	return result, err
}

// linkParent makes a link to the parent in the folder of the images. The runtimes want a
// path from that folder; with links in either path, what they and CRIU take it for differs.
func linkParent(images, parent string) error {
	images, err := filepath.EvalSymlinks(images)
	if err == nil {
		parent, err = filepath.Rel(images, parent)
	}
	if err == nil {
		err = os.Symlink(parent, filepath.Join(images, layout.ParentLink))
	}
	if err != nil {
		return &ownError{fmt.Errorf("link the checkpoint that it builds on: %w", err)}
	}
	return nil
}

// reserve makes sure, for a container that ends with the dump, that what comes after that
// has room.
func (r *DumpRequest) reserve(folder *checkpoint.Folder, preDumps bool) error {
	if !r.Exit {
		return nil
	}
	// Sums of the memory's chunks, in the manifest and in the envelope.
	resident := r.resident()
	more := resident / sumsPerByte
	if preDumps || r.Parent != nil {
		more += resident
	}
	return folder.Reserve(more)
}

// sumsPerByte: a chunk of 4 MiB has a sum of 43 bytes in the manifest, and of 58 in the
// envelope, and either is written anew when it is in its place.
const sumsPerByte = 16 << 10

// subGroups lists the control groups that the container has made: with version 2,
// CRIU brings back only those with processes in them, and no limits.
func (r *DumpRequest) subGroups(ctx context.Context) []process.SubGroup {
	if r.Cgroup == nil {
		return nil
	}
	groups, err := r.Cgroup.SubGroups(r.InitPid)
	if err != nil {
		log.G(ctx).WithError(err).WithField("container", r.Container.ID).Warn("the limits of the container's own control groups are not part of its checkpoint")
		return nil
	}
	return groups
}

// criuConfig is what CRIU is told that no runtime has a flag for, as lines of a
// CRIU configuration file.
func (r *DumpRequest) criuConfig() string {
	config := r.DumpOptions.criuConfig()
	if r.Track {
		// runc and crun ask CRIU for it only with a parent.
		config += "track-mem\n"
	}
	if r.Options.OpenTCP {
		return config
	}
	// The lock keeps packets from connections that the checkpoint holds. Without
	// any, putting it up and taking it down, by iptables, is all that it does: up
	// to 70 ms while the container stands still, and the same in each restore.
	return config + "network-lock skip\n"
}

// ownError is a failure that is not CRIU's, and on which it has nothing to say.
type ownError struct{ error }

var errNotTold = errors.New("CRIU has not told when it began: the OCI runtime does not call the program criu in its PATH")

func freezeError(err error) error { return fmt.Errorf("freeze it: %w", err) }

// moments are what is done in a dump at some moments.
type moments struct {
	begun   func() error // the container stands still, and CRIU has not looked at it
	written func()       // CRIU has left the processes, and they do not run on yet
}

// frozen has dump call the runtime, with more environment, and r.While beside it; the
// container is frozen when CRIU begins. One whose cgroup is not known is left to CRIU to
// freeze, and one that is paused is frozen already.
func (r *DumpRequest) frozen(ctx context.Context, at moments, dump func(env []string) error) (window, error) {
	switch {
	case r.Cgroup == nil && r.While != nil:
		return window{}, &ownError{fmt.Errorf("its cgroup could not be loaded, so it cannot be frozen: %w", errdefs.ErrFailedPrecondition)}
	case r.Cgroup != nil && !r.Paused:
		d := newDumpRelay(ctx, r, at)
		relay, env, err := newRelay(r.Bundle, r.Self, d)
		if err != nil {
			return window{}, &ownError{fmt.Errorf("get between the OCI runtime and CRIU: %w", err)}
		}
		err = dump(env)
		relay.close() // returns when nothing is being frozen any more
		return d.end(relay.explain(err))
	}
	if err := at.begun(); err != nil {
		return window{}, &ownError{err}
	}
	if r.While == nil {
		return window{}, dump(nil)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- r.While(ctx) }()
	err := dump(nil)
	at.written()
	if err != nil {
		cancel()
	}
	if werr := <-done; werr != nil && err == nil {
		return window{}, &ownError{werr}
	}
	return window{}, err
}

// freezeTimeout is CRIU's own (--timeout).
const freezeTimeout = 10 * time.Second

// freeze stops the container and waits until it stands still: what is done beside
// CRIU must not begin before.
func (r *DumpRequest) freeze(ctx context.Context) error {
	if err := r.stopped(); err != nil {
		return err // it was not when Dump was called
	}
	if err := r.Cgroup.Freeze(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, freezeTimeout,
		fmt.Errorf("some of its processes did not stop within %v; one may hang in a system call", freezeTimeout))
	defer cancel()
	return r.Cgroup.WaitFrozen(ctx)
}

// stopped refuses a container with a process that a signal has stopped, where
// CRIU freezes by the freezer of cgroup v1: it would wait for ever for that
// process, and the container would stay frozen.
func (r *DumpRequest) stopped() error {
	if r.Cgroup == nil || !r.Cgroup.IsV1() {
		return nil
	}
	pids, err := r.Cgroup.Pids()
	if err != nil {
		return nil // it is gone, or CRIU will tell
	}
	for _, pid := range pids {
		if process.IsStopped(int(pid)) {
			return fmt.Errorf("process %d is stopped by a signal, which CRIU cannot dump on a host with cgroup v1; continue it (SIGCONT) or end it: %w",
				pid, errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

// logPath is that of CRIU's log.
func (r *DumpRequest) logPath() string { return filepath.Join(r.WorkDir, layout.DumpLog) }

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
func dumpOpts(o checkpoint.Options, dir, workDir string) *runc.CheckpointOpts {
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

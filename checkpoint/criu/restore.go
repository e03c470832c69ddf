package criu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	runc "github.com/containerd/go-runc"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/process"
)

// RestoreRequest is what Restore needs to know.
type RestoreRequest struct {
	Runtime    process.Runtime
	ID         string
	Checkpoint *checkpoint.Checkpoint
	Bundle     string      // holds config.json and the mounted rootfs
	Spec       *specs.Spec // config.json
	WorkDir    string      // where CRIU leaves restore.log and stats-restore
	NoPivot    bool
	Self       string // a program that imports package standin

	// Check looks at the restored processes, of which the first is init, before
	// any of them has run. An error is the restore's, and none ever runs.
	Check func(ctx context.Context, pids []int) error

	IO            runc.IO            // the new stdio; nil with a terminal
	ConsoleSocket runc.ConsoleSocket // where the terminal is sent; nil without
}

// Restore has CRIU bring the container back and returns init's pid. A restore
// that fails leaves no process, cgroup, or state of the runtime behind, and can
// be tried again; the error holds CRIU's own error lines.
func Restore(ctx context.Context, r RestoreRequest) (int, error) {
	if err := os.MkdirAll(r.WorkDir, 0o711); err != nil {
		return 0, fmt.Errorf("make CRIU's work folder: %w", err)
	}
	options := r.Checkpoint.Options()
	closeTCP, err := mustCloseTCP(r.Checkpoint, r.Spec)
	if err != nil {
		return 0, err
	}
	criuConfig := ""
	if closeTCP {
		criuConfig = "tcp-close\n"
		options.OpenTCP = false
	}
	profile, err := lsmConfig(r.Checkpoint, r.Spec)
	if err != nil {
		return 0, err
	}
	criuConfig += profile + cgroupConfig(r.Spec)
	if err := r.amendRoot(); err != nil {
		return 0, err
	}
	dir, removeDir, err := r.imagesDir()
	if err != nil {
		return 0, err
	}
	defer removeDir()
	callCtx, removeConfig, err := withCRIUConfig(ctx, r.Bundle, criuConfig)
	if err != nil {
		return 0, err
	}
	defer removeConfig()
	if options.CgroupsMode == "strict" {
		// It forbids groups that are there before, as those are that the
		// runtime makes. This one brings their limits back too.
		options.CgroupsMode = "full"
	}
	opts := &runc.RestoreOpts{
		CheckpointOpts: *dumpOpts(options, dir, r.WorkDir),
		IO:             r.IO,
		ConsoleSocket:  r.ConsoleSocket,
		NoPivot:        r.NoPivot,
	}
	pid, err := r.restore(callCtx, opts)
	if err == nil {
		r.restoreSubGroups(ctx, pid)
		if options.OpenTCP {
			// CRIU has removed one lock; each try of a restore that was cut
			// short has added one.
			if uerr := UnlockAfterRestore(r.Spec, r.logPath()); uerr != nil {
				log.G(ctx).WithError(uerr).Error("remove CRIU's network lock after a restore")
			}
		}
		return pid, nil
	}
	r.cleanup(context.WithoutCancel(ctx))
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	} else if refused := (*refusal)(nil); errors.As(err, &refused) {
		return 0, fmt.Errorf("restore container %s: %w", r.ID, refused.error) // and CRIU has nothing to say to it
	}
	return 0, criuError("restore", r.ID, err, r.logPath())
}

// refusal is an error of RestoreRequest.Check.
type refusal struct{ error }

// restore calls the runtime, and has what it restores looked at before it runs.
func (r *RestoreRequest) restore(ctx context.Context, opts *runc.RestoreOpts) (int, error) {
	runCtx, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	relay, env, err := r.newRelay(ctx, end)
	if err != nil {
		return 0, err
	}
	defer relay.close()
	done := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(done)
		relay.cancel()
	})
	pid, err := r.Runtime.Restore(runc.WithExtraEnv(runCtx, env...), opts)
	if !stop() {
		<-done
	}
	return relay.verdict(pid, relay.explain(err))
}

// restoreSubGroups gives the container's own control groups, which CRIU has filled,
// their controllers and limits back. Controllers cannot be enabled before, as CRIU
// itself is in the container's group. Where this host cannot, the container runs
// with less limits than it had set itself; those of its spec are in force.
func (r *RestoreRequest) restoreSubGroups(ctx context.Context, pid int) {
	m := r.Checkpoint.Manifest()
	if m == nil || len(m.Cgroups) == 0 {
		return
	}
	path := ""
	if r.Spec.Linux != nil {
		path = r.Spec.Linux.CgroupsPath
	}
	cg, err := process.LoadCgroup(pid, path)
	if err == nil {
		err = cg.SetSubGroups(pid, m.Cgroups)
	}
	if err != nil {
		log.G(ctx).WithError(err).WithField("container", r.ID).Warn("limits that the container had set for its own control groups are not in force")
	}
}

// cleanup removes what a failed restore may have left: the runtime knows of a
// container only late in a restore, and its cgroup earlier.
func (r *RestoreRequest) cleanup(ctx context.Context) {
	if err := r.Runtime.Delete(ctx); err != nil {
		log.G(ctx).WithError(err).Warn("delete a container after its failed restore")
	}
	if r.Spec.Linux != nil {
		if err := process.RemoveCgroup(r.Spec.Linux.CgroupsPath); err != nil {
			log.G(ctx).WithError(err).Warn("remove a container's cgroup after its failed restore")
		}
	}
	if !r.lockedByDump() {
		if err := UnlockAfterRestore(r.Spec, r.logPath()); err != nil {
			log.G(ctx).WithError(err).Warn("remove CRIU's network lock after a failed restore")
		}
	}
	if err := RemoveLeftovers(r.WorkDir, layout.RestoreLog); err != nil {
		log.G(ctx).WithError(err).Warn("remove what CRIU has left of a failed restore")
	}
}

// lockedByDump tells whether the network may be locked since the dump. Until a
// further try, the lock has to keep the kernel from ending the connections.
func (r *RestoreRequest) lockedByDump() bool {
	m := r.Checkpoint.Manifest()
	if !r.Checkpoint.Options().OpenTCP || m != nil && !m.Exit {
		return false
	}
	lacks, err := lacksAddress(r.Checkpoint, r.Spec)
	return err == nil && !lacks
}

// logPath is that of CRIU's log.
func (r *RestoreRequest) logPath() string { return filepath.Join(r.WorkDir, layout.RestoreLog) }

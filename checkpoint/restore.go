package checkpoint

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	runc "github.com/containerd/go-runc"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/stasis-run/stasis/process"
)

// RestoreRequest is what Restore needs to know.
type RestoreRequest struct {
	Runtime *process.Runtime
	ID      string
	Image   *Image
	Bundle  string      // holds config.json and the mounted rootfs
	Spec    *specs.Spec // config.json
	WorkDir string      // where CRIU leaves restore.log and stats-restore
	NoPivot bool
	Self    string // a program that runs LoopbackHook when called with ActionLoopback

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
	options := r.Image.Options()
	criuConfig := ""
	if options.OpenTCP {
		closeTCP, err := mustCloseTCP(r.Image, r.Spec)
		if err != nil {
			return 0, err
		}
		if closeTCP {
			criuConfig = "tcp-close\n"
			options.OpenTCP = false
		}
	}
	if err := r.amendSpec(criuConfig); err != nil {
		return 0, err
	}
	opts := &runc.RestoreOpts{
		CheckpointOpts: *options.dumpOpts(r.Image.Dir(), r.WorkDir),
		IO:             r.IO,
		ConsoleSocket:  r.ConsoleSocket,
		NoPivot:        r.NoPivot,
	}
	pid, err := r.Runtime.Restore(ctx, opts)
	if err == nil {
		return pid, nil
	}
	r.cleanup(context.WithoutCancel(ctx))
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return 0, criuError("restore", r.ID, err, filepath.Join(r.WorkDir, "restore.log"))
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
}

package task

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/stasis-run/stasis/checkpoint/criu"
	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/process"
)

// Cleanup removes what a container leaves whose shim is gone, at whatever moment
// it went: its processes, its cgroup, its mounts, a CRIU at work on it. It tells
// how init ended, as far as that is known. What cannot be removed is logged:
// containerd deletes the bundle in any case.
func Cleanup(ctx context.Context, namespace, bundlePath, id string) (*taskapi.DeleteResponse, error) {
	b := bundle(bundlePath)
	logger := log.G(ctx).WithField("container", id)
	opts, err := b.readOptions()
	if err != nil {
		logger.WithError(err).Warn("read the runtime's options; using the defaults")
	}
	rt := process.NewRuntime(runtimeConfig(opts), namespace, bundlePath, id)
	cgroup := ""
	if config, _, err := b.config(); err != nil {
		logger.WithError(err).Warn("find the container's cgroup")
	} else {
		cgroup = config.cgroupsPath()
	}
	pid, err := b.initPid()
	alive := err == nil && process.InCgroup(pid, cgroup)
	if alive {
		freeFromCRIU(ctx, rt, pid, cgroup, filepath.Join(b.dumpDir(), layout.DumpLog))
	}
	if !alive {
		// In a restore, CRIU may hold processes that must not run. The runtime
		// would end one after the other.
		process.KillCgroup(cgroup)
	}
	if err := rt.Delete(ctx); err != nil {
		logger.WithError(err).Warn("delete the container from the runtime")
	}
	ended := time.Now()
	// The runtime does not know a container in the middle of a restore, but
	// CRIU and what it has made so far are in the container's cgroup.
	if err := process.RemoveCgroup(cgroup); err != nil {
		logger.WithError(err).Warn("remove the container's cgroup")
	}
	restoreDir := b.restoreDir(opts)
	if log := filepath.Join(restoreDir, layout.RestoreLog); criu.Interrupted(log) {
		spec, err := b.spec()
		if err == nil {
			err = criu.UnlockAfterRestore(spec, log)
		}
		if err != nil {
			logger.WithError(err).Warn("remove the network lock of a restore whose shim is gone")
		}
	}
	if err := errors.Join(criu.RemoveLeftovers(restoreDir, layout.RestoreLog), criu.RemoveLeftovers(b.dumpDir(), layout.DumpLog)); err != nil {
		logger.WithError(err).Warn("remove what CRIU has left")
	}
	if err := b.unmount(); err != nil {
		logger.WithError(err).Warn("unmount the container's rootfs")
	}
	b.removeTemporary(ctx)
	if err := os.RemoveAll(b.fetchedDir()); err != nil {
		logger.WithError(err).Warn("remove a copy of a checkpoint")
	}

	exit, err := b.readExit()
	if err == nil {
		return &taskapi.DeleteResponse{
			Pid:        uint32(exit.Pid),
			ExitStatus: uint32(exit.Status),
			ExitedAt:   timestamppb.New(exit.Timestamp),
		}, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		logger.WithError(err).Warn("read how the container ended")
	}
	return &taskapi.DeleteResponse{
		Pid:        uint32(pid),
		ExitStatus: 128 + uint32(unix.SIGKILL),
		ExitedAt:   timestamppb.New(ended),
	}, nil
}

// initPid reads the pid that the runtime has left; 0 with an error if none.
func (b bundle) initPid() (int, error) {
	data, err := os.ReadFile(b.path("init.pid"))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(data)))
}

// removeTemporary removes containerd's copy of a checkpoint whose restore the
// shim did not live to see.
func (b bundle) removeTemporary(ctx context.Context) {
	data, err := os.ReadFile(b.path(restoreFrom))
	if err != nil {
		return
	}
	path := string(data)
	// The note is ours, but a wrong one must not cost more than a checkpoint.
	if !tempCheckpoint().MatchString(filepath.Base(path)) {
		return
	}
	if err := os.RemoveAll(path); err != nil {
		log.G(ctx).WithError(err).Warn("remove containerd's temporary copy of a checkpoint")
	}
}

// freeFromCRIU ends a dump that has outlived its shim: it kills the CRIU that
// traces init, opens the network, which others may share, and thaws the container
// so that it can die. logPath is where CRIU's log is, unless the caller of the
// checkpoint wanted it elsewhere.
func freeFromCRIU(ctx context.Context, rt process.Runtime, init int, cgroup, logPath string) {
	tracer := process.TracerOf(init)
	if tracer > 1 {
		pid := tracer
		// What CRIU has called must not end later: its group, which the
		// runtime led.
		if group, err := unix.Getpgid(tracer); err == nil && group > 1 && group != unix.Getpgrp() && process.ParentOf(group) == 0 {
			pid = -group
		}
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && err != unix.ESRCH {
			log.G(ctx).WithError(err).Warn("end a checkpoint whose shim is gone")
		}
	}
	if tracer > 1 || criu.Interrupted(logPath) {
		if err := criu.UnlockNetwork(fmt.Sprintf("/proc/%d/ns/net", init), init, logPath); err != nil {
			log.G(ctx).WithError(err).Warn("remove the network lock of a checkpoint whose shim is gone")
		}
	}
	cg, err := process.LoadCgroup(init, cgroup)
	if err != nil {
		return // init is gone
	}
	cg.FreezeIn(rt.FreezerGroup())
	if frozen, err := cg.Frozen(); err != nil || !frozen {
		return
	}
	if err := cg.Thaw(); err != nil {
		log.G(ctx).WithError(err).Warn("thaw a container whose shim is gone")
	}
}

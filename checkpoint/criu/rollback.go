package criu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/process"
)

// A CRIU that is killed in the middle of a dump leaves the container with its
// TCP connections in repair mode, its network locked, and maybe frozen, or thawed
// though it was paused. rollBack puts that right, in an order that lets the
// container's processes notice none of it if they are still frozen.
func (r *DumpRequest) rollBack(ctx context.Context, netns string) {
	logger := log.G(ctx).WithField("container", r.Container.ID)
	if r.Cgroup != nil {
		if pids, err := r.Cgroup.Pids(); err == nil {
			endTCPRepair(pids)
		}
	}
	r.unlock(ctx, netns)
	if err := RemoveLeftovers(r.WorkDir, layout.DumpLog); err != nil {
		logger.WithError(err).Error("remove what CRIU has left")
	}
	if r.Cgroup == nil {
		return
	}
	if !r.Paused {
		r.thaw(ctx)
	} else if err := r.Cgroup.Freeze(); err != nil {
		logger.WithError(err).Error("pause the container again after a failed checkpoint")
	}
}

func (r *DumpRequest) unlock(ctx context.Context, netns string) {
	if err := UnlockNetwork(netns, r.InitPid, r.logPath()); err != nil {
		log.G(ctx).WithError(err).WithField("container", r.Container.ID).Error("remove CRIU's network lock")
	}
}

// UnlockNetwork removes the rules with which CRIU keeps packets from a container
// during a dump, from the network namespace at the path netns. CRIU removes them
// itself unless it is killed, or the container ends with the dump. pid is that of
// the container's init, logPath is CRIU's log.
func UnlockNetwork(netns string, pid int, logPath string) error {
	return process.InNamespace(netns, unix.CLONE_NEWNET, func() error {
		return unlockNetwork(append(runIDs(logPath), strconv.Itoa(pid)))
	})
}

// UnlockAfterRestore is UnlockNetwork for a restore into a network namespace that
// is there without the container, unless that is the host's: CRIU leaves alone
// all but the connections there.
func UnlockAfterRestore(spec *specs.Spec, logPath string) error {
	path, _ := networkNamespace(spec)
	if path == "" {
		return nil
	}
	err := UnlockNetwork(path, 0, logPath)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // the namespace is gone
	}
	return err
}

var runID = lazyRegexp(`CRIU run id = ([0-9a-fA-F-]{36})(?:\n|$)`)

// runIDs returns the numbers that a log says CRIU has given itself.
func runIDs(logPath string) []string {
	data, err := capture.ReadPart(logPath, logHead, false)
	if err != nil {
		return nil
	}
	var ids []string
	for _, m := range runID().FindAllSubmatch(data, -1) {
		ids = append(ids, string(m[1]))
	}
	return ids
}

// endTCPRepair takes the TCP sockets of processes out of the mode that CRIU
// needs in order to read a connection. In it, the process can neither send nor
// receive.
func endTCPRepair(pids []uint32) {
	for _, pid := range pids {
		pidfd, err := unix.PidfdOpen(int(pid), 0)
		if err != nil {
			continue // it has exited
		}
		dir := fmt.Sprintf("/proc/%d/fd", pid)
		entries, _ := os.ReadDir(dir)
		for _, e := range entries {
			target, _ := os.Readlink(filepath.Join(dir, e.Name()))
			number, err := strconv.Atoi(e.Name())
			if err != nil || !strings.HasPrefix(target, "socket:") {
				continue
			}
			fd, err := unix.PidfdGetfd(pidfd, number, 0)
			if err != nil {
				continue
			}
			if mode, err := unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR); err == nil && mode == 1 {
				err = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR, 0)
				// The mode has overwritten this. Servers set it, and could not
				// start again without it as long as there is a connection.
				err = errors.Join(err, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
				if err != nil {
					log.L.WithError(err).WithField("pid", pid).Error("release a TCP connection after a failed checkpoint")
				}
			}
			unix.Close(fd)
		}
		unix.Close(pidfd)
	}
}

const (
	// settleTimeout is how long a dump that is cancelled may go on until CRIU
	// can be killed.
	settleTimeout  = 5 * time.Second
	settleInterval = time.Millisecond
)

// settle waits until CRIU can be killed without killing the container. While
// CRIU puts its code into a process, takes it out, or reads its threads'
// registers, it has changed the process's own code and registers, with which
// the process would run into a SIGTRAP. These moments last for less than a
// millisecond; CRIU's log tells when they are. On return CRIU is stopped and the
// container frozen, so that nothing changes until it is killed.
func (r *DumpRequest) settle() {
	for deadline := time.Now().Add(settleTimeout); time.Now().Before(deadline); time.Sleep(settleInterval) {
		criu := process.TracerOf(r.InitPid)
		if criu == 0 || !ours(criu) {
			return // it has not begun, or has ended
		}
		if unix.Kill(criu, unix.SIGSTOP) != nil {
			return
		}
		for !process.IsStopped(criu) && process.TracerOf(r.InitPid) == criu && time.Now().Before(deadline) {
			time.Sleep(settleInterval / 10)
		}
		if process.IsStopped(criu) && killable(r.logPath()) {
			if r.Cgroup != nil {
				_ = r.Cgroup.Freeze()
			}
			return
		}
		_ = unix.Kill(criu, unix.SIGCONT)
	}
}

// ours tells whether a process is of a group that this one has started, as CRIU
// is: the leader is the runtime.
func ours(pid int) bool {
	group, err := unix.Getpgid(pid)
	return err == nil && process.ParentOf(group) == os.Getpid()
}

// stages are lines of CRIU's log: from then on it can be killed or not.
var stages = map[string]bool{
	"Parasite syscall_ip at ":           false,
	" has been switched to daemon mode": true,
	" to trap":                          false,
	"Dumping mm (pid: ":                 true,
}

var mountRoot = lazyRegexp(`/tmp/\.criu\.mntns\.[A-Za-z0-9]{6}\b`)

// RemoveLeftovers removes what CRIU leaves in its work folder, and elsewhere, if it
// is killed: folders in which it has mounted the host's cgroups. Whoever
// removes the work folder as it is would try to remove those. log is the name of
// CRIU's log there.
func RemoveLeftovers(workDir, log string) error {
	dir, err := filepath.EvalSymlinks(workDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	leftovers, _ := filepath.Glob(filepath.Join(dir, ".criu.*"))
	for _, path := range leftovers {
		err := mount.UnmountRecursive(path, unix.MNT_DETACH)
		if err == nil {
			err = os.Remove(path)
		}
		errs = append(errs, err)
	}
	// An empty folder in which the processes had their mounts.
	if data, err := capture.ReadPart(filepath.Join(dir, log), logTail, false); err == nil {
		if root := mountRoot().Find(data); root != nil {
			if err := os.Remove(string(root)); !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// finished tells whether CRIU has written everything. With Exit, it has begun to
// kill the container.
func finished(logPath string) bool {
	data, err := capture.ReadPart(logPath, logTail, true)
	return err == nil && bytes.Contains(data, []byte("Unfreezing tasks into 2\n")) // TASK_DEAD; 1 after a failure
}

// Interrupted tells whether a log of CRIU's has no end.
func Interrupted(logPath string) bool {
	data, err := capture.ReadPart(logPath, logTail, true)
	if err != nil {
		return false
	}
	for _, end := range []string{"Dumping finished successfully", "Dumping FAILED", "Pre-dumping finished successfully", "Pre-dumping FAILED", "Restore finished successfully", "Restoring FAILED"} {
		if bytes.Contains(data, []byte(end)) {
			return false
		}
	}
	return true
}

func killable(logPath string) bool {
	data, err := capture.ReadPart(logPath, logTail, true)
	if err != nil {
		return true
	}
	last, answer := -1, true
	for text, ok := range stages {
		if i := strings.LastIndex(string(data), text); i > last {
			last, answer = i, ok
		}
	}
	return answer
}

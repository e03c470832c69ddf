package criu

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	ipcvar "github.com/checkpoint-restore/go-criu/v8/crit/images/ipc-var"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/utsns"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/criu/img"
	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/process"
)

// A container of a pod joins the pod's UTS and IPC namespaces. CRIU then sets the
// names and limits that the checkpoint has in them, as in namespaces of the
// container's own, and the whole pod would be called what another was. Which names
// and limits a pod has, its own spec has decided. So CRIU is given the images with
// what the namespaces have already.

// sharedDir is the folder in the bundle that holds them.
const sharedDir = "joined"

// imagesDir returns the folder that CRIU is to restore from. Call remove when it
// has.
func (r *RestoreRequest) imagesDir() (dir string, remove func(), err error) {
	changed := map[string][]byte{}
	for _, joined := range []struct {
		kind   specs.LinuxNamespaceType
		series layout.Series
		flag   int
		patch  func([]byte) ([]byte, error)
	}{
		{specs.UTSNamespace, layout.UTSNamespace, unix.CLONE_NEWUTS, patchUTS},
		{specs.IPCNamespace, layout.IPCVariables, unix.CLONE_NEWIPC, amendIPC},
	} {
		path := joinedNamespace(r.Spec, joined.kind)
		if path == "" {
			continue
		}
		for _, name := range r.Checkpoint.Names() {
			if !joined.series.Has(name) {
				continue
			}
			data, err := capture.ReadPart(filepath.Join(r.Checkpoint.Dir(), name), img.MaxMessage, false)
			if err == nil {
				err = process.InNamespace(path, joined.flag, func() (err error) {
					changed[name], err = joined.patch(data)
					return err
				})
			}
			if err != nil {
				return "", nil, fmt.Errorf("have the container keep the %s namespace of its pod as it is: %s: %w", joined.kind, name, err)
			}
		}
	}
	if len(changed) == 0 {
		return r.Checkpoint.Dir(), func() {}, nil
	}
	upper := filepath.Join(r.Bundle, sharedDir)
	removeUpper := func() { _ = os.RemoveAll(upper) }
	merged, err := layOver(r.Checkpoint.Dir(), upper, changed)
	if err != nil {
		removeUpper()
		return "", nil, fmt.Errorf("give CRIU other images than the checkpoint's: %w", err)
	}
	// By this name the runtime and CRIU can open it, though it is mounted nowhere.
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), merged.Fd()), func() {
		merged.Close()
		removeUpper()
	}, nil
}

// layOver returns a folder that has what lower has, but for some files, which it
// puts into the folder upper. It is a mount without a place, so nothing has to undo
// it if this process is killed. Links would not do: CRIU opens images from within
// the container's root.
func layOver(lower, upper string, files map[string][]byte) (*os.File, error) {
	if err := os.RemoveAll(upper); err != nil { // of a try that was cut short
		return nil, err
	}
	if err := os.Mkdir(upper, 0o700); err != nil {
		return nil, err
	}
	for name, data := range files {
		if err := os.WriteFile(filepath.Join(upper, name), data, 0o600); err != nil {
			return nil, err
		}
	}
	// By descriptors, as a path may be longer than the kernel takes here, or have
	// a colon.
	var lowers []string
	for _, path := range []string{upper, lower} {
		d, err := os.OpenFile(path, unix.O_PATH|unix.O_DIRECTORY, 0)
		if err != nil {
			return nil, err
		}
		defer d.Close()
		lowers = append(lowers, fmt.Sprintf("/proc/self/fd/%d", d.Fd()))
	}
	fs, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("fsopen overlay", err)
	}
	defer unix.Close(fs)
	if err := unix.FsconfigSetString(fs, "lowerdir", strings.Join(lowers, ":")); err != nil {
		return nil, os.NewSyscallError("fsconfig lowerdir", err)
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return nil, os.NewSyscallError("fsconfig create", err)
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOEXEC|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOSUID)
	if err != nil {
		return nil, os.NewSyscallError("fsmount", err)
	}
	return os.NewFile(uintptr(fd), lower), nil
}

// joinedNamespace is the path of the namespace that a spec has the container join,
// or "".
func joinedNamespace(spec *specs.Spec, kind specs.LinuxNamespaceType) string {
	if spec.Linux != nil {
		for _, ns := range spec.Linux.Namespaces {
			if ns.Type == kind {
				return ns.Path
			}
		}
	}
	return ""
}

// patchUTS is called in the namespace.
func patchUTS(image []byte) ([]byte, error) {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return nil, err
	}
	return img.WithMessage(image, &utsns.UtsnsEntry{
		Nodename:   proto.String(unix.ByteSliceToString(name.Nodename[:])),
		Domainname: proto.String(unix.ByteSliceToString(name.Domainname[:])),
	})
}

// amendIPC is called in the namespace.
func amendIPC(image []byte) ([]byte, error) {
	s := sysctls{}
	e := &ipcvar.IpcVarEntry{
		MsgCtlmax:        s.uint32("kernel/msgmax"),
		MsgCtlmnb:        s.uint32("kernel/msgmnb"),
		MsgCtlmni:        s.uint32("kernel/msgmni"),
		AutoMsgmni:       s.uint32("kernel/auto_msgmni"),
		ShmCtlmax:        s.uint64("kernel/shmmax"),
		ShmCtlall:        s.uint64("kernel/shmall"),
		ShmCtlmni:        s.uint32("kernel/shmmni"),
		ShmRmidForced:    s.uint32("kernel/shm_rmid_forced"),
		MqQueuesMax:      s.uint32("fs/mqueue/queues_max"),
		MqMsgMax:         s.uint32("fs/mqueue/msg_max"),
		MqMsgsizeMax:     s.uint32("fs/mqueue/msgsize_max"),
		MqMsgDefault:     s.uint32("fs/mqueue/msg_default"),
		MqMsgsizeDefault: s.uint32("fs/mqueue/msgsize_default"),
		// The next IDs are set for one object only, and are left out here.
	}
	for _, n := range s.read("kernel/sem") {
		e.SemCtls = append(e.SemCtls, uint32(n))
	}
	if s.err != nil {
		return nil, s.err
	}
	return img.WithMessage(image, e)
}

// sysctls reads settings of the kernel, and keeps the first error.
type sysctls struct{ err error }

func (s *sysctls) read(name string) (values []uint64) {
	data, err := os.ReadFile("/proc/sys/" + name)
	for _, field := range strings.Fields(string(data)) {
		n, perr := strconv.ParseUint(field, 10, 64)
		err = errors.Join(err, perr)
		values = append(values, n)
	}
	if err == nil && len(values) == 0 {
		err = fmt.Errorf("%s is empty", name)
	}
	if err != nil {
		values = []uint64{0}
	}
	if s.err == nil {
		s.err = err
	}
	return values
}

func (s *sysctls) uint64(name string) *uint64 { return proto.Uint64(s.read(name)[0]) }
func (s *sysctls) uint32(name string) *uint32 { return proto.Uint32(uint32(s.read(name)[0])) }

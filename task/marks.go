package task

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/fault"
)

// marks are notes of what became of restores. Memory of then must not meet files
// of later: a database would write nonsense into them.
type marks struct {
	// own is for this very container: once its processes were restored, its root
	// filesystem has changed. It is empty as long as that is not mounted and is
	// of a kind that has no other place.
	own mark
	// pod is for the containers of this name in this pod, of which the kubelet
	// makes a new one for each restart; its volumes have changed. It is empty
	// outside of the kubelet's pods.
	pod mark
	// before is what pod said before the restore that is under way.
	before fate
}

// mark is a folder that has an extended attribute, whose value is a fate.
type mark string

const restoreMark = "trusted.stasis.restored"

// fate is what became of a restore.
type fate string

const (
	fateNone  fate = ""      // there was none yet, or it left no process
	fateBegun fate = "begun" // nobody knows
	fateDone  fate = "done"  // the processes came back
)

func (m mark) get() (fate, error) {
	if m == "" {
		return fateNone, nil
	}
	value := make([]byte, 16)
	n, err := unix.Lgetxattr(string(m), restoreMark, value)
	switch {
	case errors.Is(err, unix.ENODATA), errors.Is(err, unix.ENOTSUP), errors.Is(err, unix.ENOENT):
		return fateNone, nil
	case err != nil:
		return fateNone, fmt.Errorf("look in %s whether there was a restore: %w", m, err)
	}
	return fate(value[:n]), nil
}

func (m mark) set(f fate) error {
	if m == "" {
		return nil
	}
	var err error
	if f == fateNone {
		if err = unix.Lremovexattr(string(m), restoreMark); errors.Is(err, unix.ENODATA) {
			err = nil
		}
	} else {
		err = unix.Lsetxattr(string(m), restoreMark, []byte(f), 0)
	}
	if err != nil {
		return fmt.Errorf("note in %s what becomes of the restore (attribute %s): %w", m, restoreMark, err)
	}
	return nil
}

// podMark is the mark for a container's pod. It is the kubelet's folder for the
// containers of this name, which it removes with the pod: it has the file that is
// mounted as the termination log in it.
func (c *config) podMark() mark {
	uid, name := c.Annotations[criSandboxUID], c.Annotations[criContainerName]
	if uid == "" || name == "" {
		return ""
	}
	for _, m := range c.Mounts {
		dir, file := filepath.Split(filepath.Clean(m.Source))
		dir = filepath.Clean(dir)
		containers, pod := filepath.Dir(dir), filepath.Dir(filepath.Dir(dir))
		if file == "" || filepath.Base(dir) != name || filepath.Base(containers) != "containers" || filepath.Base(pod) != uid ||
			filepath.Base(filepath.Dir(pod)) != "pods" {
			continue
		}
		if info, err := os.Lstat(dir); err == nil && info.IsDir() {
			return mark(dir)
		}
	}
	return ""
}

// again decides whether a container is to be restored, as far as that was done
// before: if not, it starts afresh.
func (m *marks) again(policy restartPolicy) (bool, error) {
	own, err := m.own.get()
	if err != nil {
		return false, err
	}
	pod, err := m.pod.get()
	switch {
	case err != nil:
		return false, err
	case own == fateBegun:
		return false, fault.New(errdefs.ErrFailedPrecondition, "a restore of this container was cut short, and its processes may have changed its files since; make a new container")
	case own != fateNone && policy == restartRestore:
		return false, fault.New(errdefs.ErrFailedPrecondition, "this container was restored before, and its files have changed since; make a new container to restore again")
	case own != fateNone:
		return false, nil
	case pod == fateBegun && policy != restartRestore:
		return false, fault.New(errdefs.ErrFailedPrecondition, "a restore of this container in this pod was cut short, and its processes may have changed its volumes since; make a new pod, or annotate it with %s=%s to restore all the same",
			annotationRestart, restartRestore)
	case pod != fateNone:
		return policy == restartRestore, nil
	}
	return true, nil
}

// begin notes that a restore begins: both marks, or none.
func (m *marks) begin() (err error) {
	if m.before, err = m.pod.get(); err != nil {
		return err
	}
	if err := m.own.set(fateBegun); err != nil {
		return err
	}
	if err := m.pod.set(fateBegun); err != nil {
		return errors.Join(err, m.own.set(fateNone))
	}
	return nil
}

// failed notes that it left no process.
func (m *marks) failed(id string) {
	if err := errors.Join(m.own.set(fateNone), m.pod.set(m.before)); err != nil {
		log.L.WithError(err).WithField("container", id).Warn("note that a restore has failed; another will be refused")
	}
}

// restored notes that the processes are back. A container that runs is not ended
// for a note: without it, it cannot be started again.
func (m *marks) restored(id string) {
	if err := errors.Join(m.own.set(fateDone), m.pod.set(fateDone)); err != nil {
		log.L.WithError(err).WithField("container", id).Warn("note that a container was restored; it cannot be started again")
	}
}

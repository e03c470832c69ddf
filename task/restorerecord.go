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

// restoreRecord is where it is recorded what became of a container's restores. Old
// memory must not run on newer files: a database would write nonsense into them.
//
// The zero value records nothing: a restore that root has asked for by a path is done
// as often as it is asked for.
type restoreRecord struct {
	// own is for this very container: once its processes were restored, its root
	// filesystem has changed. It is empty as long as that is not mounted and is
	// of a kind that has no other place.
	own recordFolder
	// pod is for the containers of this name in this pod, of which the kubelet
	// makes a new one for each restart; its volumes have changed. It is empty
	// outside of the kubelet's pods.
	pod recordFolder
}

// recordFolder is a folder with an extended attribute whose value is a restoreState.
// An empty path is no folder: its state is restoreNone, and setting it does nothing.
type recordFolder string

const recordAttribute = "trusted.stasis.restored"

// restoreState is what became of a restore.
type restoreState string

const (
	restoreNone  restoreState = ""      // there was none yet, or it left no process
	restoreBegun restoreState = "begun" // nobody knows
	restoreDone  restoreState = "done"  // the processes came back
)

func (f recordFolder) get() (restoreState, error) {
	if f == "" {
		return restoreNone, nil
	}
	value := make([]byte, 16)
	n, err := unix.Lgetxattr(string(f), recordAttribute, value)
	switch {
	case errors.Is(err, unix.ENODATA), errors.Is(err, unix.ENOTSUP), errors.Is(err, unix.ENOENT):
		return restoreNone, nil
	case err != nil:
		return restoreNone, fmt.Errorf("look in %s whether there was a restore: %w", f, err)
	}
	return restoreState(value[:n]), nil
}

func (f recordFolder) set(s restoreState) error {
	if f == "" {
		return nil
	}
	var err error
	if s == restoreNone {
		if err = unix.Lremovexattr(string(f), recordAttribute); errors.Is(err, unix.ENODATA) {
			err = nil
		}
	} else {
		err = unix.Lsetxattr(string(f), recordAttribute, []byte(s), 0)
	}
	if err != nil {
		return fmt.Errorf("record in %s what becomes of the restore (attribute %s): %w", f, recordAttribute, err)
	}
	return nil
}

// podRecord is where restores are recorded for a container's pod. It is the kubelet's
// folder for the containers of this name, which it removes with the pod: it has the
// file that is mounted as the termination log in it.
func (c *config) podRecord() recordFolder {
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
			return recordFolder(dir)
		}
	}
	return ""
}

// again decides whether a container is to be restored, as far as that was done
// before: if not, it starts afresh.
func (r restoreRecord) again(policy restartPolicy) (bool, error) {
	own, err := r.own.get()
	if err != nil {
		return false, err
	}
	pod, err := r.pod.get()
	switch {
	case err != nil:
		return false, err
	case own == restoreBegun:
		return false, fault.New(errdefs.ErrFailedPrecondition, "a restore of this container was cut short, and its processes may have changed its files since; make a new container")
	case own != restoreNone && policy == restartRestore:
		return false, fault.New(errdefs.ErrFailedPrecondition, "this container was restored before, and its files have changed since; make a new container to restore again")
	case own != restoreNone:
		return false, nil
	case pod == restoreBegun && policy != restartRestore:
		return false, fault.New(errdefs.ErrFailedPrecondition, "a restore of this container in this pod was cut short, and its processes may have changed its volumes since; make a new pod, or annotate it with %s=%s to restore all the same",
			annotationRestart, restartRestore)
	case pod != restoreNone:
		return policy == restartRestore, nil
	}
	return true, nil
}

// begin records that a restore begins: in both places, or in none. The caller ends
// the attempt with failed, if no process has run, or with restored.
func (r restoreRecord) begin() (restoreAttempt, error) {
	before, err := r.pod.get()
	if err != nil {
		return restoreAttempt{}, err
	}
	if err := r.own.set(restoreBegun); err != nil {
		return restoreAttempt{}, err
	}
	if err := r.pod.set(restoreBegun); err != nil {
		return restoreAttempt{}, errors.Join(err, r.own.set(restoreNone))
	}
	return restoreAttempt{record: r, before: before}, nil
}

// restoreAttempt is a restore that is recorded as begun.
type restoreAttempt struct {
	record restoreRecord
	before restoreState // what record.pod said
}

// failed records that it left no process.
func (a restoreAttempt) failed(id string) {
	if err := errors.Join(a.record.own.set(restoreNone), a.record.pod.set(a.before)); err != nil {
		log.L.WithError(err).WithField("container", id).Warn("record that a restore has failed; another will be refused")
	}
}

// restored records that the processes are back. A container that runs is not ended
// for a record: without it, it cannot be started again.
func (a restoreAttempt) restored(id string) {
	if err := errors.Join(a.record.own.set(restoreDone), a.record.pod.set(restoreDone)); err != nil {
		log.L.WithError(err).WithField("container", id).Warn("record that a container was restored; it cannot be started again")
	}
}

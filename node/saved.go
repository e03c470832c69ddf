package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/pkg/identifiers"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/api"
	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/layout"
)

// The checkpoints of bundle containers belong to a container's name and stay when it ends.
// Each is a folder in the state folder:
//
//	saved/NAMESPACE/CONTAINER/CHECKPOINT/saved.json  Saved
//	saved/NAMESPACE/CONTAINER/CHECKPOINT/images/     the checkpoint as the shim made it
//
// It is made in a folder of saving/, which is renamed when it is whole, so what lies in
// saved/ is whole. An empty folder there reserves the name for a checkpoint being made.
const (
	savedFolder  = "saved"
	savingFolder = "saving"
	savedRecord  = "saved.json"
)

// maxSavedRecord bounds saved.json, in bytes.
const maxSavedRecord = 64 << 10

// SaveRequest says how to save a bundle container.
type SaveRequest struct {
	Container string
	Name      string // of the checkpoint, which the container has no other of
	// Exit ends the container with the checkpoint.
	Exit    bool
	Options DumpOptions

	Progress Progress
}

// Saved is a checkpoint of a bundle container.
type Saved struct {
	Name      string      `json:"name"`
	Container string      `json:"container"`
	Namespace string      `json:"namespace"`
	Time      time.Time   `json:"time"`
	Exit      bool        `json:"exit"`
	Options   DumpOptions `json:"options"`
	// Frozen is for how long the container stood still; 0 if that is not known.
	Frozen     time.Duration `json:"frozen_ns"`
	ImageBytes int64         `json:"image_bytes"` // of CRIU's images

	dir string
}

func (s *Saved) images() string { return filepath.Join(s.dir, layout.Images) }

// Save makes a checkpoint of a bundle container under a name. The error matches
// errdefs.ErrAlreadyExists if it has one of that name. After any other error there is
// none, and the container runs; but if it has ended with the dump, and that could not be
// completed, the error says in what folder it is.
func (n *Node) Save(ctx context.Context, r SaveRequest) (_ *Saved, err error) {
	if err := identifiers.Validate(r.Name); err != nil {
		return nil, requestError("checkpoint: %v", err)
	}
	if r.Options.LinkRemap && !r.Exit || r.Options.OpenTCP && r.Options.TCPClose {
		return nil, requestError("options of the dump that exclude each other")
	}
	container, task, err := n.bundle(ctx, r.Container)
	if err != nil {
		return nil, err
	}
	bar := r.Progress.of(r.Container)
	defer bar.end()
	parent, err := n.stateDir(filepath.Join(savedFolder, namespaceOf(ctx), r.Container))
	if err != nil {
		return nil, err
	}
	final := filepath.Join(parent, r.Name)
	if err := os.Mkdir(final, 0o700); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return nil, fmt.Errorf("%s has a checkpoint %s: %w", r.Container, r.Name, errdefs.ErrAlreadyExists)
		}
		return nil, fmt.Errorf("save %s: %w", r.Container, err)
	}
	w, err := n.newLocked(savingFolder)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("save %s: %w", r.Container, err), os.Remove(final))
	}
	saved := &Saved{Name: r.Name, Container: container.ID(), Namespace: namespaceOf(ctx), Time: time.Now(), Exit: r.Exit, Options: r.Options, dir: w.dir}
	defer func() {
		// Never what is all that is left of a container.
		if err != nil && saved.mayBeTheLast() {
			err = errors.Join(fmt.Errorf("save %s: %w; it has ended, and what there is of its checkpoint %s is in %s", r.Container, err, r.Name, saved.images()), os.Remove(final))
			w.release()
			return
		}
		if err != nil {
			err = errors.Join(fmt.Errorf("save %s: %w", r.Container, err), w.remove(), os.Remove(final))
		}
	}()
	if err := saved.write(); err != nil {
		return nil, err
	}
	conn, err := shimOf(int(task.Pid()))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	result, err := conn.checkpoint(ctx, &api.CheckpointRequest{
		Id: container.ID(), ImagePath: saved.images(), Exit: r.Exit, Options: r.Options.forShim(),
	}, bar, nil)
	if err != nil {
		return nil, err
	}
	if result.Unsigned != "" {
		n.log.Warn(fmt.Sprintf("checkpoint %s of %s is not signed: %s", r.Name, r.Container, result.Unsigned))
	}
	saved.Frozen, saved.ImageBytes = time.Duration(result.FrozenNs), int64(result.ImageBytes)
	if err := saved.write(); err != nil {
		return nil, err
	}
	if err := saved.place(final); err != nil {
		return nil, err
	}
	w.release()
	return saved, nil
}

// mayBeTheLast tells whether a folder of savingFolder may hold all that is left of a
// container: CRIU has written everything, and was to end the container then.
func (s *Saved) mayBeTheLast() bool {
	return s.Exit && (isWhole(s.images()) || checkpoint.Uncommitted(s.images()) != "")
}

// write writes the record of a checkpoint to its folder.
func (s *Saved) write() error {
	data, err := json.Marshal(s)
	if err != nil {
		return err
	}
	// Under another name first: a record is whole or not there.
	tmp := filepath.Join(s.dir, savedRecord+".new")
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		return err
	}
	if err := capture.Sync(tmp); err != nil {
		return err
	}
	return os.Rename(tmp, filepath.Join(s.dir, savedRecord))
}

// place gives a whole checkpoint its place, where an empty folder or nothing is.
func (s *Saved) place(final string) error {
	if err := capture.Sync(s.dir); err != nil {
		return err
	}
	// os.Rename would refuse the empty folder.
	if err := unix.Rename(s.dir, final); err != nil {
		return &os.LinkError{Op: "rename", Old: s.dir, New: final, Err: err}
	}
	s.dir = final
	return capture.Sync(filepath.Dir(final))
}

// SavedCheckpoints lists the checkpoints of a bundle container, the oldest first. It may
// have ended. The error matches errdefs.ErrNotFound if there is neither such a container
// nor a checkpoint of it.
func (n *Node) SavedCheckpoints(ctx context.Context, container string) ([]Saved, error) {
	if err := identifiers.Validate(container); err != nil {
		return nil, requestError("container: %v", err)
	}
	dir := n.savedDir(ctx, container)
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list the checkpoints of %s: %w", container, err)
	}
	all := []Saved{}
	for _, e := range entries {
		s, err := readSaved(filepath.Join(dir, e.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue // being made, or removed
		}
		if err != nil {
			return nil, fmt.Errorf("list the checkpoints of %s: %w", container, err)
		}
		all = append(all, *s)
	}
	if len(all) == 0 {
		if _, _, err := n.bundle(ctx, container); err != nil {
			return nil, err
		}
	}
	slices.SortFunc(all, func(a, b Saved) int { return a.Time.Compare(b.Time) })
	return all, nil
}

// savedDir is where the checkpoints of a container are. Its name has to be valid.
func (n *Node) savedDir(ctx context.Context, container string) string {
	return filepath.Join(n.o.State, savedFolder, namespaceOf(ctx), container)
}

// saved returns one of a container's checkpoints.
func (n *Node) saved(ctx context.Context, container, name string) (*Saved, error) {
	if err := errors.Join(identifiers.Validate(container), identifiers.Validate(name)); err != nil {
		return nil, requestError("checkpoint: %v", err)
	}
	s, err := readSaved(filepath.Join(n.savedDir(ctx, container), name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s has no checkpoint %s: %w", container, name, errdefs.ErrNotFound)
	}
	return s, err
}

// readSaved reads the record of a checkpoint. The error matches fs.ErrNotExist if it is
// being made.
func readSaved(dir string) (*Saved, error) {
	data, err := capture.ReadSmall(filepath.Join(dir, savedRecord), maxSavedRecord)
	if err != nil {
		return nil, err
	}
	s := &Saved{dir: dir}
	if err := json.Unmarshal(data, s); err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, savedRecord), err)
	}
	return s, nil
}

// RemoveSaved removes a checkpoint of a bundle container.
func (n *Node) RemoveSaved(ctx context.Context, container, name string) error {
	s, err := n.saved(ctx, container, name)
	if err != nil {
		return err
	}
	w, err := n.newLocked(savingFolder)
	if err != nil {
		return fmt.Errorf("remove checkpoint %s of %s: %w", name, container, err)
	}
	// At once, so that none is there in part.
	if err := os.Rename(s.dir, filepath.Join(w.dir, "removed")); err != nil {
		err = fmt.Errorf("remove checkpoint %s of %s: %w", name, container, err)
		return errors.Join(err, w.remove())
	}
	// Only if it was the last.
	_ = os.Remove(filepath.Dir(s.dir))
	return w.remove()
}

// Recover is called before any checkpoint is saved. It gives those that a crash has kept
// from their place that place, and removes what is left of those that were being made.
// What may be all that is left of a container stays where it is, with an error.
func (n *Node) Recover(ctx context.Context) error {
	err := n.leftovers(savingFolder, func(w *work) error {
		s, err := readSaved(w.dir)
		if errors.Is(err, fs.ErrNotExist) {
			return w.remove() // nothing was saved yet, or it was being removed
		}
		if err != nil {
			w.release()
			return fmt.Errorf("what is left of a checkpoint in %s: %w", w.dir, err)
		}
		if checkpoint.IsBeingWritten(s.images()) {
			waitSettled(ctx, s.images())
		}
		switch {
		case isWhole(s.images()):
			err = n.placeAgain(ctx, s)
		case s.mayBeTheLast():
			err = errors.New("CRIU has written all of it, and it was not completed")
		default:
			return w.remove()
		}
		w.release()
		if err != nil {
			return fmt.Errorf("checkpoint %s of %s, in %s: %w", s.Name, s.Container, w.dir, err)
		}
		return nil
	})
	err = errors.Join(err, n.leftovers(workFolder, func(w *work) error {
		defer w.release() // for Prune
		return n.resumeLeft(ctx, w.dir)
	}))
	reserved, gerr := filepath.Glob(filepath.Join(n.o.State, savedFolder, "*", "*", "*"))
	for _, dir := range reserved {
		_ = os.Remove(dir) // if it is empty
	}
	return errors.Join(err, gerr)
}

// placeAgain gives a checkpoint its place, when it was read back.
func (n *Node) placeAgain(ctx context.Context, s *Saved) error {
	for _, name := range []string{s.Namespace, s.Container, s.Name} {
		if err := identifiers.Validate(name); err != nil {
			return err
		}
	}
	if _, err := checkpoint.OpenWith(ctx, s.images(), checkpoint.OpenOptions{Reread: true, AnyHost: true}); err != nil {
		return err
	}
	parent, err := n.stateDir(filepath.Join(savedFolder, s.Namespace, s.Container))
	if err != nil {
		return err
	}
	return s.place(filepath.Join(parent, s.Name))
}

package node

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/fault"
)

// work is a folder for one operation at work. It is locked until that ends, or its
// process does, so that Prune can tell what a crash has left.
type work struct {
	dir  string
	lock *os.File // the folder itself
}

// workFolder is where they are, in the state folder.
const workFolder = "work"

// newWork makes a folder in the state folder, which only we can look into. Call
// remove or release.
func (n *Node) newWork() (*work, error) { return n.newLocked(workFolder) }

// newLocked is newWork for another folder of the state folder. Its name is like no
// other's, wherever that is.
func (n *Node) newLocked(in string) (*work, error) {
	parent, err := n.stateDir(in)
	if err != nil {
		return nil, err
	}
	// Until the new folder is locked, it looks like one that a crash has left.
	all, err := lockWork(parent, 0)
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", parent, err)
	}
	defer all.release()
	dir := filepath.Join(parent, rand.Text())
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make a folder for the work: %w", err)
	}
	w, err := lockWork(dir, 0)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", dir, err), os.Remove(dir))
	}
	return w, nil
}

// lockWork locks a folder; with unix.LOCK_NB it does not wait. One that is gone
// by then is an error of fs.ErrNotExist.
func lockWork(dir string, flags int) (*work, error) {
	f, err := os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	if err = unix.Flock(int(f.Fd()), unix.LOCK_EX|flags); err == nil {
		var locked, there os.FileInfo
		if locked, err = f.Stat(); err == nil {
			if there, err = os.Lstat(dir); err == nil && !os.SameFile(locked, there) {
				err = fs.ErrNotExist
			}
		}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return &work{dir, f}, nil
}

// release leaves the folder to Prune. Neither it nor remove does anything on the zero
// value.
func (w *work) release() { w.lock.Close() }

// remove removes the folder.
func (w *work) remove() error {
	if w.dir == "" {
		return nil
	}
	defer w.lock.Close()
	if err := os.RemoveAll(w.dir); err != nil {
		return fmt.Errorf("remove the folder of the work: %w", err)
	}
	return nil
}

// leftovers calls fn with the folder, locked, of each operation that did not come to its
// end. in is workFolder or another. What else lies there is not ours.
func (n *Node) leftovers(in string, fn func(w *work) error) error {
	left, err := lockLeft(filepath.Join(n.o.State, in))
	failed := []error{err}
	for _, w := range left {
		failed = append(failed, fn(w))
	}
	return errors.Join(failed...)
}

// lockLeft locks the folders in parent that nobody has locked.
func lockLeft(parent string) (left []*work, err error) {
	all, err := lockWork(parent, 0) // as newLocked does
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look for leftovers: %w", err)
	}
	defer all.release()
	entries, err := os.ReadDir(parent)
	if err != nil {
		return nil, fmt.Errorf("look for leftovers: %w", err)
	}
	var failed []error
	for _, e := range entries {
		w, err := lockWork(filepath.Join(parent, e.Name()), unix.LOCK_NB)
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.EWOULDBLOCK): // has just ended; at work
		case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
		case err != nil:
			failed = append(failed, fmt.Errorf("look for leftovers: %w", err))
		default:
			left = append(left, w)
		}
	}
	return left, errors.Join(failed...)
}

// stateDir returns the folder of that name in the state folder, which it makes
// if need be. Checkpoints hold memory, so nobody else may look into it.
func (n *Node) stateDir(name string) (string, error) {
	if err := os.MkdirAll(n.o.State, 0o700); err != nil {
		return "", fmt.Errorf("make the state folder: %w", err)
	}
	info, err := os.Stat(n.o.State)
	if err != nil {
		return "", fmt.Errorf("look at the state folder: %w", err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return "", fault.Unusable("state folder %s has mode %o, so others may read checkpoints in it: chmod 700 it, or give another with --state",
			n.o.State, info.Mode().Perm())
	}
	dir := filepath.Join(n.o.State, name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("make a folder for the work: %w", err)
	}
	return dir, nil
}

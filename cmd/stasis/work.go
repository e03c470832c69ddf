package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// work is a folder for one command at work. It is locked as long as its process
// lives, so that prune can tell what a crash has left.
type work struct {
	dir  string
	lock *os.File // the folder itself
}

// newWork makes a folder in the state folder, which only we can look into. Call
// remove or release.
func (a *app) newWork() (*work, error) {
	parent, err := a.stateDir("work")
	if err != nil {
		return nil, err
	}
	for {
		dir, err := os.MkdirTemp(parent, "")
		if err != nil {
			return nil, fmt.Errorf("make a folder for the work: %w", err)
		}
		w, err := lockWork(dir, 0)
		if err == nil {
			return w, nil
		}
		if !errors.Is(err, fs.ErrNotExist) { // else prune was quicker
			return nil, errors.Join(fmt.Errorf("lock %s: %w", dir, err), os.Remove(dir))
		}
	}
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

// release leaves the folder to prune.
func (w *work) release() { w.lock.Close() }

// remove removes the folder.
func (w *work) remove() error {
	defer w.lock.Close()
	if err := os.RemoveAll(w.dir); err != nil {
		return fmt.Errorf("remove the folder of the work: %w", err)
	}
	return nil
}

// leftovers calls fn with the folder, locked, of each command that did not come
// to its end. What else lies there is not ours.
func (a *app) leftovers(fn func(w *work) error) error {
	parent := filepath.Join(a.state, "work")
	entries, err := os.ReadDir(parent)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look for leftovers: %w", err)
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
			failed = append(failed, fn(w))
		}
	}
	return errors.Join(failed...)
}

package criu

import (
	"fmt"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/criu/img"
)

// amendRoot gives the root folder of a restored container the mode that it had,
// without which CRIU restores no process. A layer cannot tell it: containerd
// passes over a layer's root, and a new writable layer's is 0755 with it, 0555
// with Podman.
func (r *RestoreRequest) amendRoot() error {
	if r.Spec.Root == nil || filepath.IsAbs(r.Spec.Root.Path) {
		return nil // a folder that is not the container's only
	}
	want, err := img.RootMode(r.Checkpoint.Dir())
	if err != nil || want == 0 {
		return err
	}
	path := filepath.Join(r.Bundle, r.Spec.Root.Path)
	var have unix.Stat_t
	if err := unix.Lstat(path, &have); err != nil {
		return fmt.Errorf("look at the root folder %s: %w", path, err)
	}
	if have.Mode&unix.S_IFMT != unix.S_IFDIR || have.Mode == want {
		return nil
	}
	if err := unix.Chmod(path, want&^unix.S_IFMT); err != nil {
		return fmt.Errorf("give the root folder %s its mode: %w", path, err)
	}
	return nil
}

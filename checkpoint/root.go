package checkpoint

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/layout"
)

// amendRoot gives the root folder of a restored container the mode that it had,
// without which CRIU restores no process. A layer cannot tell it: containerd
// passes over a layer's root, and a new writable layer's is 0755 with it, 0555
// with Podman.
func (r *RestoreRequest) amendRoot() error {
	if r.Spec.Root == nil || filepath.IsAbs(r.Spec.Root.Path) {
		return nil // a folder that is not the container's only
	}
	want, err := r.Checkpoint.images.rootMode()
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

// rootMode returns st_mode of the processes' root folder, or 0 if the images do
// not have it.
func (im images) rootMode() (mode uint32, err error) {
	err = im.each(layout.Files, "FILES", func(msg []byte) error {
		var f fdinfo.FileEntry
		if err := decode(msg, &f); err != nil {
			return err
		}
		if reg := f.GetReg(); reg.GetName() == "/" && reg.GetMode()&unix.S_IFMT == unix.S_IFDIR {
			mode = reg.GetMode()
			return io.EOF
		}
		return nil
	})
	if errors.Is(err, os.ErrNotExist) {
		err = nil // CRIU will say so
	}
	return mode, err
}

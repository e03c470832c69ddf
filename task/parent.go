package task

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/criu/img"
	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/process"
)

// A checkpoint with parent_path writes only the pages that were written to since another
// one, the parent. Which those are, the kernel notes (soft-dirty bits), and CRIU resets
// its notes at each dump that tracks. CRIU does not know when they were reset last. If
// that was after the parent, it would take from the parent what has changed in between,
// and nothing would tell. So only the shim's last checkpoint of the very same process can
// be built on, and with any other parent the dump is a full one.

// tracked is the checkpoint at which the kernel's notes begin: the last one, if that
// tracked. The zero value: there is none.
type tracked struct {
	init   *process.Child
	digest string // Checkpoint.ManifestDigest
}

// begins tells whether the kernel's notes about init begin at a checkpoint; else why not.
func (t tracked) begins(init *process.Child, parent *checkpoint.Checkpoint) (ok bool, why string) {
	switch {
	case parent.Manifest() == nil:
		return false, "other software has made the parent"
	case t.digest == "" || t.digest != parent.ManifestDigest():
		return false, "the parent is not this container's last checkpoint, or that did not track changes of memory"
	case t.init != init:
		return false, "the container's processes are others than then"
	}
	// CRIU writes this time if it tracks, and needs it of a parent.
	inv, err := parent.Inventory()
	if err != nil || inv.DumpUptime == nil {
		return false, "CRIU did not track changes of memory in the parent"
	}
	return true, ""
}

// openParent opens the checkpoint that a dump is to build on. It is nil for a full dump:
// if none is asked for, or the one that is cannot be built on for a reason that is not
// the caller's fault. Errors are about parent_path; then nothing has happened yet.
func (c *container) openParent(ctx context.Context, d dump, init *process.Child) (_ *img.Lists, err error) {
	if d.parent == "" {
		return nil, nil
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("options: parent_path: %w", err)
		}
	}()
	dir, err := filepath.EvalSymlinks(d.parent)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fault.New(errdefs.ErrNotFound, "%s: no such folder", d.parent)
	case err != nil:
		return nil, err
	}
	if target := resolved(d.dir); within(dir, target) || within(target, dir) {
		return nil, fault.Invalid("%s and the folder of the new checkpoint, %s, are one or lie in each other", d.parent, d.dir)
	}
	if err := checkOwner(dir); err != nil {
		return nil, err
	}
	parent, err := checkpoint.OpenWith(ctx, dir, checkpoint.OpenOptions{Allow: c.isOfThis})
	if err != nil {
		return nil, err
	}
	for _, name := range parent.Names() {
		if err := checkOwner(filepath.Join(dir, name)); err != nil {
			return nil, err
		}
	}
	ok, why := false, "this kernel does not track changes of memory (CONFIG_MEM_SOFT_DIRTY)"
	if c.service.softDirty() {
		ok, why = c.tracked.begins(init, parent)
	}
	if !ok {
		log.G(ctx).WithField("container", c.id).WithField("parent_path", d.parent).Info("a full dump: " + why)
		return nil, nil
	}
	return img.OpenLists(dir)
}

// isOfThis refuses another container's checkpoint. One without a manifest does not say.
func (c *container) isOfThis(ckpt *checkpoint.Checkpoint) error {
	if m := ckpt.Manifest(); m != nil && (m.Container.ID != c.id || m.Container.Namespace != c.namespace) {
		return fault.Invalid("a checkpoint of container %.80q in namespace %.80q, not of this one", m.Container.ID, m.Container.Namespace)
	}
	return nil
}

// checkOwner refuses what others than root could change while it is read.
func checkOwner(path string) error {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return &fs.PathError{Op: "lstat", Path: path, Err: err}
	}
	if int(st.Uid) != os.Geteuid() || st.Mode&0o022 != 0 {
		return fault.Invalid("%s: user %d owns it and its mode is %#o; only root may be able to write to it", path, st.Uid, st.Mode&0o7777)
	}
	return nil
}

// resolved follows the links in a path of which the end may not be there yet.
func resolved(path string) string {
	if target, err := filepath.EvalSymlinks(path); err == nil {
		return target
	} else if path == filepath.Dir(path) {
		return path
	}
	return filepath.Join(resolved(filepath.Dir(path)), filepath.Base(path))
}

// within tells whether a path is that of a folder, or of something in it.
func within(path, folder string) bool {
	rel, err := filepath.Rel(folder, path)
	return err == nil && rel != ".." && !strings.HasPrefix(rel, "../")
}

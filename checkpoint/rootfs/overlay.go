package rootfs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// OverlayLayer is the writable layer of a container on overlayfs. It is a
// capture.Layer.
//
// What overlayfs keeps in trusted.overlay.* is understood, and stays behind.
// user.overlay.* means nothing but on mounts with userxattr, and anybody in the
// container can set it: it is not understood, and stays behind too.
//
// An opaque folder becomes a whiteout for each file below it that is gone, not
// the opaque marker of the OCI: the lists of deleted files of Podman and CRI-O
// have no word for the latter. containerd's own way from overlayfs to a layer
// (continuity's DiffDirChanges) writes the marker, and knows no redirects.
//
// Nothing may change in the folders while they are written.
type OverlayLayer struct {
	Upper string   // the upperdir, or a Copy of it
	Lower []string // the lowerdirs, the topmost first as in mount options
}

// WriteLayer writes the layer. Renamed folders (redirect_dir) and files whose
// content is still below (metacopy) need a read-only overlay mount, which is gone
// when it returns, and the right to mount; all else is read as it is.
func (l OverlayLayer) WriteLayer(ctx context.Context, w io.Writer) error {
	err := l.write(ctx, w)
	if err != nil {
		return fmt.Errorf("write the layer of %s: %w", l.Upper, err)
	}
	return nil
}

func (l OverlayLayer) write(ctx context.Context, w io.Writer) error {
	out := newWriter(w)
	// Once without writing: there is no way back once there is output.
	err := l.walk(ctx, func(c *change) error { return ended(ctx) })
	if errors.Is(err, errRedirect) {
		err = l.mounted(func(base, root *folder) error {
			return diffTrees(ctx, base, root, func(c *change) error { return out.add(ctx, c) })
		})
	} else if err == nil {
		err = l.walk(ctx, func(c *change) error { return out.add(ctx, c) })
	}
	if err != nil {
		return err
	}
	return out.close()
}

// errRedirect says that files are elsewhere in the layers than their names say.
var errRedirect = errors.New("a redirect of overlayfs")

// walk calls yield for every change.
func (l OverlayLayer) walk(ctx context.Context, yield func(*change) error) error {
	upper, err := openRoot(l.Upper)
	if err != nil {
		return err
	}
	defer upper.close()
	var lower stack
	defer func() { lower.close() }()
	for _, dir := range l.Lower {
		d, err := openRoot(dir)
		if err != nil {
			return err
		}
		lower = append(lower, d)
	}
	st, err := upper.self()
	if err != nil {
		return err
	}
	if err := yield(&change{in: upper, name: ".", st: st}); err != nil {
		return err
	}
	return walkUpper(ctx, upper, lower, false, yield)
}

// walkUpper yields what is in a folder of the upper layer. hidden tells that the
// lower layers' files are not visible in it unless the upper has them, as it is
// opaque, or a folder above it.
func walkUpper(ctx context.Context, upper *folder, lower stack, hidden bool, yield func(*change) error) error {
	if err := ended(ctx); err != nil {
		return err
	}
	names, err := upper.names()
	if err != nil {
		return err
	}
	var present []change
	var removed []string
	for _, name := range names {
		st, err := upper.stat(name)
		if err != nil {
			return err
		}
		if !isWhiteout(&st) && kind(&st) != unix.S_IFSOCK {
			c := change{in: upper, name: name, st: st}
			if err := c.checkName(); err != nil {
				return err
			}
			present = append(present, c)
		} else if !hidden { // else it is among those below
			below, err := lower.has(name)
			if err != nil {
				return err
			}
			if below {
				removed = append(removed, name)
			}
		}
	}
	if hidden {
		below, err := lower.names()
		if err != nil {
			return err
		}
		for _, name := range below {
			if _, ok := find(present, name); !ok {
				removed = append(removed, name)
			}
		}
	}
	for _, name := range removed {
		if err := yield(&change{in: upper, name: name, removed: true}); err != nil {
			return err
		}
	}
	for i := range present {
		c := &present[i]
		if kind(&c.st) == unix.S_IFREG {
			if err := refuse(upper, c.name, "trusted.overlay.metacopy"); err != nil {
				return err
			}
		}
		if err := yield(c); err != nil {
			return err
		}
		if isFolder(&c.st) {
			if err := walkUpperFolder(ctx, upper, lower, c.name, hidden, yield); err != nil {
				return err
			}
		}
	}
	return nil
}

func walkUpperFolder(ctx context.Context, in *folder, lower stack, name string, hidden bool, yield func(*change) error) error {
	if err := refuse(in, name, "trusted.overlay.redirect"); err != nil {
		return err
	}
	upper, err := in.open(name)
	if err != nil {
		return err
	}
	defer upper.close()
	below, err := lower.folder(name)
	if err != nil {
		return err
	}
	defer below.close()
	opaque, err := isOpaque(upper)
	if err != nil {
		return err
	}
	return walkUpper(ctx, upper, below, hidden || opaque, yield)
}

// refuse returns errRedirect if the file has the attribute.
func refuse(in *folder, name, xattr string) error {
	_, has, err := xattrsAt(in.proc(name)).value(xattr)
	if has {
		return errRedirect
	}
	return in.fail("read "+xattr+" of", name, err)
}

func isOpaque(d *folder) (bool, error) {
	value, _, err := xattrsOf(d.fd).value("trusted.overlay.opaque")
	return string(value) == "y", d.fail("read trusted.overlay.opaque of", "", err)
}

func isWhiteout(st *unix.Stat_t) bool { return kind(st) == unix.S_IFCHR && st.Rdev == 0 }

// stack is one folder of the lower layers: the parts of it, the topmost first.
type stack []*folder

func (s stack) close() {
	for _, d := range s {
		d.close()
	}
}

// has tells whether there is something of that name.
func (s stack) has(name string) (bool, error) {
	for _, d := range s {
		st, ok, err := d.has(name)
		if err != nil {
			return false, err
		}
		if ok {
			return !isWhiteout(&st), nil
		}
	}
	return false, nil
}

// names lists the folder, sorted.
func (s stack) names() ([]string, error) {
	decided := map[string]bool{} // by the topmost layer that has the name
	for _, d := range s {
		names, err := d.names()
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			if _, ok := decided[name]; ok {
				continue
			}
			st, err := d.stat(name)
			if err != nil {
				return nil, err
			}
			decided[name] = !isWhiteout(&st)
		}
	}
	var names []string
	for name, there := range decided {
		if there {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, nil
}

// folder opens a folder in this one. It is empty if there is none of that name.
func (s stack) folder(name string) (parts stack, err error) {
	defer func() {
		if err != nil {
			parts.close()
			parts = nil
		}
	}()
	for _, d := range s {
		st, ok, err := d.has(name)
		if err != nil {
			return parts, err
		}
		if !ok {
			continue
		}
		if !isFolder(&st) { // a whiteout too
			return parts, nil
		}
		if err := refuse(d, name, "trusted.overlay.redirect"); err != nil {
			return parts, err
		}
		part, err := d.open(name)
		if err != nil {
			return parts, err
		}
		parts = append(parts, part)
		if opaque, err := isOpaque(part); err != nil || opaque {
			return parts, err
		}
	}
	return parts, nil
}

// mounted calls f with what the container was started on, and what it saw last.
func (l OverlayLayer) mounted(f func(base, root *folder) error) error {
	tmp, err := os.MkdirTemp("", "stasis-layer-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	// overlayfs wants two layers at least.
	empty := filepath.Join(tmp, "empty")
	mountpoint := filepath.Join(tmp, "mnt")
	for _, dir := range []string{empty, mountpoint} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return err
		}
	}
	lower := append(slices.Clone(l.Lower), empty)
	base, err := mountOverlay(mountpoint, lower)
	if err != nil {
		return err
	}
	defer base.close()
	root, err := mountOverlay(mountpoint, append([]string{l.Upper}, lower...))
	if err != nil {
		return err
	}
	defer root.close()
	return f(base, root)
}

// mountOverlay mounts layers read-only, and returns the root. It is unmounted
// already: the mount lives as long as the root is open, so a crash leaves none.
func mountOverlay(mountpoint string, layers []string) (*folder, error) {
	// By descriptor, as paths may be long and have commas and colons, and mount
	// options end after 4096 bytes.
	var dirs []string
	for _, layer := range layers {
		d, err := openRoot(layer)
		if err != nil {
			return nil, err
		}
		defer d.close()
		dirs = append(dirs, strings.TrimSuffix(d.proc(""), "/"))
	}
	options := "redirect_dir=follow,metacopy=on,lowerdir=" + strings.Join(dirs, ":")
	if err := unix.Mount("overlay", mountpoint, "overlay", unix.MS_RDONLY|unix.MS_NODEV|unix.MS_NOSUID|unix.MS_NOEXEC, options); err != nil {
		return nil, fmt.Errorf("mount the layers, of which one has renamed folders or files without content: %w", err)
	}
	root, err := openRoot(mountpoint)
	if err := errors.Join(err, unix.Unmount(mountpoint, unix.MNT_DETACH)); err != nil {
		return nil, err
	}
	return root, nil
}

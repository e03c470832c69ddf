package rootfs

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/fault"
)

// SplitDeleted makes of a layer what is in a checkpoint of Podman, CRI-O and the
// kubelet: rootfs-diff.tar, which has no whiteouts, and the list that is in
// deleted.files as JSON: paths from the root, "/etc/motd", sorted. Such a list is
// applied after the tar. So what it cannot say is refused: an opaque folder
// (its deleted files are known only to who knows the base), a folder that was
// deleted and made anew, and as JSON has no other strings, a name that is not
// UTF-8. The error matches errdefs.ErrFailedPrecondition; ErrInvalidArgument if
// the layer is at fault, in the ways of Apply. Podman's crutils has it as
// CRCreateRootFsDiffTar, which passes over owners and modes of folders.
func SplitDeleted(layer io.Reader, files io.Writer) (deleted []string, err error) {
	defer func() {
		if err != nil {
			deleted, err = nil, fmt.Errorf("split a layer into files and deleted files: %w", err)
		}
	}()
	g := newGuard(layer, defaultLimits)
	tw := tar.NewWriter(files)
	for {
		entry, err := g.next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, err
		}
		if folder, ok := entry.opaque(); ok {
			return nil, fault.Unusable("/%s: an opaque folder; without the image that it hides nobody can tell which files are deleted", folder)
		}
		if name, ok := entry.whiteout(); ok {
			if !utf8.ValidString(name) {
				return nil, fault.Unusable("%q: deleted, and not UTF-8, which a list of deleted files cannot say", "/"+name)
			}
			deleted = append(deleted, name)
			continue
		}
		if err := copyEntry(tw, g, entry); err != nil {
			return nil, err
		}
	}
	list := make([]string, 0, len(deleted))
	for _, name := range deleted {
		isFolder, replaced := g.seen[name]
		if replaced && isFolder {
			return nil, fault.Unusable("/%s: a folder deleted and made anew, which a list of deleted files cannot say", name)
		}
		if !replaced { // else the file in the tar does it
			list = append(list, "/"+name)
		}
	}
	slices.Sort(list)
	return list, tw.Close()
}

// copyEntry writes an entry and its content as they are.
func copyEntry(tw *tar.Writer, g *guard, e item) error {
	e.Format = tar.FormatPAX // which can say all that the others can
	if err := tw.WriteHeader(e.Header); err != nil {
		return fault.Invalid("entry %q: write it anew: %v", e.Name, err)
	}
	if e.Typeflag != tar.TypeReg {
		return nil
	}
	if _, err := io.Copy(tw, g.tr); err != nil {
		return fmt.Errorf("copy %q: %w", e.Name, readError(e.Name, err))
	}
	return nil
}

// JoinDeleted makes a layer of a tar without whiteouts and a list of deleted
// files, paths from the root with or without "/" before them. A whiteout comes
// before the entries that replace what was deleted, and after its folder's own
// entry if there is one. Whiteouts in files are refused, as is what Apply refuses
// (errdefs.ErrInvalidArgument).
func JoinDeleted(files io.Reader, deleted []string, layer io.Writer) error {
	if err := joinDeleted(files, deleted, layer); err != nil {
		return fmt.Errorf("join files and deleted files to a layer: %w", err)
	}
	return nil
}

func joinDeleted(files io.Reader, deleted []string, layer io.Writer) error {
	if len(deleted) > defaultLimits.entries {
		return fault.Invalid("more than %d deleted files", defaultLimits.entries)
	}
	j := joiner{tw: tar.NewWriter(layer), pending: map[string]bool{}, in: map[string][]string{}}
	for _, name := range deleted {
		p, err := deletedPath(name)
		if err != nil {
			return err
		}
		if strings.HasPrefix(path.Base(p), whiteoutPrefix) {
			return fault.Invalid("deleted file %q: a whiteout of a whiteout", name)
		}
		if j.pending[p] {
			continue
		}
		j.pending[p] = true
		dir, _ := split(p)
		j.in[dir] = append(j.in[dir], p)
	}
	g := newGuard(files, defaultLimits)
	for {
		entry, err := g.next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		if strings.HasPrefix(path.Base(entry.path), whiteoutPrefix) {
			return fault.Invalid("entry %q: a whiteout beside a list of deleted files", entry.Name)
		}
		if err := j.above(entry.path); err != nil {
			return err
		}
		if err := copyEntry(j.tw, g, entry); err != nil {
			return err
		}
		if entry.Typeflag == tar.TypeDir {
			if err := j.within(entry.path); err != nil {
				return err
			}
		}
	}
	rest := make([]string, 0, len(j.pending))
	for p := range j.pending {
		rest = append(rest, p)
	}
	slices.Sort(rest)
	for _, p := range rest {
		if err := j.whiteout(p); err != nil {
			return err
		}
	}
	return j.tw.Close()
}

// joiner writes a layer whose deleted files are known before.
type joiner struct {
	tw      *tar.Writer
	pending map[string]bool     // deleted files whose whiteout is not written
	in      map[string][]string // deleted files by folder
}

func (j *joiner) whiteout(p string) error {
	if !j.pending[p] {
		return nil
	}
	delete(j.pending, p)
	return writeWhiteout(j.tw, p)
}

// above writes the whiteouts that have to come before an entry: of its own name
// and those of the folders that it is in.
func (j *joiner) above(p string) error {
	for i := range len(p) + 1 {
		if i == len(p) || p[i] == '/' {
			if err := j.whiteout(p[:i]); err != nil {
				return err
			}
		}
	}
	return nil
}

// within writes the whiteouts of files in a folder.
func (j *joiner) within(dir string) error {
	slices.Sort(j.in[dir])
	for _, p := range j.in[dir] {
		if err := j.whiteout(p); err != nil {
			return err
		}
	}
	return nil
}

// deletedPath returns a path of a list without the "/" before it.
func deletedPath(name string) (string, error) {
	p, err := cleanPath(strings.TrimLeft(name, "/"))
	if err == nil && p == "" {
		err = errors.New("the root")
	}
	if err != nil {
		return "", fault.Invalid("deleted file %q: %v", name, err)
	}
	return p, nil
}

// RemoveDeleted removes files and folders from the root filesystem in the folder
// root. The list is untrusted: nothing outside of root is removed, no link is
// followed, and no file on another mount is reached. A file that is not there is
// none to remove. The list is checked before anything is removed. Podman's crutils has
// it as CRRemoveDeletedFiles.
func RemoveDeleted(root string, deleted []string) error {
	if err := removeDeleted(root, deleted); err != nil {
		return fmt.Errorf("remove deleted files from %s: %w", root, err)
	}
	return nil
}

func removeDeleted(root string, deleted []string) error {
	paths := make([]string, len(deleted))
	for i, name := range deleted {
		var err error
		if paths[i], err = deletedPath(name); err != nil {
			return err
		}
	}
	r, err := openRoot(root)
	if err != nil {
		return err
	}
	defer r.close()
	for _, p := range paths {
		dir, base := split(p)
		if dir == "" {
			dir = "."
		}
		fd, err := unix.Openat2(r.fd, dir, &unix.OpenHow{
			Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC,
			Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
		})
		switch {
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
			continue
		case errors.Is(err, unix.ELOOP):
			return fault.Invalid("deleted file %q: there is a symbolic link in its path", "/"+p)
		case err != nil:
			return r.fail("open", dir, err)
		}
		d := newFolder(fd, dir)
		err = d.remove(base)
		d.close()
		if err != nil {
			return err
		}
	}
	return nil
}

// CreateLabeled makes an empty file, 0600, with an SELinux label, for an engine's
// log that a program confined to a container has to write. An empty label sets
// none. What is there already is not touched: the error matches
// fs.ErrExist. Podman's crutils has it as CRCreateFileWithLabel.
func CreateLabeled(path, selinuxLabel string) (err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err = errors.Join(err, f.Close()); err != nil {
			os.Remove(path)
		}
	}()
	if selinuxLabel == "" {
		return nil
	}
	if err := unix.Fsetxattr(int(f.Fd()), "security.selinux", []byte(selinuxLabel), 0); err != nil {
		return fmt.Errorf("label %s with %q: %w", path, selinuxLabel, err)
	}
	return nil
}

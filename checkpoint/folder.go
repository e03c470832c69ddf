package checkpoint

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/criu/img"
	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/checkpoint/sign"
	"github.com/stasis-run/stasis/checkpoint/sum"
)

// Folder is a checkpoint being written. CRIU writes into a subfolder, and
// Commit moves the files up, inventory.img last: a folder that has that file
// holds a whole checkpoint, whatever interrupted the writing. An older
// checkpoint stays usable until Commit has all of the new one.
//
// One goroutine uses a Folder, and ends it with either Commit or Discard.
type Folder struct {
	// Key is what Commit signs the checkpoint with; nil: it is not signed.
	Key *sign.Key
	// LeaveSum has Commit leave the sum of the largest file, and the signature, to
	// AddSum.
	LeaveSum bool
	// Parent is the checkpoint that the dump builds on, besides pre-dumps; nil: none.
	// Commit takes from it what the dump lacks. The caller closes it.
	Parent *img.Lists

	dir       string
	created   bool     // NewFolder made dir
	committed bool     // with success
	old       []string // files of the checkpoint to be replaced
	moved     []string // files of the new one that are in dir already
	lock      *os.File // .partial, locked while it is being written
	digest    string   // of the manifest that was written last
}

// NewFolder prepares the folder dir for a checkpoint, and makes it if need be.
// dir may hold an older checkpoint, which Commit replaces, and the rests of an
// unfinished one. Anything else there is not ours to remove: the error matches
// errdefs.ErrAlreadyExists. While someone else writes to the same folder, it
// matches errdefs.ErrFailedPrecondition.
func NewFolder(dir string) (*Folder, error) {
	f := &Folder{dir: dir}
	_, err := os.Lstat(dir)
	if f.created = errors.Is(err, fs.ErrNotExist); f.created {
		err = os.MkdirAll(dir, 0o700)
	}
	if err == nil {
		err = f.claim()
	}
	if err != nil {
		if f.created {
			os.Remove(dir)
		}
		return nil, wrap(dir, err)
	}
	return f, nil
}

// ManifestDigest is Checkpoint.ManifestDigest of what Commit has written.
func (f *Folder) ManifestDigest() string { return f.digest }

// Path is where CRIU has to write.
func (f *Folder) Path() string { return filepath.Join(f.dir, layout.Partial) }

// Uncommitted returns where the files of a checkpoint are that CRIU has written to the
// end into dir, and that Commit has not moved up, or not all of them. It returns "" if
// there are none.
func Uncommitted(dir string) string {
	path := (&Folder{dir: dir}).Path()
	if _, err := os.Lstat(filepath.Join(path, layout.Inventory)); err != nil {
		return ""
	}
	return path
}

// IsBeingWritten tells whether a process is at work on a checkpoint in dir. One that died
// is not.
func IsBeingWritten(dir string) bool {
	lock, err := os.OpenFile((&Folder{dir: dir}).Path(), os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return false
	}
	defer lock.Close()
	return errors.Is(unix.Flock(int(lock.Fd()), unix.LOCK_SH|unix.LOCK_NB), unix.EWOULDBLOCK)
}

// reserveSize is the size in bytes of the file that Reserve makes.
const reserveSize = 4 << 20

// Reserve takes the space on the disk that Commit will need: a few KiB for most
// containers, and more bytes where it puts memory together. A container that ends
// with the dump would else be lost if CRIU's images just fit.
func (f *Folder) Reserve(more int64) error {
	size := reserveSize + more
	file, err := os.OpenFile(filepath.Join(f.Path(), layout.Reserve), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return wrap(f.dir, err)
	}
	defer file.Close()
	err = unix.Fallocate(int(file.Fd()), 0, 0, size)
	if errors.Is(err, unix.EOPNOTSUPP) {
		_, err = io.CopyN(file, rand.Reader, size) // zeros might take no space
	}
	if err != nil {
		return wrap(f.dir, fmt.Errorf("reserve %d MiB: %w", size>>20, err))
	}
	return nil
}

// claim makes .partial, or empties the one that a killed process left.
func (f *Folder) claim() (err error) {
	if err := os.Mkdir(f.Path(), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(f.Path()) // if it is empty; else it is not of our making
		}
	}()
	lock, err := os.OpenFile(f.Path(), os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	// The lock ends with its holder. A file system without locks does without.
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		lock.Close()
		return fault.Unusable("another checkpoint is being written to this folder")
	}
	if f.old, err = replaceable(f.dir); err == nil {
		err = empty(f.Path())
	}
	if err != nil {
		lock.Close()
		return err
	}
	f.lock = lock
	return nil
}

// replaceable lists the files in dir that belong to a checkpoint there, provided
// that there are no others. Without inventory.img only those do that a manifest
// of ours lists: *.img might be anybody's. Logs may be there, and stay.
func replaceable(dir string) ([]string, error) {
	files, err := listFolder(dir)
	if err != nil {
		return nil, err
	}
	_, whole := files[layout.Inventory]
	listed := map[string]bool{}
	if m, err := readManifestBy(dir, decodeUnsummed); err == nil && m != nil {
		for _, file := range m.Files {
			listed[file.Name] = true
		}
	}
	var names []string
	for name, file := range files {
		switch {
		case !file.regular():
		case listed[name], name == layout.Manifest, name == layout.Signature, whole && (layout.IsImage(name) || name == layout.Descriptors):
			names = append(names, name)
			continue
		case layout.IsIncidental(name):
			continue
		}
		return nil, fault.New(errdefs.ErrAlreadyExists,
			"the folder holds %q, which is no part of a checkpoint; give an empty folder, or one that does not exist", name)
	}
	return names, nil
}

func empty(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return os.Chmod(dir, 0o700)
}

// Discard removes what was written. If NewFolder made the folder, that goes as
// well. After a Commit that succeeded it does nothing.
func (f *Folder) Discard() error {
	if f.committed {
		return nil // .partial may be somebody else's by now
	}
	err := os.RemoveAll(f.Path())
	slices.Sort(f.moved) // manifest and envelope may be there twice
	for _, name := range slices.Compact(f.moved) {
		err = errors.Join(err, os.Remove(filepath.Join(f.dir, name)))
	}
	f.moved = nil
	f.lock.Close()
	if f.created {
		// Not if somebody else put something there, such as CRIU its log.
		_ = os.Remove(f.dir)
	}
	return wrap(f.dir, err)
}

// Commit makes a checkpoint of what CRIU wrote, and replaces an older one. It
// sets the manifest's version, files and facts about this host. With durable
// it returns once everything is on the disk.
//
// If it fails, it discards everything, unless the container ended with this
// checkpoint: then the files are all there is of it, and stay.
func (f *Folder) Commit(m Manifest, durable bool) error {
	defer f.lock.Close()
	err := f.commit(m, durable)
	switch {
	case err == nil:
		f.committed = true
		return nil
	case m.Exit:
		return fmt.Errorf("%w (what CRIU wrote is still there, in part in %s)", wrap(f.dir, err), f.Path())
	}
	if derr := f.Discard(); derr != nil {
		err = errors.Join(err, derr)
	}
	return wrap(f.dir, err)
}

func (f *Folder) commit(m Manifest, durable bool) error {
	if err := os.Remove(filepath.Join(f.Path(), layout.Reserve)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := img.RepairTimers(f.Path()); err != nil {
		return err
	}
	if err := img.ThawGroups(f.Path()); err != nil {
		log.L.WithError(err).Warn("a checkpoint says that its container is frozen, and can be restored with other cgroups_modes than full")
	}
	if chain := f.preDumps(); len(chain) > 0 || f.Parent != nil {
		if err := img.Flatten(f.Path(), f.Parent, chain); err != nil {
			return err
		}
		if err := os.Remove(filepath.Join(f.Path(), layout.ParentLink)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		for _, dir := range chain {
			if err := os.RemoveAll(dir); err != nil {
				return err
			}
		}
	}
	files, err := f.written()
	if err != nil {
		return err
	}
	m.Version = manifestVersion
	m.Host, _ = os.Hostname()
	m.Created = time.Now().UTC().Truncate(time.Millisecond)
	m.Kernel, m.Architecture, m.CPUFeatures = KernelRelease(), runtime.GOARCH, HostCPUFeatures()
	if m.Files, err = f.sums(files, durable); err != nil {
		return err
	}
	if err := m.check(); err != nil {
		return err
	}
	// What needs space on the disk comes before what cannot be undone.
	if err := f.writeManifest(&m, durable); err != nil {
		return err
	}
	if err := f.removeOld(); err != nil {
		return err
	}
	// The manifest is the first to come and names the others, so that a later
	// NewFolder knows what it may remove.
	if err := f.moveManifest(); err != nil {
		return err
	}
	for _, file := range files {
		if file.name != layout.Inventory {
			if err := f.move(file.name); err != nil {
				return err
			}
		}
	}
	// A rename changes ctime, hence only now. Without these, Open takes longer.
	if f.stamp(&m) && f.writeManifest(&m, durable) == nil {
		if err := f.moveManifest(); err != nil {
			return err
		}
	}
	if durable {
		if err := capture.Sync(f.dir); err != nil {
			return err
		}
	}
	if err := f.move(layout.Inventory); err != nil {
		return err
	}
	if durable {
		if err := errors.Join(capture.Sync(f.dir), capture.Sync(filepath.Dir(f.dir))); err != nil {
			return err
		}
	}
	_ = os.RemoveAll(f.Path()) // empty; its presence harms nobody
	return nil
}

// preDumps are the folders of a folder's pre-dumps, the oldest first.
func (f *Folder) preDumps() (dirs []string) {
	for n := 1; ; n++ {
		dir := filepath.Join(f.Path(), layout.PreDump(n))
		if _, err := os.Lstat(dir); err != nil {
			return dirs
		}
		dirs = append(dirs, dir)
	}
}

// written lists what CRIU and the runtime wrote, the largest first.
func (f *Folder) written() ([]entry, error) {
	found, err := listFolder(f.Path())
	if err != nil {
		return nil, err
	}
	var files []entry
	for _, file := range found {
		if !file.regular() || !validName(file.name) {
			return nil, fmt.Errorf("CRIU wrote %q, which is no file that a checkpoint can hold", file.name)
		}
		if err := checkSize(file); err != nil {
			return nil, err
		}
		files = append(files, file)
	}
	slices.SortFunc(files, func(a, b entry) int { return cmp.Compare(b.size, a.size) })
	return files, nil
}

// sums closes the files, which are sorted by size, to others and returns their
// sums, sorted by name. It leaves out files that no restore reads.
func (f *Folder) sums(files []entry, durable bool) ([]File, error) {
	var listed []File
	for _, file := range files {
		if err := f.close(file.name); err != nil {
			return nil, err
		}
		if !layout.IsIncidental(file.name) {
			listed = append(listed, File{Name: file.name, Size: file.size})
		}
	}
	summed := listed
	if f.LeaveSum && len(files) > 0 && len(listed) > 0 && listed[0].Name == files[0].name {
		summed = listed[1:]
	}
	var sums []sum.Sum
	// The disk and the CPUs are busy at once.
	err := inParallel(context.Background(), 2, func(ctx context.Context, i int) (err error) {
		if i == 0 {
			sums, err = sumFiles(ctx, f.Path(), summed)
			return err
		}
		for _, file := range listed {
			if durable {
				err = errors.Join(err, capture.Sync(filepath.Join(f.Path(), file.Name)))
			}
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	for i := range summed {
		summed[i].setSum(sums[i])
	}
	slices.SortFunc(listed, func(a, b File) int { return strings.Compare(a.Name, b.Name) })
	return listed, nil
}

// close closes a file to others.
func (f *Folder) close(name string) error {
	file, err := openIn(f.Path(), name)
	if err != nil {
		return err
	}
	defer file.Close()
	return file.Chmod(0o600)
}

// writeManifest writes .partial/stasis.json, and the envelope beside it.
func (f *Folder) writeManifest(m *Manifest, durable bool) error {
	data, err := m.encode()
	if err != nil {
		return err
	}
	written := map[string][]byte{layout.Manifest: data}
	if f.Key != nil {
		if written[layout.Signature], err = f.Key.Sign(data, nil); err != nil {
			return fmt.Errorf("sign the manifest: %w", err)
		}
	}
	for name, data := range written {
		path := filepath.Join(f.Path(), name)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			return err
		}
		if durable {
			if err := capture.Sync(path); err != nil {
				return err
			}
		}
	}
	f.digest = manifestDigest(data)
	return nil
}

// moveManifest moves what writeManifest has written. Until inventory.img is there, the
// checkpoint is unfinished, so the two need not be there at once.
func (f *Folder) moveManifest() error {
	if f.Key != nil {
		if err := f.move(layout.Signature); err != nil {
			return err
		}
	}
	return f.move(layout.Manifest)
}

// removeOld ends the older checkpoint: inventory.img first, so that it is
// unfinished from then on, and last the manifest, which says what is ours.
func (f *Folder) removeOld() error {
	var names []string
	for _, name := range f.old {
		if name != layout.Inventory && name != layout.Manifest {
			names = append(names, name)
		}
	}
	for _, name := range slices.Concat([]string{layout.Inventory}, names, []string{layout.Manifest}) {
		if err := os.Remove(filepath.Join(f.dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

func (f *Folder) move(name string) error {
	if err := os.Rename(filepath.Join(f.Path(), name), filepath.Join(f.dir, name)); err != nil {
		return err
	}
	f.moved = append(f.moved, name)
	return nil
}

// stamp records inode and ctime of the large files, and reports whether there
// are any.
func (f *Folder) stamp(m *Manifest) (some bool) {
	for i := range m.Files {
		file := &m.Files[i]
		if file.Size < recheckSize {
			continue
		}
		var st unix.Stat_t
		if unix.Lstat(filepath.Join(f.dir, file.Name), &st) == nil {
			file.Inode, file.CtimeNs = st.Ino, st.Ctim.Nano()
			some = true
		}
	}
	return some
}

package checkpoint

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/fault"
)

// Image is a checkpoint that was opened and found good. Nothing restores from a
// folder that was not opened as an Image.
type Image struct {
	dir      string
	manifest *Manifest // nil: made by other software
	options  Options
	images   images
	tcp      func() ([]netip.Addr, error)
}

// Dir is the folder that holds the images.
func (i *Image) Dir() string { return i.dir }

// Manifest returns stasis.json, or nil for a checkpoint made by other software.
func (i *Image) Manifest() *Manifest { return i.manifest }

// Options are those that a restore has to use.
func (i *Image) Options() Options { return i.options }

// Pipes tells which of stdin, stdout and stderr were pipes to outside of the
// container, in whose place a restore puts what the runtime has.
func (i *Image) Pipes() (pipes [3]bool) {
	data, err := readPart(filepath.Join(i.dir, descriptorsName), 64<<10, false)
	if err != nil {
		return pipes // then the runtime replaces none
	}
	// What each was: a path, or pipe:[inode].
	var descriptors []string
	if json.Unmarshal(data, &descriptors) != nil {
		return pipes // it will say so
	}
	for n, d := range descriptors[:min(len(descriptors), len(pipes))] {
		pipes[n] = strings.Contains(d, "pipe:")
	}
	return pipes
}

// Names returns the names of the files of the checkpoint, sorted.
func (i *Image) Names() []string { return slices.Sorted(maps.Keys(i.images.files)) }

// Each calls fn with each message of one of CRIU's images, which has to be of
// the given kind, such as "PSTREE". A message is valid until fn returns; io.EOF
// ends it without an error. An image that is not there is an error of
// fs.ErrNotExist.
func (i *Image) Each(name, kind string, fn func(msg []byte) error) error {
	return i.images.each(name, kind, fn)
}

// OpenFile opens one of the checkpoint's files for reading.
func (i *Image) OpenFile(name string) (*os.File, error) { return openIn(i.dir, name) }

// EstablishedTCP returns the distinct local addresses of the TCP sockets that
// are connected, being connected, or being closed. IPv4 addresses of IPv6
// sockets are returned as IPv4 addresses.
func (i *Image) EstablishedTCP() ([]netip.Addr, error) { return i.tcp() }

// Open checks the checkpoint in a folder and returns it. Of a checkpoint with a
// manifest, every file has to be as it was made, and the host to be able to run
// it; hashing files that were copied from elsewhere takes about a second for
// each 2 GB, and ends with ctx. Of one without, the images have to be complete
// as far as they tell themselves.
func Open(ctx context.Context, dir string) (*Image, error) {
	img, err := open(ctx, dir)
	if err != nil {
		return nil, wrap(dir, err)
	}
	return img, nil
}

func open(ctx context.Context, dir string) (*Image, error) {
	files, err := listFolder(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fault.New(errdefs.ErrNotFound, "no such folder")
	case errors.Is(err, unix.ENOTDIR):
		return nil, fault.Invalid("not a folder")
	case err != nil:
		return nil, err
	}
	manifest, err := readManifest(dir)
	if err != nil {
		return nil, err
	}
	if _, ok := files[inventoryName]; !ok {
		if _, err := os.Lstat(filepath.Join(dir, partialName)); manifest != nil || err == nil {
			return nil, fault.Unusable("unfinished: whatever wrote it was interrupted; make the checkpoint again")
		}
		return nil, fault.Invalid("no checkpoint: the folder has no %s", inventoryName)
	}
	if err := checkNames(files, manifest); err != nil {
		return nil, err
	}
	images := images{dir: dir, files: files}
	img := &Image{dir: dir, manifest: manifest, images: images}
	if manifest == nil {
		found, err := images.derive()
		if err != nil {
			return nil, err
		}
		if err := checkHost(found.arch, nil); err != nil {
			return nil, err
		}
		img.options = found.options
		img.tcp = func() ([]netip.Addr, error) { return found.tcp, nil }
		return img, nil
	}
	if err := checkHost(manifest.Architecture, manifest.CPUFeatures); err != nil {
		return nil, err
	}
	if err := verify(ctx, dir, files, manifest); err != nil {
		return nil, err
	}
	img.options = manifest.Options
	img.tcp = sync.OnceValues(func() ([]netip.Addr, error) {
		addrs, err := images.establishedTCP()
		return addrs, wrap(dir, err)
	})
	return img, nil
}

// entry is what a folder holds under one name.
type entry struct {
	name    string
	mode    uint32 // as in struct stat
	size    int64
	inode   uint64
	ctimeNs int64
}

func (e entry) regular() bool { return e.mode&unix.S_IFMT == unix.S_IFREG }

// kind says what a file is that is not regular.
func (e entry) kind() string {
	switch e.mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return "folder"
	case unix.S_IFLNK:
		return "symbolic link"
	}
	return "device, socket or FIFO"
}

// listFolder returns the entries of a folder by name. It passes over the
// subfolder .partial, which may be left of a checkpoint that was to replace
// this one, and lost+found, since an ext4 file system may be mounted here.
func listFolder(dir string) (map[string]entry, error) {
	d, err := os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	entries := map[string]entry{}
	for {
		names, err := d.Readdirnames(1024)
		for _, name := range names {
			var st unix.Stat_t
			if err := unix.Fstatat(int(d.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			if st.Mode&unix.S_IFMT == unix.S_IFDIR && (name == partialName || name == "lost+found") {
				continue
			}
			entries[name] = entry{name: name, mode: st.Mode, size: st.Size, inode: st.Ino, ctimeNs: st.Ctim.Nano()}
		}
		if len(entries) > maxFiles {
			return nil, fault.Invalid("more than %d files", maxFiles)
		}
		if errors.Is(err, io.EOF) {
			return entries, nil
		}
		if err != nil {
			return nil, err
		}
	}
}

// openIn opens a file for reading that is in the folder itself.
func openIn(dir, name string) (*os.File, error) { return capture.OpenPlain(filepath.Join(dir, name)) }

// readManifest returns the manifest in dir, nil if there is none.
func readManifest(dir string) (*Manifest, error) { return readManifestBy(dir, decodeManifest) }

func readManifestBy(dir string, decode func([]byte) (*Manifest, error)) (*Manifest, error) {
	f, err := openIn(dir, manifestName)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxManifest+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxManifest {
		return nil, fault.Invalid("%s: larger than %d bytes", manifestName, maxManifest)
	}
	// One for each file, and some of control groups.
	if err := capture.CheckNodes(data, 4*maxFiles); err != nil {
		return nil, fmt.Errorf("%s: %w", manifestName, err)
	}
	m, err := decode(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", manifestName, err)
	}
	return m, nil
}

// CopyManifest puts the manifest of the checkpoint in the folder from into the
// folder to.
func CopyManifest(to, from string) error {
	data, err := os.ReadFile(filepath.Join(from, manifestName))
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(to, manifestName), data, 0o600)
}

// checkNames refuses what no checkpoint has, before anything is opened.
func checkNames(files map[string]entry, m *Manifest) error {
	listed := map[string]bool{}
	if m != nil {
		for _, f := range m.Files {
			listed[f.Name] = true
		}
	}
	for name, file := range files {
		if err := checkSize(file); err != nil {
			return err
		}
		switch {
		case !file.regular():
			return fault.Invalid("%q: a %s; a checkpoint has only regular files", name, file.kind())
		case listed[name] || incidental(name) || name == manifestName:
		case m == nil && (isImage(name) && validName(name) || name == descriptorsName):
		case m != nil:
			return fault.Invalid("%q: not listed in %s; it was added later", name, manifestName)
		default:
			return fault.Invalid("%q: no part of a checkpoint; remove it, or give the folder that holds only CRIU's images", name)
		}
	}
	return nil
}

// checkHost refuses a checkpoint of another architecture, or of a CPU that can
// do more than this host's.
func checkHost(arch string, features []string) error {
	if arch != runtime.GOARCH {
		return fault.Unusable("made on %s, this host is %s", arch, runtime.GOARCH)
	}
	var missing []string
	host := HostCPUFeatures()
	for _, f := range features {
		if !slices.Contains(host, f) {
			missing = append(missing, f)
		}
	}
	if len(missing) > 0 {
		return fault.Unusable("made on a CPU with %s, which this host's lacks; restore it on a host whose CPU has it",
			strings.Join(missing, ", "))
	}
	return nil
}

// verify compares the files with the manifest.
func verify(ctx context.Context, dir string, files map[string]entry, m *Manifest) error {
	var hash []File
	for _, want := range m.Files {
		have, ok := files[want.Name]
		switch {
		case !ok:
			return fault.Invalid("%s: missing", want.Name)
		case have.size < want.Size:
			return fault.Invalid("%s: expected %d bytes, has %d (truncated)", want.Name, want.Size, have.size)
		case have.size > want.Size:
			return fault.Invalid("%s: expected %d bytes, has %d (altered)", want.Name, want.Size, have.size)
		case want.Inode != 0 && want.Inode == have.inode && want.CtimeNs == have.ctimeNs:
		default:
			hash = append(hash, want)
		}
	}
	slices.SortFunc(hash, func(a, b File) int { return cmp.Compare(b.Size, a.Size) })
	return inParallel(ctx, len(hash), func(ctx context.Context, i int) error {
		want := hash[i]
		f, err := openIn(dir, want.Name)
		if err != nil {
			return err
		}
		defer f.Close()
		sum, _, err := hashFile(ctx, f, want.Name)
		if err != nil {
			return fmt.Errorf("%s: %w", want.Name, err)
		}
		if sum != want.Sum {
			return fault.Invalid("%s: altered: its sum is %s, expected %s", want.Name, sum, want.Sum)
		}
		return nil
	})
}

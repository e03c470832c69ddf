package checkpoint

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
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

	"github.com/checkpoint-restore/go-criu/v8/crit/images/inventory"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/criu/img"
	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/checkpoint/sign"
)

// Checkpoint is a checkpoint that was opened and found good. Nothing restores from a
// folder that was not opened as a Checkpoint.
type Checkpoint struct {
	dir      string
	manifest *Manifest // nil: made by other software
	digest   string    // of stasis.json
	verdict  sign.Verdict
	options  Options
	files    map[string]entry
	tcp      func() ([]netip.Addr, error)
}

// Dir is the folder that holds the images.
func (c *Checkpoint) Dir() string { return c.dir }

// Manifest returns stasis.json, or nil for a checkpoint made by other software.
func (c *Checkpoint) Manifest() *Manifest { return c.manifest }

// ManifestDigest is the digest of stasis.json, and so, as that has the sums of all files,
// of the whole checkpoint. It is empty for a checkpoint made by other software.
func (c *Checkpoint) ManifestDigest() string { return c.digest }

// manifestDigest is the digest of the bytes of stasis.json.
func manifestDigest(data []byte) string {
	sum := sha256.Sum256(data)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// Signer is who has signed the checkpoint, of those whom OpenOptions.Trust trusts:
// this node itself if it has, else another. ok is false if none of them has.
func (c *Checkpoint) Signer() (_ sign.Signer, ok bool) {
	if len(c.verdict.Signers) == 0 {
		return sign.Signer{}, false
	}
	return c.verdict.Signers[0], true
}

// Verdict is all that is known of the signatures.
func (c *Checkpoint) Verdict() sign.Verdict { return c.verdict }

// RanWith tells whether a spec, which came with the checkpoint, is the one that the
// container ran with when it was made. That is known of a checkpoint that is signed;
// the files of other formats may be anybody's.
func (c *Checkpoint) RanWith(spec []byte) bool {
	if c.manifest == nil || len(c.verdict.Signers) == 0 {
		return false
	}
	digest, err := SpecDigest(spec)
	return err == nil && digest == c.manifest.Container.SpecDigest
}

// Options are those that a restore has to use.
func (c *Checkpoint) Options() Options { return c.options }

// Pipes tells which of stdin, stdout and stderr were pipes to outside of the
// container, in whose place a restore puts what the runtime has.
func (c *Checkpoint) Pipes() (pipes [3]bool) {
	data, err := capture.ReadPart(filepath.Join(c.dir, layout.Descriptors), 64<<10, false)
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
func (c *Checkpoint) Names() []string { return slices.Sorted(maps.Keys(c.files)) }

// Each calls fn with each message of one of CRIU's images, which has to be of
// the given kind, such as "PSTREE". A message is valid until fn returns; io.EOF
// ends it without an error. An image that is not there is an error of
// fs.ErrNotExist.
func (c *Checkpoint) Each(name, kind string, fn func(msg []byte) error) error {
	return img.EachIn(c.dir, name, kind, fn)
}

// OpenFile opens one of the checkpoint's files for reading.
func (c *Checkpoint) OpenFile(name string) (*os.File, error) { return openIn(c.dir, name) }

// Inventory is CRIU's inventory.img.
func (c *Checkpoint) Inventory() (*inventory.InventoryEntry, error) {
	inv, err := img.ReadInventory(c.dir)
	return inv, wrap(c.dir, err)
}

// EstablishedTCP returns the distinct local addresses of the TCP sockets that
// are connected, being connected, or being closed. IPv4 addresses of IPv6
// sockets are returned as IPv4 addresses.
func (c *Checkpoint) EstablishedTCP() ([]netip.Addr, error) { return c.tcp() }

// OpenOptions are the options of OpenWith.
type OpenOptions struct {
	// Trust are the keys whose signatures are verified. Nil: a checkpoint that is
	// signed is good, and nobody is known to have signed it.
	Trust *sign.Trust
	// Require refuses what none of them has signed, before the files are read: the
	// error matches ErrNotSigned.
	Require bool
	// Allow, if not nil, is asked when it is known who has signed the checkpoint, and
	// before the files are read.
	Allow func(*Checkpoint) error
	// Reread sums every file. Else one that the folder has as it was made there is
	// not read again (File.Inode), which a file system can only tell that is written
	// to by this host: not one that is itself an image, which whoever made it gave
	// its inodes and times.
	Reread bool
	// AnyHost opens what this host cannot run.
	AnyHost bool
}

// Open is OpenWith without options.
func Open(ctx context.Context, dir string) (*Checkpoint, error) {
	return OpenWith(ctx, dir, OpenOptions{})
}

// OpenWith checks the checkpoint in a folder and returns it. Of a checkpoint with a
// manifest, every file has to be as it was made, and the host to be able to run
// it; summing files that were copied from elsewhere takes a CPU about half a second
// for each GB, and ends with ctx. Of one without, the images have to be complete
// as far as they tell themselves. An envelope that is there has to be of the manifest,
// and what it has of keys that are trusted has to be right.
func OpenWith(ctx context.Context, dir string, o OpenOptions) (*Checkpoint, error) {
	ckpt, err := open(ctx, dir, o)
	if err != nil {
		return nil, wrap(dir, err)
	}
	return ckpt, nil
}

func open(ctx context.Context, dir string, o OpenOptions) (*Checkpoint, error) {
	files, err := listFolder(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fault.New(errdefs.ErrNotFound, "no such folder")
	case errors.Is(err, unix.ENOTDIR):
		return nil, fault.Invalid("not a folder")
	case err != nil:
		return nil, err
	}
	data, err := readManifestFile(dir)
	if err != nil {
		return nil, err
	}
	var manifest *Manifest
	if data != nil {
		if manifest, err = decodeManifest(data); err != nil {
			return nil, fmt.Errorf("%s: %w", layout.Manifest, err)
		}
	}
	if _, ok := files[layout.Inventory]; !ok {
		if _, err := os.Lstat(filepath.Join(dir, layout.Partial)); manifest != nil || err == nil {
			return nil, fault.Unusable("unfinished: whatever wrote it was interrupted; make the checkpoint again")
		}
		return nil, fault.Invalid("no checkpoint: the folder has no %s", layout.Inventory)
	}
	if err := checkNames(files, manifest); err != nil {
		return nil, err
	}
	ckpt := &Checkpoint{dir: dir, manifest: manifest, files: files}
	if manifest != nil {
		ckpt.digest = manifestDigest(data)
	}
	if ckpt.verdict, err = verifySignature(dir, manifest, data, o.Trust); err != nil {
		return nil, err
	}
	if o.Require && len(ckpt.verdict.Signers) == 0 {
		return nil, notSigned(ckpt.verdict, o.Trust)
	}
	if o.Allow != nil {
		if err := o.Allow(ckpt); err != nil {
			return nil, err
		}
	}
	if manifest == nil {
		found, err := ckpt.images().Derive()
		if err != nil {
			return nil, err
		}
		if err := checkHost(found.Arch, nil); err != nil && !o.AnyHost {
			return nil, err
		}
		ckpt.options = optionsOf(found)
		ckpt.tcp = func() ([]netip.Addr, error) { return found.TCP, nil }
		return ckpt, nil
	}
	if err := checkHost(manifest.Architecture, manifest.CPUFeatures); err != nil && !o.AnyHost {
		return nil, err
	}
	if err := verify(ctx, dir, files, manifest, o.Reread); err != nil {
		return nil, err
	}
	ckpt.options = manifest.Options
	ckpt.tcp = sync.OnceValues(func() ([]netip.Addr, error) {
		addrs, err := img.EstablishedTCP(dir)
		return addrs, wrap(dir, err)
	})
	return ckpt, nil
}

func (c *Checkpoint) images() img.Set {
	set := img.Set{Dir: c.dir, Sizes: make(map[string]int64, len(c.files))}
	for name, file := range c.files {
		set.Sizes[name] = file.size
	}
	return set
}

// optionsOf are the options that a manifest would have.
func optionsOf(f *img.Facts) Options {
	return Options{OpenTCP: f.OpenTCP, ExternalUnixSockets: f.ExternalUnixSockets, FileLocks: f.FileLocks, Terminal: f.Terminal}
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
			if st.Mode&unix.S_IFMT == unix.S_IFDIR && (name == layout.Partial || name == layout.LostFound) {
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

// readManifestFile returns the bytes of the manifest in dir, nil if there is none.
func readManifestFile(dir string) ([]byte, error) {
	return readBounded(dir, layout.Manifest, maxManifest)
}

func readBounded(dir, name string, limit int64) ([]byte, error) {
	f, err := openIn(dir, name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > limit {
		return nil, fault.Invalid("%s: larger than %d bytes", name, limit)
	}
	return data, nil
}

func readManifestBy(dir string, decode func([]byte) (*Manifest, error)) (*Manifest, error) {
	data, err := readManifestFile(dir)
	if err != nil || data == nil {
		return nil, err
	}
	m, err := decode(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", layout.Manifest, err)
	}
	return m, nil
}

// CopyManifest puts the manifest of the checkpoint in the folder from, and its
// envelope, into the folder to.
func CopyManifest(to, from string) error {
	for _, name := range []string{layout.Manifest, layout.Signature} {
		data, err := os.ReadFile(filepath.Join(from, name))
		if name == layout.Signature && errors.Is(err, fs.ErrNotExist) {
			break
		}
		if err == nil {
			err = os.WriteFile(filepath.Join(to, name), data, 0o600)
		}
		if err != nil {
			return err
		}
	}
	return nil
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
		case listed[name] || layout.IsIncidental(name) || name == layout.Manifest || name == layout.Signature:
		case m == nil && (layout.IsImage(name) && validName(name) || name == layout.Descriptors):
		case m != nil:
			return fault.Invalid("%q: not listed in %s; it was added later", name, layout.Manifest)
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

// verify compares the files with the manifest. Unless reread is set, one that is where
// it was made is not read.
func verify(ctx context.Context, dir string, files map[string]entry, m *Manifest, reread bool) error {
	var read []File
	for _, want := range m.Files {
		have, ok := files[want.Name]
		switch {
		case !ok:
			return fault.Invalid("%s: missing", want.Name)
		case have.size < want.Size:
			return fault.Invalid("%s: expected %d bytes, has %d (truncated)", want.Name, want.Size, have.size)
		case have.size > want.Size:
			return fault.Invalid("%s: expected %d bytes, has %d (altered)", want.Name, want.Size, have.size)
		case !reread && want.Inode != 0 && want.Inode == have.inode && want.CtimeNs == have.ctimeNs:
		default:
			read = append(read, want)
		}
	}
	slices.SortFunc(read, func(a, b File) int { return cmp.Compare(b.Size, a.Size) })
	if m.Version < signedVersion {
		return inParallel(ctx, len(read), func(ctx context.Context, i int) error {
			f, err := openIn(dir, read[i].Name)
			if err != nil {
				return err
			}
			defer f.Close()
			sum, err := oldSum(ctx, f, read[i].Name)
			if err != nil {
				return fmt.Errorf("%s: %w", read[i].Name, err)
			}
			return compare(read[i], sum)
		})
	}
	sums, err := sumFiles(ctx, dir, read)
	if err != nil {
		return err
	}
	for i, want := range read {
		if err := compare(want, sums[i].Text); err != nil {
			return err
		}
	}
	return nil
}

func compare(want File, sum string) error {
	if sum != want.Sum {
		return fault.Invalid("%s: altered: its sum is %s, expected %s", want.Name, sum, want.Sum)
	}
	return nil
}

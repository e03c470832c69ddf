package archive

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/checkpoint/rootfs"
	"github.com/stasis-run/stasis/checkpoint/tarcheck"
)

// Read reads an archive that Podman, CRI-O, containerd's CRI or Write made,
// compressed or not, into the folder dir, which it makes:
//
//	dir/checkpoint/            CRIU's images, the capture's Images
//	dir/layer.tar              the capture's Layer, unless it is nil
//	dir/devshm-checkpoint.tar  the capture's DevShm, unless it is empty
//
// Files are 0600, folders 0700. Logs of the container, volumes and whatever else
// stands in an archive are passed over; so is the network, which a restore makes
// anew. Spec is spec.dump as it is, and nothing in it may be trusted.
//
// An archive that is none, is cut short, has links, devices, paths that lead
// elsewhere, the same file twice, or more than the limits allow is an error that
// matches errdefs.ErrInvalidArgument, and dir is removed again. If dir exists,
// the error matches errdefs.ErrAlreadyExists.
func Read(ctx context.Context, r io.Reader, dir string, limits Limits) (*capture.Capture, error) {
	var c *capture.Capture
	err := intoNew(dir, "read", func() (err error) {
		c, err = read(ctx, r, dir, limits.withDefaults())
		return err
	})
	if err != nil {
		return nil, err
	}
	return c, nil
}

// intoNew makes the folder dir and calls fill. If that fails, dir is removed again. verb
// is what the caller does with an archive, for the error.
func intoNew(dir, verb string, fill func() error) error {
	if err := os.Mkdir(dir, 0o700); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return fault.New(errdefs.ErrAlreadyExists, "%s an archive into %s: it exists; give a folder that does not", verb, dir)
		}
		return fmt.Errorf("%s an archive: %w", verb, err)
	}
	if err := fill(); err != nil {
		return errors.Join(fmt.Errorf("%s the archive of a checkpoint: %w", verb, err), os.RemoveAll(dir))
	}
	return nil
}

func read(ctx context.Context, r io.Reader, dir string, limits Limits) (*capture.Capture, error) {
	out, err := newFolder(dir, limits.Total)
	if err != nil {
		return nil, err
	}
	defer out.root.Close()
	if err := out.root.Mkdir(layout.Images, 0o700); err != nil {
		return nil, err
	}
	var meta metadata
	var seen map[string]bool
	err = eachFile(ctx, r, limits, func(in *entries, hdr *tar.Header) (err error) {
		seen = in.seen
		if dest, ok := meta.of(hdr.Name); ok {
			*dest, err = in.read(hdr, limits.Metadata)
			return err
		}
		return out.file(in, hdr)
	})
	if err != nil {
		return nil, err
	}
	c, err := meta.capture()
	if err != nil {
		return nil, err
	}
	c.Images = filepath.Join(dir, layout.Images)
	if !seen[layout.Images+"/"+layout.Inventory] {
		return nil, fault.Invalid("no checkpoint: there is no %s/%s", layout.Images, layout.Inventory)
	}
	// Of archives of containers/storage's programs; see rootName.
	var mode int64
	if engine := c.Info.Engine.Name; engine == enginePodman || engine == engineCRIO {
		mode = rootMode(c.Images)
	}
	if err := out.join(meta.deleted, mode); err != nil {
		return nil, err
	}
	if seen[layout.DevShm] {
		c.DevShm = filepath.Join(dir, layout.DevShm)
	}
	if out.layer {
		c.Layer = capture.FileLayer(filepath.Join(dir, layout.Layer))
	}
	return c, nil
}

// maxDeleted bounds the list of deleted files.
const maxDeleted = 1 << 20

// metadata are the files of JSON; nil where there is none.
type metadata struct{ config, spec, deleted []byte }

// of returns where a file of JSON belongs.
func (m *metadata) of(name string) (*[]byte, bool) {
	switch name {
	case configName:
		return &m.config, true
	case specName:
		return &m.spec, true
	case deletedName:
		return &m.deleted, true
	}
	return nil, false
}

// capture is what the metadata say.
func (m *metadata) capture() (*capture.Capture, error) {
	switch {
	case m.config == nil:
		return nil, missing(configName)
	case m.spec == nil:
		return nil, missing(specName)
	}
	conf, err := m.parseConfig()
	if err != nil {
		return nil, err
	}
	annotations, err := annotationsOf(m.spec)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", specName, err)
	}
	c := &capture.Capture{Info: conf.info(annotations), Spec: m.spec}
	if conf.Stasis != nil {
		c.Spec, err = removeAnnotations(m.spec, conf.Stasis.Annotations)
	}
	return c, err
}

func (m *metadata) parseConfig() (config, error) {
	var c config
	if err := json.Unmarshal(m.config, &c); err != nil {
		return config{}, fault.Invalid("%s: %v", configName, err)
	}
	if c.ID == "" {
		return config{}, fault.Invalid("%s: the container has no ID", configName)
	}
	return c, nil
}

// folder is where Read writes. All goes through root, so nothing is written
// outside, whatever a name says.
type folder struct {
	root  *os.Root
	limit int64 // bytes that may be written
	left  int64 // what is left of it
	layer bool  // there is one
}

func newFolder(dir string, total int64) (*folder, error) {
	total, err := capture.Limit(dir, total)
	if err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	return &folder{root: root, limit: total, left: total}, nil
}

// file puts a file of the archive where it belongs.
func (f *folder) file(in *entries, hdr *tar.Header) error {
	switch dir, name, _ := strings.Cut(hdr.Name, "/"); {
	case hdr.Name == filesName:
		// Of containerd it is compressed within an archive that is not.
		files, err := Decompress(in.tar)
		if err != nil {
			return fmt.Errorf("%s: %w", hdr.Name, truncated(hdr.Name, err))
		}
		defer files.Close()
		f.layer = true
		buf := bufio.NewReaderSize(files, 64<<10)
		if err := skipRoot(buf); err != nil {
			return truncated(hdr.Name, err)
		}
		return f.tar(layout.Layer, hdr.Name, buf)
	case hdr.Name == layout.DevShm:
		return f.tar(hdr.Name, hdr.Name, in.tar)
	case hdr.Name == layout.DumpStats, hdr.Name == layout.DumpLog:
		return f.incidental(in, layout.Images+"/"+hdr.Name, hdr)
	case dir != layout.Images:
		return nil
	case name == "" || name[0] == '.' || strings.Contains(name, "/"):
		return fault.Invalid("%q: CRIU's images are plain files in one folder", hdr.Name)
	case name == layout.DumpStats || name == layout.DumpLog:
		return f.incidental(in, hdr.Name, hdr)
	default:
		return f.write(hdr.Name, hdr.Name, in.tar)
	}
}

// incidental writes a file that may stand in an archive's root as well as among
// the images: the first wins.
func (f *folder) incidental(in *entries, dest string, hdr *tar.Header) error {
	if _, err := f.root.Lstat(dest); err == nil {
		return nil
	}
	return f.write(dest, hdr.Name, in.tar)
}

// tar is write for a tar, which is handed on as it is: it must be the same to all
// that read it.
func (f *folder) tar(dest, from string, r io.Reader) error {
	return f.write(dest, from, tarcheck.NewReader(r, nil))
}

// write writes a new file. from is its name in the archive.
func (f *folder) write(dest, from string, r io.Reader) error {
	file, err := f.root.OpenFile(dest, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	n, err := io.Copy(file, io.LimitReader(r, f.left+1))
	f.left -= n
	if err := errors.Join(truncated(from, err), file.Close()); err != nil {
		return fmt.Errorf("%s: %w", from, err)
	}
	if f.left < 0 {
		return capture.TooLarge(from, f.limit)
	}
	return nil
}

// join puts the list of deleted files, if there is one, into the layer, and a
// root folder with the mode, unless that is 0 or the layer has one.
func (f *folder) join(deletedFiles []byte, mode int64) error {
	var deleted []string
	if deletedFiles != nil {
		if err := json.Unmarshal(deletedFiles, &deleted); err != nil {
			return fault.Invalid("%s: %v", deletedName, err)
		}
		if len(deleted) > maxDeleted {
			return fault.Invalid("%s: more than %d files", deletedName, maxDeleted)
		}
	}
	if deletedFiles == nil && mode == 0 {
		return nil
	}
	var files io.Reader = bytes.NewReader(make([]byte, 2*blockSize)) // a tar of nothing
	if f.layer {
		old, err := f.root.Open(layout.Layer)
		if err != nil {
			return err
		}
		defer old.Close()
		first, err := tar.NewReader(old).Next()
		if err == nil && path.Clean(first.Name) == "." {
			mode = 0
		}
		if _, err := old.Seek(0, io.SeekStart); err != nil {
			return err
		}
		files = old
	}
	if mode != 0 {
		root, err := rootEntry("./", &tar.Header{Mode: mode})
		if err != nil {
			return err
		}
		files = io.MultiReader(bytes.NewReader(root), files)
	}
	r, w := io.Pipe()
	go func() { w.CloseWithError(rootfs.JoinDeleted(files, deleted, w)) }()
	defer r.Close() // ends the other, whatever happens here
	const joined = layout.Layer + ".new"
	if err := f.write(joined, filesName+", "+deletedName, r); err != nil {
		return err
	}
	f.layer = true
	return f.root.Rename(joined, layout.Layer)
}

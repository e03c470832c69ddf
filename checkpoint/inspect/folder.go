package inspect

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/stasis-run/stasis/checkpoint/criu/img"
	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/layout"
)

// folder is an open folder and the sizes of the files in it, in bytes.
type folder struct {
	dir   *os.File
	files map[string]int64
}

func openFolder(path string) (*folder, error) {
	d, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fault.New(errdefs.ErrNotFound, "no such folder")
	case errors.Is(err, unix.ENOTDIR):
		return nil, fault.Invalid("not a folder")
	case err != nil:
		return nil, err
	}
	f := &folder{d, map[string]int64{}}
	if err := f.list(); err != nil {
		d.Close()
		return nil, err
	}
	return f, nil
}

func (f *folder) close() { f.dir.Close() }

// list passes over subfolders: what of a checkpoint is in one is unfinished.
func (f *folder) list() error {
	for {
		names, err := f.dir.Readdirnames(1024)
		for _, name := range names {
			var st unix.Stat_t
			if err := unix.Fstatat(int(f.dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			switch st.Mode & unix.S_IFMT {
			case unix.S_IFREG:
				f.files[name] = st.Size
			case unix.S_IFDIR:
			default:
				return fault.Invalid("%q: neither a file nor a folder; a checkpoint has only regular files", name)
			}
		}
		if len(f.files) > maxEntries {
			return fault.Invalid("more than %d files", maxEntries)
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// open opens a file of the folder for reading.
func (f *folder) open(name string) (*os.File, error) {
	// O_NONBLOCK, lest a FIFO that has replaced the file stops us.
	fd, err := unix.Openat(int(f.dir.Fd()), name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	file := os.NewFile(uintptr(fd), name)
	info, err := file.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fault.Invalid("%s: not a regular file", name)
	}
	if err != nil {
		file.Close()
		return nil, err
	}
	return file, nil
}

// small returns a file of no more than limit bytes.
func (f *folder) small(name string, limit int64) ([]byte, error) {
	file, err := f.open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = fault.Invalid("%s: larger than %d bytes", name, limit)
	}
	return data, err
}

// each calls fn with each message of an image of the given kind; the message is
// valid until fn returns. An error ends it, stop without one. An image that is
// not there is an error of fs.ErrNotExist.
func (f *folder) each(name, kind string, fn func(msg []byte) error) error {
	file, err := f.open(name)
	if err != nil {
		return err
	}
	defer file.Close()
	limit := int64(maxImage)
	if layout.Pagemap.Begins(name) {
		limit = maxPagemap
	}
	if size := f.files[name]; size > limit {
		return fault.Invalid("%s: %d bytes, at most %d are allowed", name, size, limit)
	}
	err = img.Each(file, f.files[name], kind, fn)
	if err == nil || err == stop {
		return nil
	}
	return fmt.Errorf("%s: %w", name, err)
}

// one decodes the first message of an image.
func (f *folder) one(name, kind string, into proto.Message) error {
	found := false
	err := f.each(name, kind, func(msg []byte) error {
		found = true
		if err := img.Decode(msg, into); err != nil {
			return err
		}
		return stop
	})
	if err == nil && !found {
		err = fault.Invalid("%s: empty", name)
	}
	return err
}

// sizes adds up what the folder holds.
func (f *folder) sizes() Sizes {
	var s Sizes
	for name, size := range f.files {
		s.Total += size
		s.Files++
		switch {
		case layout.Pages.Begins(name):
			s.Memory += size
		case layout.GhostFile.Begins(name), layout.Tmpfs.Begins(name):
			s.Content += size
		}
	}
	return s
}

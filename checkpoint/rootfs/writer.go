package rootfs

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/fault"
)

const (
	whiteoutPrefix = ".wh."
	opaqueName     = ".wh..wh..opq"

	xattrRecord = "SCHILY.xattr."
	// completeRecord on an entry says that the file has no other of the extended
	// attributes that a layer carries. Without it, an attribute that the container
	// removed from a folder of the image would be back after Apply, which finds
	// the folder there. Other programs pass over the record.
	completeRecord = "STASIS.xattrs"
	completeValue  = "complete"
)

// change is one entry of a layer. Those of a folder come after its own.
type change struct {
	in      *folder
	name    string // in that folder, "." for the root of the tree
	removed bool   // else it was added, or is different
	st      unix.Stat_t
}

func (c *change) path() string { return c.in.at(c.name) }

// checkName refuses what a layer has another meaning for.
func (c *change) checkName() error {
	if strings.HasPrefix(c.name, whiteoutPrefix) {
		return fault.Unusable("/%s: no layer can hold a file whose name begins with %q; rename or remove it", c.path(), whiteoutPrefix)
	}
	return nil
}

// writer writes changes as an OCI layer.
//
// containerd's archive.ChangeWriter does the same, but for a copy of a container
// it leaves out too much: all extended attributes but security.capability, and
// times below the second.
type writer struct {
	tw    *tar.Writer
	links map[inode]string // files of several names: the first one
	buf   []byte
}

func newWriter(w io.Writer) *writer {
	return &writer{tw: tar.NewWriter(w), links: map[inode]string{}, buf: make([]byte, 256<<10)}
}

func (w *writer) add(ctx context.Context, c *change) error {
	if err := ended(ctx); err != nil {
		return err
	}
	if c.removed {
		return writeWhiteout(w.tw, c.path())
	}
	hdr := &tar.Header{
		Name:    c.path(),
		Format:  tar.FormatPAX, // long and non-UTF-8 names, nanoseconds
		Mode:    int64(c.st.Mode & 0o7777),
		Uid:     int(c.st.Uid),
		Gid:     int(c.st.Gid),
		ModTime: time.Unix(c.st.Mtim.Unix()),
	}
	switch kind(&c.st) {
	case unix.S_IFDIR:
		hdr.Typeflag = tar.TypeDir
		if hdr.Name += "/"; hdr.Name == "/" {
			hdr.Name = "./"
		}
	case unix.S_IFLNK:
		hdr.Typeflag = tar.TypeSymlink
		target, err := c.in.readlink(c.name)
		if err != nil {
			return err
		}
		hdr.Linkname = target
	case unix.S_IFCHR, unix.S_IFBLK:
		hdr.Typeflag = tar.TypeChar
		if kind(&c.st) == unix.S_IFBLK {
			hdr.Typeflag = tar.TypeBlock
		}
		hdr.Devmajor, hdr.Devminor = int64(unix.Major(c.st.Rdev)), int64(unix.Minor(c.st.Rdev))
	case unix.S_IFIFO:
		hdr.Typeflag = tar.TypeFifo
	case unix.S_IFREG:
		hdr.Typeflag = tar.TypeReg
		hdr.Size = c.st.Size
	default:
		return fmt.Errorf("/%s: unknown kind of file, mode %o", c.path(), c.st.Mode)
	}
	if !isFolder(&c.st) && c.st.Nlink > 1 {
		if first, ok := w.links[inodeOf(&c.st)]; ok {
			hdr.Typeflag, hdr.Linkname, hdr.Size = tar.TypeLink, first, 0
		} else {
			w.links[inodeOf(&c.st)] = hdr.Name
		}
	}
	// Of a hard link too: containerd sets its owner again, which takes away the
	// capabilities of the file.
	if err := addXattrs(c, hdr); err != nil {
		return err
	}
	if err := w.header(c, hdr); err != nil {
		return err
	}
	if hdr.Typeflag == tar.TypeReg && hdr.Size > 0 {
		return w.content(ctx, c, hdr.Size)
	}
	return nil
}

func addXattrs(c *change, hdr *tar.Header) error {
	all, err := xattrsAt(c.in.proc(c.name)).carried()
	if err != nil {
		return c.in.fail("read the extended attributes of", c.name, err)
	}
	hdr.PAXRecords = map[string]string{}
	if kind(&c.st) == unix.S_IFREG || isFolder(&c.st) {
		hdr.PAXRecords[completeRecord] = completeValue
	}
	for name, value := range maps.All(all) {
		if strings.Contains(name, "=") {
			return fault.Unusable("/%s: no tar can hold an extended attribute with %q in its name: %q", c.path(), "=", name)
		}
		hdr.PAXRecords[xattrRecord+name] = value
	}
	return nil
}

func (w *writer) header(c *change, hdr *tar.Header) error {
	if err := w.tw.WriteHeader(hdr); err != nil {
		return fmt.Errorf("write the layer's entry of /%s: %w", c.path(), err)
	}
	return nil
}

// content writes the file, holes as zeros: tar's ways to write holes are not for
// layers (image-spec, layer.md), and break images that Podman pulls.
func (w *writer) content(ctx context.Context, c *change, size int64) error {
	fd, err := c.in.openFile(c.name)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), c.path())
	defer f.Close()
	for left := size; left > 0; {
		if err := ended(ctx); err != nil {
			return err
		}
		n, err := f.Read(w.buf[:min(left, int64(len(w.buf)))])
		if errors.Is(err, io.EOF) {
			return c.in.fail("read", c.name, errChanged)
		}
		if err != nil {
			return err
		}
		if _, err := w.tw.Write(w.buf[:n]); err != nil {
			return fmt.Errorf("write the content of /%s: %w", c.path(), err)
		}
		left -= int64(n)
	}
	return nil
}

// close ends the tar.
func (w *writer) close() error {
	if err := w.tw.Close(); err != nil {
		return fmt.Errorf("end the layer: %w", err)
	}
	return nil
}

// writeWhiteout writes the marker that a file was deleted.
func writeWhiteout(tw *tar.Writer, deleted string) error {
	dir, base := path.Split(deleted)
	err := tw.WriteHeader(&tar.Header{
		Typeflag: tar.TypeReg,
		Name:     dir + whiteoutPrefix + base,
		Format:   tar.FormatPAX,
		ModTime:  time.Unix(0, 0),
	})
	if err != nil {
		return fmt.Errorf("write the whiteout of /%s: %w", deleted, err)
	}
	return nil
}

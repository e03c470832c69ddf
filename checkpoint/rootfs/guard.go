package rootfs

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"math"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/tarcheck"
)

// limits bound what a layer may ask for.
type limits struct {
	entries int
	content int64 // bytes of all files, holes counted
	names   int64 // bytes of memory for the names
}

var defaultLimits = limits{entries: 4 << 20, content: 1 << 40, names: 512 << 20}

// nameCost is what a name takes beside its letters, about.
const nameCost = 64

// guard reads the entries of a layer, or of a tar without whiteouts, and refuses
// those that no honest one has. Its errors match errdefs.ErrInvalidArgument.
type guard struct {
	tr   *tar.Reader
	scan *tarcheck.Reader // below tr
	in   *input
	limits
	left limits
	// seen has the path of each entry, and of the folders above it, and whether it
	// is a folder. The markers' own folders are not in it.
	seen map[string]bool
}

func newGuard(r io.Reader, l limits) *guard {
	in := &input{Reader: r}
	scan := tarcheck.NewReader(in, nil)
	return &guard{tr: tar.NewReader(scan), scan: scan, in: in, limits: l, left: l, seen: map[string]bool{}}
}

// input remembers that there is no more. To archive/tar a file cut between two
// entries is one that ends there; but a whole tar ends before its file does.
type input struct {
	io.Reader
	exhausted bool
}

func (i *input) Read(p []byte) (int, error) {
	n, err := i.Reader.Read(p)
	if n == 0 && err == io.EOF {
		i.exhausted = true
	}
	return n, err
}

// item is an entry of a tar.
type item struct {
	*tar.Header
	path string // relative and clean; "" is the root
}

// next returns the next entry, or io.EOF. Its content is read from g.tr.
func (g *guard) next() (item, error) {
	for {
		hdr, err := g.tr.Next()
		if err == io.EOF && g.in.exhausted {
			err = io.ErrUnexpectedEOF
		}
		if err == io.EOF {
			if err := g.scan.Finish(); err != nil {
				return item{}, readError("", err)
			}
			return item{}, io.EOF
		}
		if err != nil {
			return item{}, readError("", err)
		}
		if g.left.entries--; g.left.entries < 0 {
			return item{}, fault.Invalid("the tar has more than %d entries", g.entries)
		}
		if hdr.Typeflag == tar.TypeXGlobalHeader {
			continue // a comment
		}
		return g.check(hdr)
	}
}

// readError tells a tar that is broken from a reader that has failed.
func readError(name string, err error) error {
	switch {
	case errors.Is(err, io.ErrUnexpectedEOF):
		err = errors.New("it is truncated")
	case errors.Is(err, tar.ErrHeader), errors.Is(err, tar.ErrFieldTooLong):
	default:
		return err
	}
	if name != "" {
		return fault.Invalid("%q: read the tar: %v", name, err)
	}
	return fault.Invalid("read the tar: %v", err)
}

func (g *guard) check(hdr *tar.Header) (item, error) {
	isFolder := hdr.Typeflag == tar.TypeDir
	name := hdr.Name
	if isFolder {
		name = strings.TrimRight(name, "/")
		if name == "" && hdr.Name != "" {
			name = "/" // which is refused
		}
	}
	p, err := cleanPath(name)
	if err != nil {
		return item{}, fault.Invalid("entry %q: %v", hdr.Name, err)
	}
	refused := func(format string, args ...any) (item, error) {
		return item{}, fault.Invalid("entry %q: %s", hdr.Name, fmt.Sprintf(format, args...))
	}
	if p == "" && !isFolder {
		return refused("the root can only be a folder")
	}
	if was, ok := g.seen[p]; ok && !(was && isFolder) { // containerd repeats folders
		return refused("it is in the tar twice")
	}
	if !g.see(p, isFolder) {
		return refused("the names in the tar take more than %d bytes", defaultLimits.names)
	}
	switch hdr.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse:
		if hdr.Size < 0 || hdr.Size > g.left.content {
			return refused("the files of the tar are larger than %d bytes", defaultLimits.content)
		}
		g.left.content -= hdr.Size
		hdr.Typeflag = tar.TypeReg
	case tar.TypeLink:
		if hdr.Linkname, err = cleanPath(hdr.Linkname); err != nil || hdr.Linkname == "" {
			return refused("a hard link to nowhere in the root")
		}
	case tar.TypeSymlink:
		// It may name anything: in the container it leads nowhere else than
		// the container's root, and nothing here follows it elsewhere.
		if hdr.Linkname == "" || len(hdr.Linkname) >= unix.PathMax || strings.ContainsRune(hdr.Linkname, 0) {
			return refused("a symbolic link without a proper target")
		}
	case tar.TypeChar, tar.TypeBlock:
		if hdr.Devmajor < 0 || hdr.Devmajor >= 1<<12 || hdr.Devminor < 0 || hdr.Devminor >= 1<<20 {
			return refused("no such device can be: %d:%d", hdr.Devmajor, hdr.Devminor)
		}
		if hdr.Typeflag == tar.TypeChar && hdr.Devmajor == 0 && hdr.Devminor == 0 {
			return refused("a whiteout of overlayfs, which no layer has")
		}
	case tar.TypeDir, tar.TypeFifo:
	default:
		return refused("unknown type %q", hdr.Typeflag)
	}
	for _, id := range []int{hdr.Uid, hdr.Gid} {
		if id < 0 || id >= math.MaxUint32 { // the last means no change
			return refused("no such owner can be: %d:%d", hdr.Uid, hdr.Gid)
		}
	}
	if hdr.Mode < 0 {
		return refused("no such mode can be: %d", hdr.Mode)
	}
	for record := range hdr.PAXRecords {
		name, ok := strings.CutPrefix(record, xattrRecord)
		if ok && (strings.HasPrefix(name, "trusted.") || strings.HasPrefix(name, "user.overlay.")) {
			return refused("extended attribute %q, which is for file systems, not for layers", name)
		}
	}
	if base := path.Base(p); strings.HasPrefix(base, whiteoutPrefix) && base != opaqueName {
		// What else begins with .wh..wh. was aufs's own.
		if name := base[len(whiteoutPrefix):]; name == "" || name == "." || name == ".." || strings.HasPrefix(name, whiteoutPrefix) {
			return refused("no such whiteout can be")
		}
	}
	return item{hdr, p}, nil
}

// see records a path, and reports whether there was room for it.
func (g *guard) see(p string, isFolder bool) bool {
	marker := strings.HasPrefix(path.Base(p), whiteoutPrefix)
	for {
		g.seen[p] = isFolder
		if g.left.names -= int64(len(p)) + nameCost; g.left.names < 0 {
			return false
		}
		if p, _ = split(p); p == "" || marker {
			return true
		}
		if _, ok := g.seen[p]; ok {
			return true
		}
		isFolder = true
	}
}

// whiteout returns the path that an entry says was deleted.
func (i item) whiteout() (deleted string, ok bool) {
	dir, base := path.Split(i.path)
	name, ok := strings.CutPrefix(base, whiteoutPrefix)
	return dir + name, ok && base != opaqueName
}

// opaque returns the folder of which an entry says that nothing from below is in
// it.
func (i item) opaque() (folder string, ok bool) {
	dir, base := path.Split(i.path)
	return strings.TrimSuffix(dir, "/"), base == opaqueName
}

// cleanPath returns a path without "./", and "" for the root. It refuses one
// that is absolute or goes up, even if it comes back.
func cleanPath(name string) (string, error) {
	switch {
	case name == "":
		return "", errors.New("no name")
	case name[0] == '/':
		return "", errors.New("an absolute path")
	case len(name) >= unix.PathMax:
		return "", errors.New("a name too long")
	case strings.ContainsRune(name, 0):
		return "", errors.New("a name with a zero byte")
	case slices.Contains(strings.Split(name, "/"), ".."):
		return "", errors.New(`a path with ".."`)
	}
	if name = path.Clean(name); name == "." {
		name = ""
	}
	return name, nil
}

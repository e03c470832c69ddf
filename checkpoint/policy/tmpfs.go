package policy

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"path"
	"strings"

	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/checkpoint/tarcheck"
)

// checkTmpfs looks at the files of the container's tmpfs mounts, which CRIU has
// tar unpack as root.
func (c *checker) checkTmpfs() error {
	if err := c.readMounts(); err != nil {
		return err
	}
	ways := map[string][]*mountTree{} // by the number in an archive's name
	for _, list := range c.mounts {
		tree := newMountTree(list)
		for _, m := range list {
			for _, number := range m.archives() {
				if n := len(ways[number]); n == 0 || ways[number][n-1] != tree {
					ways[number] = append(ways[number], tree)
				}
			}
		}
	}
	c.tmpfsLinks, c.tmpfsWays = map[string]map[string]string{}, ways
	for _, name := range c.ckpt.Names() {
		if layout.Tmpfs.Begins(name) {
			if err := c.checkArchive(name); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *checker) checkArchive(name string) error {
	f, err := c.ckpt.OpenFile(name)
	if err != nil {
		return err
	}
	defer f.Close()
	unzipped, err := gzip.NewReader(f)
	if err != nil {
		return fault.Invalid("%s: no gzip: %v", name, err)
	}
	in := &boundedReader{ctx: c.ctx, r: unzipped, left: math.MaxInt64}
	if limit := c.limits().withSwap; limit > 0 && limit < math.MaxInt64/2 {
		in.left = 2 * int64(limit) // holes take no memory
	}
	// What is checked here by Go's reader, CRIU hands to GNU tar.
	scan := tarcheck.NewReader(in, nil)
	archive := tar.NewReader(scan)
	number := archiveNumber(name)
	// Two archives may have one number: tmpfs-5 and tmpfs-dev-5.
	links := c.tmpfsLinks[number]
	if links == nil {
		links = map[string]string{}
		c.tmpfsLinks[number] = links
	}
	for {
		if err := c.budget.spend(1, 0); err != nil {
			return err
		}
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			if err = scan.Finish(); err == nil {
				return nil
			}
		}
		if errors.Is(err, errTooLarge) {
			c.refuse("%s: has more than fits the container's memory limit", name)
			return nil
		}
		if err != nil {
			if cause := context.Cause(c.ctx); cause != nil {
				return cause
			}
			return fault.Invalid("%s: no tar archive: %v", name, err)
		}
		if err := c.budget.spend(0, len(h.Name)+len(h.Linkname)); err != nil {
			return err
		}
		if len(h.Name) > maxPath || len(h.Linkname) > maxPath {
			return fault.Invalid("%s: a name of more than %d bytes", name, maxPath)
		}
		if climbs(h.Name) || strings.HasPrefix(h.Name, "/") || h.Typeflag == tar.TypeLink && (climbs(h.Linkname) || strings.HasPrefix(h.Linkname, "/")) {
			c.refuse("%s: file %s is outside of its mount", name, quote(h.Name))
		}
		file := path.Clean(h.Name)
		for dir := path.Dir(file); dir != "." && dir != "/"; dir = path.Dir(dir) {
			if err := c.budget.step(); err != nil {
				return err
			}
			if _, link := links[dir]; link {
				c.refuse("%s: file %s is behind a link of the archive", name, quote(h.Name))
				break
			}
		}
		target, link := links[path.Clean(h.Linkname)] // of a second name of a link
		if h.Typeflag == tar.TypeSymlink {
			target, link = h.Linkname, true
		} else if h.Typeflag != tar.TypeLink {
			link = false
		}
		if link {
			if before, twice := links[file]; twice && before != target {
				c.refuse("%s: %s is a link to two files", name, quote(h.Name))
			}
			links[file] = target
			if err := c.checkLink(name, number, file); err != nil {
				return err
			}
		}
		switch h.Typeflag {
		case tar.TypeReg, tar.TypeDir, tar.TypeSymlink, tar.TypeLink, tar.TypeFifo, tar.TypeGNUSparse:
		case tar.TypeChar, tar.TypeBlock:
			if h.Typeflag == tar.TypeBlock || !c.grant.deviceNodes[[2]int64{h.Devmajor, h.Devminor}] {
				if !c.mayMakeDevice(h) {
					c.refuse("%s: %s is device %d:%d, which the spec does not have", name, quote(h.Name), h.Devmajor, h.Devminor)
				}
			}
		default:
			c.refuse("%s: %s is of an unknown kind (%q)", name, quote(h.Name), h.Typeflag)
		}
	}
}

// archiveNumber is what the name of an archive has of the mount that it is of.
func archiveNumber(name string) string {
	return strings.TrimSuffix(strings.TrimPrefix(strings.TrimPrefix(name, string(layout.Tmpfs)), "dev-"), layout.TmpfsSuffix)
}

// archives are the numbers of the archives that may have a mount's files: that of
// its file system, and in CRIU before 3.0 its own.
func (m mountEntry) archives() [2]string {
	return [2]string{fmt.Sprint(m.GetRootDev()), fmt.Sprint(m.GetMntId())}
}

// checkLink refuses a link on the way to a mount: CRIU follows it, before the root
// filesystem is the container's.
func (c *checker) checkLink(archive, number, file string) error {
	for _, tree := range c.tmpfsWays[number] {
		for _, m := range tree.tars[number] {
			if err := c.budget.step(); err != nil {
				return err
			}
			link := path.Join(m.at, file)
			if at, ok := tree.ways[link]; ok {
				c.refuse("%s: %s is a link on the way to the mount at %s", archive, quote(file), quote(at))
				return nil
			}
		}
	}
	return nil
}

// mayMakeDevice tells whether the container can make the device itself.
func (c *checker) mayMakeDevice(h *tar.Header) bool {
	if c.grant.any("CAP_MKNOD") {
		return true // what can be opened, the device cgroup decides
	}
	if c.spec.Linux == nil {
		return false
	}
	for _, d := range c.spec.Linux.Devices {
		if d.Major == h.Devmajor && d.Minor == h.Devminor && (d.Type == "b") == (h.Typeflag == tar.TypeBlock) {
			return true
		}
	}
	return false
}

var errTooLarge = errors.New("too large")

// boundedReader ends with a context, and after so many bytes.
type boundedReader struct {
	ctx  context.Context
	r    io.Reader
	left int64
}

func (b *boundedReader) Read(p []byte) (int, error) {
	if err := context.Cause(b.ctx); err != nil {
		return 0, err
	}
	n, err := b.r.Read(p)
	if b.left -= int64(n); b.left < 0 {
		return n, errTooLarge
	}
	return n, err
}

package trust

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"path"
	"slices"
	"strings"

	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/tarcheck"
)

// checkTmpfs looks at the files of the container's tmpfs mounts, which CRIU has
// tar unpack as root.
func (c *checker) checkTmpfs() error {
	if err := c.readMounts(); err != nil {
		return err
	}
	for _, name := range c.img.Names() {
		if strings.HasPrefix(name, "tmpfs-") {
			if err := c.checkArchive(name); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *checker) checkArchive(name string) error {
	f, err := c.img.OpenFile(name)
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
	links := map[string]bool{}
	for {
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
		if climbs(h.Name) || strings.HasPrefix(h.Name, "/") || h.Typeflag == tar.TypeLink && (climbs(h.Linkname) || strings.HasPrefix(h.Linkname, "/")) {
			c.refuse("%s: file %s is outside of its mount", name, quote(h.Name))
		}
		file := path.Clean(h.Name)
		for dir := path.Dir(file); dir != "." && dir != "/"; dir = path.Dir(dir) {
			if links[dir] {
				c.refuse("%s: file %s is behind a link of the archive", name, quote(h.Name))
				break
			}
		}
		if h.Typeflag == tar.TypeSymlink {
			links[file] = true
			c.checkLink(name, file)
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

// checkLink refuses a link on the way to a mount: CRIU follows it, before the root
// filesystem is the container's.
func (c *checker) checkLink(archive, file string) {
	number := strings.TrimSuffix(strings.TrimPrefix(strings.TrimPrefix(archive, "tmpfs-"), "dev-"), ".tar.gz.img")
	for _, list := range c.mounts {
		for _, m := range list {
			// By its file system, in CRIU before 3.0 by itself.
			if number != fmt.Sprint(m.GetRootDev()) && number != fmt.Sprint(m.GetMntId()) {
				continue
			}
			link := path.Join(m.at, file)
			if i := slices.IndexFunc(list, func(other mountEntry) bool { return isBelow(other.at, link) }); i >= 0 {
				c.refuse("%s: %s is a link on the way to the mount at %s", archive, quote(file), quote(list[i].at))
			}
		}
	}
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

package node

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"

	"github.com/stasis-run/stasis/checkpoint/archive"
	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/oci"
)

// openCapture returns the checkpoint that arg names, whatever format it has: a
// folder of CRIU's images, an archive, or an image in containerd. A path that
// exists comes before an image of that name. limit is how many bytes it may have
// unpacked; 0: half of what is free on the disk. The second result removes what had
// to be unpacked; it is never nil.
func (n *Node) openCapture(ctx context.Context, arg string, limit int64) (*capture.Capture, func(), error) {
	nothing := func() {}
	info, err := n.stat(arg)
	switch {
	case err == nil && info.IsDir():
		return &capture.Capture{Images: arg}, nothing, nil
	case err == nil:
		f, err := openInput(ctx, arg)
		if err != nil {
			return nil, nothing, err
		}
		defer f.Close()
		return n.openArchive(ctx, f, limit)
	case !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrInvalid):
		return nil, nothing, err
	}
	c, err := n.Client(ctx)
	if err != nil {
		return nil, nothing, fmt.Errorf("%s is no file, and whether it is an image cannot be told: %w", arg, err)
	}
	img, err := localImage(ctx, c, arg)
	if err != nil {
		return nil, nothing, err
	}
	return n.unpacked(func(dir string) (*capture.Capture, error) {
		return oci.ReadLimited(ctx, c.ContentStore(), img.Target, dir, limit)
	})
}

// stat looks at a file that a checkpoint may be named by.
func (n *Node) stat(arg string) (os.FileInfo, error) {
	if n.o.ImagesOnly {
		return nil, &fs.PathError{Op: "stat", Path: arg, Err: fs.ErrNotExist}
	}
	return os.Stat(arg)
}

// openArchive is openCapture for an archive.
func (n *Node) openArchive(ctx context.Context, r io.Reader, limit int64) (*capture.Capture, func(), error) {
	return n.unpacked(func(dir string) (*capture.Capture, error) {
		return archive.Read(ctx, r, dir, archive.Limits{Total: limit})
	})
}

// unpacked has fn unpack a checkpoint into a folder that does not exist yet.
func (n *Node) unpacked(fn func(dir string) (*capture.Capture, error)) (*capture.Capture, func(), error) {
	w, err := n.newWork()
	if err != nil {
		return nil, func() {}, err
	}
	remove := func() {
		if err := w.remove(); err != nil {
			n.log.Warn(err.Error())
		}
	}
	c, err := fn(filepath.Join(w.dir, "capture"))
	return c, remove, err
}

// localImage returns the image in the store that arg names, as it is or with what is usually
// left out: docker.io/library and :latest.
func localImage(ctx context.Context, c *client.Client, arg string) (images.Image, error) {
	names := []string{arg}
	if named, err := reference.ParseDockerRef(arg); err == nil && named.String() != arg {
		names = append(names, named.String())
	}
	for _, name := range names {
		img, err := c.ImageService().Get(ctx, name)
		if err == nil || !errdefs.IsNotFound(err) {
			return img, err
		}
	}
	return images.Image{}, fmt.Errorf("%s: neither a file nor an image in containerd's namespace; `stasis ls` lists checkpoints: %w",
		arg, errdefs.ErrNotFound)
}

// findCheckpoint is localImage for an image that is to be a checkpoint.
func findCheckpoint(ctx context.Context, c *client.Client, arg string) (images.Image, error) {
	img, err := localImage(ctx, c, arg)
	if err != nil {
		return img, err
	}
	format, err := oci.Detect(ctx, c.ContentStore(), img.Target)
	// What is left of one whose content is gone is one still.
	if format == oci.None && (err == nil || img.Labels[oci.AnnotationCheckpoint] == "") {
		if err != nil {
			return img, fmt.Errorf("%s: %w", img.Name, err)
		}
		return img, fmt.Errorf("%s is an image, but no checkpoint: %w", img.Name, errdefs.ErrInvalidArgument)
	}
	return img, nil
}

// fullName completes a name for a new image.
func fullName(arg string) (string, error) {
	named, err := reference.ParseDockerRef(arg)
	if err != nil {
		return "", requestError("%s is no name for an image: %v", arg, err)
	}
	return named.String(), nil
}

// defaultRef is the name of a checkpoint that was given none.
func defaultRef(id string, at time.Time) string {
	return "localhost/" + imageName(id) + ":" + at.UTC().Format("20060102-150405")
}

// imageName makes a part of an image's name of a container's: lower case, with one
// separator between letters and digits.
func imageName(id string) string {
	name := separators.ReplaceAllStringFunc(strings.ToLower(id), func(s string) string {
		if s == "." || s == "_" {
			return s
		}
		return "-"
	})
	return cmp.Or(strings.Trim(name, ".-_"), "container")
}

var separators = regexp.MustCompile(`[^a-z0-9]+`)

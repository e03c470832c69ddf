package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/stasis-run/stasis/checkpoint/archive"
	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/image"
)

// runnable returns the runnable image of a checkpoint that is in any form: an
// image, which is pulled if need be, or an archive in a file. One of another form
// is made runnable first, under a name of its own, if it may have what its spec asks for.
func (a *app) runnable(ctx context.Context, c *client.Client, arg string, f *restoreFlags, bar *progress) (images.Image, error) {
	info, err := os.Stat(arg)
	switch {
	case err == nil && info.IsDir():
		return images.Image{}, fmt.Errorf("it is a folder, which lacks what a container needs besides its processes; `ctr run --runtime %s` with a criu_image_path restores one: %w",
			runtimeName, errdefs.ErrInvalidArgument)
	case err == nil:
		return a.runnableArchive(ctx, c, arg, f.plainHTTP, bar, f.checkSpec)
	case !errors.Is(err, fs.ErrNotExist) || strings.HasPrefix(arg, "/") || strings.HasPrefix(arg, "."):
		return images.Image{}, err
	}
	record, err := a.findImage(ctx, c, arg, f.plainHTTP, bar)
	if err != nil {
		return images.Image{}, err
	}
	f.madeHere = image.WasMadeHere(record)
	form, err := image.Detect(ctx, c.ContentStore(), record.Target)
	if err != nil {
		return images.Image{}, err
	}
	switch form {
	case image.Runnable:
		return record, nil
	case image.None:
		return images.Image{}, fmt.Errorf("it is an image, but no checkpoint of a container's processes; of `ctr containers checkpoint`, it needs --task: %w", errdefs.ErrInvalidArgument)
	}
	return a.madeRunnable(ctx, c, f.plainHTTP, bar, f.checkSpec, func(dir string) (*capture.Capture, string, error) {
		got, err := image.ReadLimited(ctx, c.ContentStore(), record.Target, dir, int64(a.maxSize))
		if err != nil {
			return nil, "", err
		}
		return got, "localhost/restored/" + strings.TrimPrefix(defaultRef(got.Info.ContainerName, got.Info.Checkpointed), "localhost/"), nil
	})
}

func (a *app) runnableArchive(ctx context.Context, c *client.Client, path string, plain bool, bar *progress, check func(context.Context, *capture.Capture) error) (images.Image, error) {
	f, err := a.openInput(ctx, path)
	if err != nil {
		return images.Image{}, err
	}
	defer f.Close()
	return a.madeRunnable(ctx, c, plain, bar, check, func(dir string) (*capture.Capture, string, error) {
		got, err := archive.Read(ctx, f, dir, archive.Limits{Total: int64(a.maxSize)})
		if err != nil {
			return nil, "", err
		}
		return got, defaultRef(got.Info.ContainerName, got.Info.Checkpointed), nil
	})
}

// madeRunnable makes a runnable image of what read puts into a folder; it returns
// the image's name, too.
func (a *app) madeRunnable(ctx context.Context, c *client.Client, plain bool, bar *progress, check func(context.Context, *capture.Capture) error,
	read func(dir string) (*capture.Capture, string, error)) (_ images.Image, err error) {
	work, err := a.newWork()
	if err != nil {
		return images.Image{}, err
	}
	defer func() { err = errors.Join(err, work.remove()) }()
	bar.Stage("read")
	got, name, err := read(filepath.Join(work.dir, "capture"))
	if err != nil {
		return images.Image{}, err
	}
	if err := check(ctx, got); err != nil {
		return images.Image{}, err
	}
	record, err := a.makeRunnable(ctx, c, name, got, plain, bar)
	if err != nil {
		return images.Image{}, err
	}
	if got.Layer == nil && !a.quiet {
		fmt.Fprintln(a.err, "stasis: the checkpoint does not have the files that the container changed (`ctr containers checkpoint` takes them with --rw); it gets those of its image")
	}
	return record, nil
}

// makeRunnable stores a capture as a runnable image. It is not compressed, as it
// is unpacked next.
func (a *app) makeRunnable(ctx context.Context, c *client.Client, name string, got *capture.Capture, plain bool, bar *progress) (images.Image, error) {
	base, err := a.findBase(ctx, c, got.Info.Base, plain, bar)
	if err != nil {
		return images.Image{}, err
	}
	desc, err := storeContent(ctx, c, got, base, "runnable", a.storeOptions(ctx, c, compression.Uncompressed, bar))
	if err != nil {
		return images.Image{}, err
	}
	return a.untyped(ctx, c, name, desc)
}

// findBase returns the image that a checkpoint builds on.
func (a *app) findBase(ctx context.Context, c *client.Client, base capture.Base, plain bool, bar *progress) (ocispec.Descriptor, error) {
	if base.Name == "" {
		return ocispec.Descriptor{}, fmt.Errorf("the checkpoint does not name the image that its container was made from: %w", errdefs.ErrFailedPrecondition)
	}
	before := time.Now()
	record, err := a.findImage(ctx, c, base.Name, plain, bar)
	if err == nil && record.CreatedAt.After(before) {
		a.added = append(a.added, record)
	}
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("the checkpoint builds on image %s, which is not here: %w", base.Name, err)
	}
	if base.Digest != "" && record.Target.Digest.String() != base.Digest && base.Config == "" {
		return ocispec.Descriptor{}, fmt.Errorf("the checkpoint builds on image %s with digest %s, and here it has %s: %w",
			base.Name, base.Digest, record.Target.Digest, errdefs.ErrFailedPrecondition)
	}
	if base.Config != "" {
		config, err := images.Config(ctx, c.ContentStore(), record.Target, platforms.Default())
		if err != nil {
			return ocispec.Descriptor{}, fmt.Errorf("look at image %s: %w", base.Name, err)
		}
		if want := strings.TrimPrefix(base.Config, "sha256:"); config.Digest.Encoded() != want {
			return ocispec.Descriptor{}, fmt.Errorf("the checkpoint builds on another image %s than is here: its config is %s, here it is %s: %w",
				base.Name, want, config.Digest.Encoded(), errdefs.ErrFailedPrecondition)
		}
	}
	return record.Target, nil
}

// findImage is localImage for an image that is pulled if it is not here.
func (a *app) findImage(ctx context.Context, c *client.Client, name string, plain bool, bar *progress) (images.Image, error) {
	record, err := localImage(ctx, c, name)
	if err == nil || !errdefs.IsNotFound(err) {
		return record, err
	}
	named, perr := reference.ParseDockerRef(name)
	if perr != nil || reference.Domain(named) == "localhost" {
		return images.Image{}, err
	}
	return a.pull(ctx, c, named.String(), plain, bar)
}

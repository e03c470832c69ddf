package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/stasis-run/stasis/checkpoint/archive"
	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/oci"
)

// runnable returns the runnable image of a checkpoint that is in any format: an
// image, which is pulled if need be, or an archive in a file. One of another format
// is made runnable first, under a name of its own, if it may have what its spec asks for.
func (op *restoring) runnable(ctx context.Context) (images.Image, error) {
	arg, c := op.Checkpoint, op.c
	info, err := op.node.stat(arg)
	switch {
	case err == nil && info.IsDir():
		return images.Image{}, fmt.Errorf("it is a folder, which lacks what a container needs besides its processes; `ctr run --runtime %s` with a criu_image_path restores one: %w",
			RuntimeName, errdefs.ErrInvalidArgument)
	case err == nil:
		return op.runnableArchive(ctx)
	case !errors.Is(err, fs.ErrNotExist) || strings.HasPrefix(arg, "/") || strings.HasPrefix(arg, "."):
		return images.Image{}, err
	}
	record, err := op.node.findImage(ctx, c, arg, op.Registry, op.bar)
	if err != nil {
		return images.Image{}, err
	}
	op.madeHere = oci.WasMadeHere(record)
	format, err := oci.Detect(ctx, c.ContentStore(), record.Target)
	if err != nil {
		return images.Image{}, err
	}
	switch format {
	case oci.Runnable:
		return record, nil
	case oci.None:
		return images.Image{}, fmt.Errorf("it is an image, but no checkpoint of a container's processes; of `ctr containers checkpoint`, it needs --task: %w", errdefs.ErrInvalidArgument)
	}
	return op.madeRunnable(ctx, func(dir string) (*capture.Capture, string, error) {
		got, err := oci.ReadLimited(ctx, c.ContentStore(), record.Target, dir, op.MaxSize)
		if err != nil {
			return nil, "", err
		}
		return got, "localhost/restored/" + strings.TrimPrefix(defaultRef(got.Info.ContainerName, got.Info.Checkpointed), "localhost/"), nil
	})
}

func (op *restoring) runnableArchive(ctx context.Context) (images.Image, error) {
	f, err := openInput(ctx, op.Checkpoint)
	if err != nil {
		return images.Image{}, err
	}
	defer f.Close()
	return op.madeRunnable(ctx, func(dir string) (*capture.Capture, string, error) {
		got, err := archive.Read(ctx, f, dir, archive.Limits{Total: op.MaxSize})
		if err != nil {
			return nil, "", err
		}
		return got, defaultRef(got.Info.ContainerName, got.Info.Checkpointed), nil
	})
}

// madeRunnable makes a runnable image of what read puts into a folder; it returns
// the image's name, too.
func (op *restoring) madeRunnable(ctx context.Context, read func(dir string) (*capture.Capture, string, error)) (_ images.Image, err error) {
	work, err := op.node.newWork()
	if err != nil {
		return images.Image{}, err
	}
	defer func() { err = errors.Join(err, work.remove()) }()
	op.bar.begin("read")
	got, name, err := read(filepath.Join(work.dir, "capture"))
	if err != nil {
		return images.Image{}, err
	}
	if err := op.checkSpec(ctx, got); err != nil {
		return images.Image{}, err
	}
	record, err := op.makeRunnable(ctx, name, got)
	if err != nil {
		return images.Image{}, err
	}
	if got.Layer == nil {
		op.node.log.Info("the checkpoint does not have the files that the container changed (`ctr containers checkpoint` takes them with --rw); it gets those of its image")
	}
	return record, nil
}

// makeRunnable stores a capture as a runnable image. It is not compressed, as it
// is unpacked next.
func (op *restoring) makeRunnable(ctx context.Context, name string, got *capture.Capture) (images.Image, error) {
	base, pulled, err := op.node.findBase(ctx, op.c, got.Info.Base, op.Registry, op.bar)
	if pulled != nil {
		op.added = append(op.added, *pulled)
	}
	if err != nil {
		return images.Image{}, err
	}
	o, err := storeOptions(ctx, op.c, "none", op.bar)
	if err != nil {
		return images.Image{}, err
	}
	desc, err := storeContent(ctx, op.c, got, base, FormatRunnable, o)
	if err != nil {
		return images.Image{}, err
	}
	img, made, err := untyped(ctx, op.c, name, desc)
	if made {
		op.added = append(op.added, img)
	}
	return img, err
}

// findBase returns the image that a checkpoint builds on; and its record if that was
// pulled, also if there is an error.
func (n *Node) findBase(ctx context.Context, c *client.Client, base capture.Base, registry Registry, bar *stages) (_ ocispec.Descriptor, pulled *images.Image, _ error) {
	if base.Name == "" {
		return ocispec.Descriptor{}, pulled, fmt.Errorf("the checkpoint does not name the image that its container was made from: %w", errdefs.ErrFailedPrecondition)
	}
	before := time.Now()
	record, err := imageByConfig(ctx, c, base)
	if errdefs.IsNotFound(err) {
		record, err = n.findImage(ctx, c, base.Name, registry, bar)
	}
	if err == nil && record.CreatedAt.After(before) {
		pulled = &record
	}
	if err != nil {
		return ocispec.Descriptor{}, pulled, fmt.Errorf("the checkpoint builds on image %s, which is not here: %w", base.Name, err)
	}
	if base.Digest != "" && record.Target.Digest.String() != base.Digest && base.Config == "" {
		return ocispec.Descriptor{}, pulled, fmt.Errorf("the checkpoint builds on image %s with digest %s, and here it has %s: %w",
			base.Name, base.Digest, record.Target.Digest, errdefs.ErrFailedPrecondition)
	}
	if base.Config != "" {
		config, err := images.Config(ctx, c.ContentStore(), record.Target, platforms.Default())
		if err != nil {
			return ocispec.Descriptor{}, pulled, fmt.Errorf("look at image %s: %w", base.Name, err)
		}
		if want := strings.TrimPrefix(base.Config, "sha256:"); config.Digest.Encoded() != want {
			return ocispec.Descriptor{}, pulled, fmt.Errorf("the checkpoint builds on another image %s than is here: its config is %s, here it is %s: %w",
				base.Name, want, config.Digest.Encoded(), errdefs.ErrFailedPrecondition)
		}
	}
	return record.Target, pulled, nil
}

// imageByConfig finds a base that is here, under whatever name. It matches
// errdefs.ErrNotFound if there is none, or the checkpoint does not tell the config.
func imageByConfig(ctx context.Context, c *client.Client, base capture.Base) (images.Image, error) {
	want := strings.TrimPrefix(base.Config, "sha256:")
	if want == "" {
		return images.Image{}, fmt.Errorf("its config is not known: %w", errdefs.ErrNotFound)
	}
	is := func(record images.Image) bool {
		config, err := images.Config(ctx, c.ContentStore(), record.Target, platforms.Default())
		return err == nil && config.Digest.Encoded() == want
	}
	if record, err := localImage(ctx, c, base.Name); err == nil && is(record) {
		return record, nil
	}
	return imageWhere(ctx, c, base.Name, func(record images.Image) bool {
		if !is(record) {
			return false
		}
		// One that a pod runs on may be without its layers (discard_unpacked_layers).
		whole, _, _, _, err := images.Check(ctx, c.ContentStore(), record.Target, platforms.Default())
		return err == nil && whole
	})
}

// findImage is localImage for an image that is pulled if it is not here.
func (n *Node) findImage(ctx context.Context, c *client.Client, name string, registry Registry, bar *stages) (images.Image, error) {
	record, err := localImage(ctx, c, name)
	if err == nil || !errdefs.IsNotFound(err) {
		return record, err
	}
	named, perr := reference.ParseDockerRef(name)
	if perr != nil || reference.Domain(named) == "localhost" {
		return images.Image{}, err
	}
	return n.pull(ctx, c, named.String(), registry, bar)
}

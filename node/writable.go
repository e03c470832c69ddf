package node

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/rootfs"
)

// layer is what the container changed in its root filesystem: in the copy, or,
// with an empty path, in the snapshot of a container that has ended.
func (d *dumper) layer(copied string, isUpper bool) capture.Layer {
	if len(d.mounts) == 0 {
		return nil
	}
	return &writableLayer{dumper: d, copied: copied, isUpper: isUpper}
}

// writableLayer is the layer of a container in a snapshotter.
type writableLayer struct {
	*dumper
	copied  string // empty: the container has ended, and its snapshot is it
	isUpper bool
}

// WriteLayer mounts what it needs for as long as that takes.
func (l *writableLayer) WriteLayer(ctx context.Context, w io.Writer) error {
	return withMounts(ctx, l.client, l.info.ID, l.mounts, func(mounts []mount.Mount) error {
		from, upper := l.copied, l.isUpper
		if from == "" {
			from, upper = rootfs.Writable(mounts)
		}
		switch {
		case upper:
			return (&rootfs.OverlayLayer{Upper: from, Lower: rootfs.Lower(mounts)}).WriteLayer(ctx, w)
		case from != "":
			return l.compare(ctx, w, from)
		}
		root, err := l.mountedRoot(ctx)
		if err != nil {
			return err
		}
		if root != nil {
			defer root.Close()
			return l.compare(ctx, w, fmt.Sprintf("/proc/self/fd/%d/.", root.Fd()))
		}
		return mount.WithReadonlyTempMount(ctx, mounts, func(root string) error { return l.compare(ctx, w, root) })
	})
}

// mountedRoot opens the root filesystem of a container that has ended where its task
// has it mounted still; nil if there is no task. A block device could not be mounted
// once more meanwhile, or not with all that was written to it. The task may be deleted
// at any time: what is opened is a mount of its own, in no folder.
func (l *writableLayer) mountedRoot(ctx context.Context) (*os.File, error) {
	_, err := l.container.Task(ctx, nil)
	if errdefs.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look at the task of container %s: %w", l.info.ID, err)
	}
	namespace, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return nil, err
	}
	bundle := filepath.Join("/", namespace, l.info.ID, "rootfs") // below containerd's state folder
	mounted := func() (found []*mountinfo.Info, err error) {
		return mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
			return !strings.HasSuffix(m.Mountpoint, bundle), false
		})
	}
	found, err := mounted()
	if err != nil || len(found) == 0 {
		return nil, err
	}
	if len(found) > 1 {
		return nil, fmt.Errorf("the root filesystem of container %s could be %s or %s, of another containerd: delete its task, and try again with --from: %w",
			l.info.ID, found[0].Mountpoint, found[1].Mountpoint, errdefs.ErrFailedPrecondition)
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, found[0].Mountpoint, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", found[0].Mountpoint, err)
	}
	root := os.NewFile(uintptr(fd), found[0].Mountpoint)
	// Or it is the empty folder below.
	again, err := mounted()
	if err == nil && len(again) == 0 {
		err = fmt.Errorf("the task of container %s was deleted meanwhile: try again with --from: %w", l.info.ID, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		root.Close()
		return nil, err
	}
	return root, nil
}

// compare is for a snapshotter that knows no upper folder: all of the root
// filesystem is compared with all of the image's.
func (l *writableLayer) compare(ctx context.Context, w io.Writer, root string) error {
	snapshots := l.client.SnapshotService(l.info.Snapshotter)
	stat, err := snapshots.Stat(ctx, l.info.SnapshotKey)
	if err != nil {
		return fmt.Errorf("look at snapshot %s: %w", l.info.SnapshotKey, err)
	}
	key := fmt.Sprintf("stasis-view-%s-%s", rand.Text(), l.info.SnapshotKey)
	view, err := snapshots.View(ctx, key, stat.Parent)
	if err != nil {
		return fmt.Errorf("view the image's files: %w", err)
	}
	defer snapshots.Remove(context.WithoutCancel(ctx), key)
	return withMounts(ctx, l.client, "", view, func(mounts []mount.Mount) error {
		return mount.WithReadonlyTempMount(ctx, mounts, func(base string) error {
			return (&rootfs.TreeLayer{Root: root, Base: base}).WriteLayer(ctx, w)
		})
	})
}

// withMounts calls fn with mounts that the system can make. Those of erofs need
// others before, which containerd's mount manager makes (2.2 and later) for as long
// as fn runs. container is whose mounts they are, or empty.
func withMounts(ctx context.Context, c *client.Client, container string, mounts []mount.Mount, fn func([]mount.Mount) error) (err error) {
	if !slices.ContainsFunc(mounts, func(m mount.Mount) bool { return m.Type == "erofs" || managed(m) }) {
		return fn(mounts)
	}
	manager := c.MountManager()
	// A file system that is written to (erofs with default_size) must not be mounted
	// twice: what is mounted for the container's task is used.
	if i := slices.IndexFunc(mounts, func(m mount.Mount) bool { return strings.HasPrefix(m.Type, "mkfs/") }); i >= 0 && container != "" {
		active, err := manager.Info(ctx, container)
		switch {
		case err == nil && len(active.System) > 0:
			return fn(active.System)
		case err == nil:
			return fmt.Errorf("this containerd does not tell what it has mounted for container %s: update it: %w", container, errdefs.ErrFailedPrecondition)
		case !errdefs.IsNotFound(err):
			return fmt.Errorf("look at what is mounted for container %s: %w", container, err)
		}
		mounts = slices.Clone(mounts)
		mounts[i].Options = slices.Clone(mounts[i].Options)
		for j, o := range mounts[i].Options {
			if o == "rw" {
				mounts[i].Options[j] = "ro"
			}
		}
	}
	name := "stasis-" + rand.Text()
	active, err := manager.Activate(ctx, name, mounts)
	if errdefs.IsNotImplemented(err) && !slices.ContainsFunc(mounts, managed) {
		return fn(mounts)
	}
	if err != nil {
		return fmt.Errorf("mount what a snapshot consists of: %w", err)
	}
	defer func() { err = errors.Join(err, manager.Deactivate(context.WithoutCancel(ctx), name)) }()
	system := active.System
	if n := len(active.Active); len(system) == 0 && n > 0 { // it has made them all
		system = []mount.Mount{{Type: "bind", Source: active.Active[n-1].MountPoint, Options: []string{"rbind", "ro"}}}
	}
	return fn(system)
}

// managed tells whether only containerd's mount manager understands a mount, such as
// format/mkdir/overlay.
func managed(m mount.Mount) bool { return strings.Contains(m.Type, "/") }

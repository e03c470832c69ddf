package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/api"
	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/rootfs"
)

// dumper makes a Capture of a running container.
type dumper struct {
	client    *client.Client
	container client.Container
	task      client.Task
	info      containers.Container
	image     client.Image // nil: the container has none, or it is gone
	base      ocispec.Descriptor
	mounts    []mount.Mount // of the root filesystem
	note      string        // what a user should know about the checkpoint
	preDumps  []preDump
}

func newDumper(ctx context.Context, c *client.Client, container client.Container) (*dumper, error) {
	task, err := container.Task(ctx, nil)
	if errdefs.IsNotFound(err) {
		return nil, fmt.Errorf("it does not run, and only what runs can be checkpointed: %w", errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return nil, fmt.Errorf("look at its task: %w", err)
	}
	d, err := newEnded(ctx, c, container)
	if err != nil {
		return nil, err
	}
	d.task = task
	return d, nil
}

// newEnded is newDumper for a container that was dumped.
func newEnded(ctx context.Context, c *client.Client, container client.Container) (*dumper, error) {
	d := &dumper{client: c, container: container}
	var err error
	if d.info, err = container.Info(ctx); err != nil {
		return nil, fmt.Errorf("look at it: %w", err)
	}
	if d.info.Spec == nil {
		return nil, fmt.Errorf("containerd has no spec of it, which a restore needs: %w", errdefs.ErrFailedPrecondition)
	}
	if d.info.Image != "" {
		image, err := c.GetImage(ctx, d.info.Image)
		if err != nil && !errdefs.IsNotFound(err) {
			return nil, fmt.Errorf("look at its image %s: %w", d.info.Image, err)
		}
		if err == nil {
			d.image, d.base = image, image.Target()
		}
	}
	if d.info.SnapshotKey != "" {
		if d.mounts, err = c.SnapshotService(d.info.Snapshotter).Mounts(ctx, d.info.SnapshotKey); err != nil {
			return nil, fmt.Errorf("look at its root filesystem (snapshot %s): %w", d.info.SnapshotKey, err)
		}
	}
	return d, nil
}

// checkBase refuses a form that builds on an image that is not there.
func (d *dumper) checkBase(format string) error {
	if d.image != nil || format == "archive" || format == "podman" {
		return nil
	}
	if d.info.Image == "" {
		return fmt.Errorf("it was not made from an image, which --format %s builds on; use --output FILE: %w", format, errdefs.ErrFailedPrecondition)
	}
	return fmt.Errorf("its image %s is gone, which --format %s builds on; pull it, or use --output FILE: %w", d.info.Image, format, errdefs.ErrFailedPrecondition)
}

// checkTarget tells early what would make storing it under a name fail late.
func (d *dumper) checkTarget(ctx context.Context, ref, format string) error {
	if err := d.checkBase(format); err != nil {
		return err
	}
	return checkRef(ctx, d.client, ref)
}

// dump freezes the container, writes it to dir, and lets it run again.
func (d *dumper) dump(ctx context.Context, dir string, f *checkpointFlags, bar *progress) (*capture.Capture, error) {
	info, err := d.describe(ctx)
	if err != nil {
		return nil, err
	}
	c := &capture.Capture{Info: info, Images: filepath.Join(dir, "checkpoint"), Spec: d.info.Spec.GetValue()}
	r := &api.CheckpointRequest{Id: d.container.ID(), ImagePath: c.Images, Exit: f.exit, PreDumps: f.preDumps, Options: &f.criu}
	if len(d.mounts) > 0 && !f.exit {
		r.RootfsPath = filepath.Join(dir, "rootfs")
	}
	conn, err := shimOf(int(d.task.Pid()))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	result, err := conn.checkpoint(ctx, r, bar)
	if errdefs.IsNotImplemented(err) {
		d.note = fmt.Sprintf("its runtime is %s and not Stasis, so it stood still for longer than it would have to", d.info.Runtime.Name)
		result, err = d.checkpointByTask(ctx, r)
	}
	if err != nil {
		return nil, err
	}
	if f.preDumps != 0 && len(result.PreDumps) == 0 {
		d.note = "no pre-dump was made: it is paused, or its shim is of an older version"
	}
	for _, p := range result.PreDumps {
		d.preDumps = append(d.preDumps, preDump{time.Duration(p.DurationNs), p.PagesWritten})
	}
	c.Info.CRIU = result.CriuVersion
	c.Info.OCIRuntime = capture.Program{Name: result.RuntimeName, Version: result.RuntimeVersion}
	c.Info.Stats = &capture.Stats{
		Frozen:     time.Duration(result.FrozenNs),
		ImageBytes: int64(result.ImageBytes),
		LayerBytes: int64(result.RootfsBytes),
	}
	c.Layer = d.layer(r.RootfsPath, result.RootfsIsUpper)
	return c, nil
}

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
	key := fmt.Sprintf("stasis-view-%d-%s", os.Getpid(), l.info.SnapshotKey)
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

// checkpointByTask does without Stasis's own service what r asks for.
func (d *dumper) checkpointByTask(ctx context.Context, r *api.CheckpointRequest) (_ *api.CheckpointResult, err error) {
	if r.PreDumps != 0 {
		return nil, fmt.Errorf("its runtime %s makes no pre-dumps; one of Stasis does: %w", d.info.Runtime.Name, errdefs.ErrNotImplemented)
	}
	if o := r.Options; o.TcpClose || o.LinkRemap || o.GhostLimit != 0 {
		return nil, fmt.Errorf("its runtime %s takes no --tcp-close, --link-remap or --ghost-limit; a CRIU configuration file (annotation org.criu.config) does: %w",
			d.info.Runtime.Name, errdefs.ErrNotImplemented)
	}
	status, err := d.task.Status(ctx)
	if err != nil {
		return nil, fmt.Errorf("look at its state: %w", err)
	}
	started := time.Now()
	if r.RootfsPath != "" && status.Status == client.Running {
		if err := d.task.Pause(ctx); err != nil {
			return nil, fmt.Errorf("pause it: %w", err)
		}
		defer func() {
			// Also if we are interrupted: it must not stay frozen.
			if rerr := d.task.Resume(context.WithoutCancel(ctx)); rerr != nil {
				err = errors.Join(err, fmt.Errorf("resume it (it is paused still: `ctr tasks resume %s`): %w", d.container.ID(), rerr))
			}
		}()
	}
	// Another shim does not give a dump up: who went away would remove the folder
	// that it writes to, and with Exit the container would be lost.
	_, err = d.task.Checkpoint(context.WithoutCancel(ctx), func(info *client.CheckpointTaskInfo) error {
		info.Options = &options.CheckpointOptions{
			Exit: r.Exit, OpenTcp: r.Options.OpenTcp, ExternalUnixSockets: r.Options.ExternalUnixSockets,
			Terminal: r.Options.Terminal, FileLocks: r.Options.FileLocks, ImagePath: r.ImagePath,
		}
		return nil
	}, client.WithCheckpointImagePath(r.ImagePath))
	if err != nil {
		return nil, err
	}
	result := &api.CheckpointResult{}
	if r.RootfsPath != "" {
		err := withMounts(ctx, d.client, d.info.ID, d.mounts, func(mounts []mount.Mount) error {
			from, upper := rootfs.Writable(mounts)
			if from == "" {
				return fmt.Errorf("snapshotter %s keeps no folder that could be copied: %w", d.info.Snapshotter, errdefs.ErrNotImplemented)
			}
			n, err := rootfs.Copy(ctx, r.RootfsPath, from, func(int64) {})
			result.RootfsBytes, result.RootfsIsUpper = uint64(n), upper
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("copy its writable layer: %w", err)
		}
	}
	result.FrozenNs = uint64(time.Since(started))
	result.CriuVersion = checkpoint.LogVersion(filepath.Join(r.ImagePath, "dump.log"))
	size, err := sizeOf(r.ImagePath)
	result.ImageBytes = uint64(size)
	return result, err
}

// sizeOf is what the files in a folder and below take, in bytes.
func sizeOf(dir string) (size int64, err error) {
	err = filepath.WalkDir(dir, func(_ string, e os.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			if info, err := e.Info(); err == nil {
				size += info.Size()
			}
		}
		return err
	})
	return size, err
}

// describe says what the checkpoint is of.
func (d *dumper) describe(ctx context.Context) (capture.Info, error) {
	labels := d.info.Labels
	i := capture.Info{
		Version:       capture.InfoVersion,
		ContainerID:   d.info.ID,
		ContainerName: d.info.ID,
		Runtime:       d.info.Runtime.Name,
		Base:          capture.Base{Name: d.info.Image, Snapshotter: d.info.Snapshotter},
		Engine:        capture.Program{Name: "stasis", Version: version},
		Host:          thisHost(),
		Created:       d.info.CreatedAt,
		Checkpointed:  time.Now(),
		Labels:        labels,
	}
	if name := labels["io.kubernetes.container.name"]; name != "" {
		i.ContainerName = name
		i.Pod = &capture.Pod{
			Name:      labels["io.kubernetes.pod.name"],
			Namespace: labels["io.kubernetes.pod.namespace"],
			UID:       labels["io.kubernetes.pod.uid"],
			ID:        d.info.SandboxID,
		}
	}
	i.Namespace, _ = namespaceOf(ctx)
	if d.image != nil {
		i.Base.Digest = d.base.Digest.String()
		config, err := d.image.Config(ctx)
		if err != nil {
			return i, fmt.Errorf("look at its image %s: %w", d.info.Image, err)
		}
		i.Base.Config = config.Digest.String()
	}
	return i, nil
}

// thisHost describes where we run.
func thisHost() capture.Host {
	h := capture.Host{Architecture: runtime.GOARCH, CgroupV2: cgroupV2(), Distribution: distribution()}
	var name unix.Utsname
	if unix.Uname(&name) == nil {
		h.Kernel = unix.ByteSliceToString(name.Release[:])
	}
	return h
}

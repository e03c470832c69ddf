package node

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/stasis-run/stasis/checkpoint/api"
	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/criu"
	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/checkpoint/oci"
	"github.com/stasis-run/stasis/checkpoint/rootfs"
	"github.com/stasis-run/stasis/checkpoint/sign"
)

// dumper makes a Capture of a running container.
type dumper struct {
	node      *Node
	client    *client.Client
	container client.Container
	task      client.Task
	info      containers.Container
	image     client.Image // that it was made from; nil: there is none, or it is not here
	base      ocispec.Descriptor
	baseName  string        // of image
	otherBase bool          // image is not here, and its name is another's
	remapped  bool          // its files have a user namespace's owners, unlike the image's
	mounts    []mount.Mount // of the root filesystem
	workDir   string        // of this operation; empty: dump was not called
	note      string        // what a user should know about the checkpoint
	preDumps  []PreDump
	early     *earlyLayer // of what is to be stored; nil if there is none
	key       *sign.Key   // signs what the shim leaves to us; nil: there is none
}

func (n *Node) newDumper(ctx context.Context, c *client.Client, container client.Container) (*dumper, error) {
	task, err := container.Task(ctx, nil)
	if errdefs.IsNotFound(err) {
		return nil, fmt.Errorf("it does not run, and only what runs can be checkpointed: %w", errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return nil, fmt.Errorf("look at its task: %w", err)
	}
	d, err := n.newEnded(ctx, c, container)
	if err != nil {
		return nil, err
	}
	d.task = task
	return d, nil
}

// newEnded is newDumper for a container that was dumped.
func (n *Node) newEnded(ctx context.Context, c *client.Client, container client.Container) (*dumper, error) {
	d := &dumper{node: n, client: c, container: container}
	var err error
	if d.info, err = container.Info(ctx); err != nil {
		return nil, fmt.Errorf("look at it: %w", err)
	}
	if d.info.Spec == nil {
		return nil, fmt.Errorf("containerd has no spec of it, which a restore needs: %w", errdefs.ErrFailedPrecondition)
	}
	if err := d.findBase(ctx); err != nil {
		return nil, err
	}
	if d.info.SnapshotKey != "" {
		if d.mounts, err = c.SnapshotService(d.info.Snapshotter).Mounts(ctx, d.info.SnapshotKey); err != nil {
			return nil, fmt.Errorf("look at its root filesystem (snapshot %s): %w", d.info.SnapshotKey, err)
		}
	}
	return d, nil
}

// checkBase refuses a format that builds on an image that is not there, and any where a
// restore would build on another.
func (d *dumper) checkBase(format string) error {
	if d.otherBase {
		return fmt.Errorf("its image %s is another now than the one that it was made from, and that is not here under any name; pull that one by its digest: %w",
			d.info.Image, errdefs.ErrFailedPrecondition)
	}
	if d.image != nil || format == FormatArchive || format == FormatPodman {
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

// dump freezes the container, writes it to dir, and lets it run again. o is how it
// will be stored. With d.early, dir is whole when that has finished.
func (d *dumper) dump(ctx context.Context, dir string, f *CheckpointRequest, o oci.Options, bar *stages) (*capture.Capture, error) {
	info, err := d.describe(ctx)
	if err != nil {
		return nil, err
	}
	d.workDir = dir
	c := &capture.Capture{Info: info, Images: filepath.Join(dir, layout.Images), Spec: d.info.Spec.GetValue()}
	r := &api.CheckpointRequest{Id: d.container.ID(), ImagePath: c.Images, Exit: f.Exit, PreDumps: int32(f.PreDumps), Options: f.Options.forShim(),
		BaseConfig: info.Base.Config}
	if len(d.mounts) > 0 && !f.Exit {
		r.RootfsPath = filepath.Join(dir, "rootfs")
	}
	conn, err := shimOf(int(d.task.Pid()))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	hasFile := func(*api.MemoryFile) {}
	// What pre-dumps wrote is put together only in the end.
	if f.Format == FormatRunnable && f.PreDumps == 0 && o.Folder.Usable() {
		d.early = d.startEarly(ctx, c.Images, info.Checkpointed, o)
		hasFile = d.early.hasFile
		r.TellMemoryFile = true
		r.LeaveSum = !f.Exit
	}
	if r.LeaveSum {
		if d.key, err = d.node.keys.Key(); err != nil {
			d.unsigned(err.Error())
		}
	}
	result, err := conn.checkpoint(ctx, r, bar, hasFile)
	if d.early != nil {
		d.early.hasEnded()
	}
	if errdefs.IsNotImplemented(err) {
		d.addNote(fmt.Sprintf("its runtime is %s and not Stasis, so it stood still for longer than it would have to, and the checkpoint is not signed (`stasis sign`)", d.info.Runtime.Name))
		result, err = d.checkpointByTask(ctx, r)
	}
	if err != nil {
		return nil, err
	}
	if f.PreDumps != 0 && len(result.PreDumps) == 0 {
		d.addNote("no pre-dump was made: it is paused, or its shim is of an older version")
	}
	if result.Unsigned != "" {
		d.unsigned(result.Unsigned)
	}
	for _, p := range result.PreDumps {
		d.preDumps = append(d.preDumps, PreDump{time.Duration(p.DurationNs), p.PagesWritten})
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

// addNote adds to what a user should know about the checkpoint.
func (d *dumper) addNote(text string) {
	if d.note != "" {
		d.note += "; "
	}
	d.note += text
}

// unsigned notes why the checkpoint is not signed, which is no reason to fail: it can be
// signed later.
func (d *dumper) unsigned(why string) {
	d.addNote("the checkpoint is not signed, so no pod restores it before `stasis sign`: " + why)
}

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
	// Here, and not in containerd's client, which does not tell if it cannot resume it.
	if status.Status == client.Running {
		forget, err := d.notePaused(ctx)
		if err != nil {
			return nil, err
		}
		defer forget()
		if err := d.task.Pause(ctx); err != nil {
			return nil, fmt.Errorf("pause it: %w", err)
		}
		defer func() {
			// Also if we are interrupted: it must not stay frozen.
			rerr := d.task.Resume(context.WithoutCancel(ctx))
			if rerr != nil && !(r.Exit && err == nil) {
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
	result.CriuVersion = criu.LogVersion(filepath.Join(r.ImagePath, layout.DumpLog))
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

// labelContainerName is the label that CRI gives a container in a pod.
const labelContainerName = "io.kubernetes.container.name"

// podOf is the pod that a container is in, or nil.
func podOf(info containers.Container) *capture.Pod {
	if info.Labels[labelContainerName] == "" {
		return nil
	}
	return &capture.Pod{
		Name:      info.Labels["io.kubernetes.pod.name"],
		Namespace: info.Labels["io.kubernetes.pod.namespace"],
		UID:       info.Labels["io.kubernetes.pod.uid"],
		ID:        info.SandboxID,
	}
}

// describe says what the checkpoint is of.
func (d *dumper) describe(ctx context.Context) (capture.Info, error) {
	labels := d.info.Labels
	i := capture.Info{
		Version:       capture.InfoVersion,
		ContainerID:   d.info.ID,
		ContainerName: d.info.ID,
		Runtime:       d.info.Runtime.Name,
		Base:          capture.Base{Name: cmp.Or(d.baseName, d.info.Image), Snapshotter: d.info.Snapshotter},
		Engine:        capture.Program{Name: "stasis", Version: d.node.o.Version},
		Host:          thisHost(),
		Created:       d.info.CreatedAt,
		Checkpointed:  time.Now(),
		Labels:        labels,
	}
	if name := labels[labelContainerName]; name != "" {
		i.ContainerName = name
	}
	i.Pod = podOf(d.info)
	i.Namespace = namespaceOf(ctx)
	if d.image != nil {
		i.Base.Digest = d.base.Digest.String()
		config, err := d.image.Config(ctx)
		if err != nil {
			return i, fmt.Errorf("look at its image %s: %w", d.baseName, err)
		}
		i.Base.Config = config.Digest.String()
	}
	return i, nil
}

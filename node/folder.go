package node

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/api"
	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/oci"
)

// FolderRequest says what container to save, and where: its processes in a folder, its files
// as an image, or both, of the same moment.
type FolderRequest struct {
	Container string // its ID in containerd
	// Dir is the folder for CRIU's images, which is made, and must not be there.
	Dir string
	// Rootfs is the name of an image of the container's root filesystem. It replaces only
	// another such image.
	Rootfs string
	// Exit ends the container with the checkpoint, which has a Dir then.
	Exit    bool
	Options DumpOptions

	Progress Progress
}

// FolderResult is what CheckpointFolder has made.
type FolderResult struct {
	Rootfs     *Image        // nil: none was asked for
	Frozen     time.Duration // for how long the container stood still
	ImageBytes int64         // of CRIU's images
	LayerBytes int64         // of the writable layer
	Note       string        // what a user should know about it
}

// CheckpointFolder saves the processes of a running container to a folder, as the shim
// makes it: CRIU's images, and what Stasis says of them; and its root filesystem as an
// image. The container runs on, unless Exit is set. After an error there is neither; but if
// the container has ended, the error says where its processes are. It is for containers
// under Stasis: while another shim dumps, containerd pauses the container, and nobody would
// resume it if this process were killed.
func (n *Node) CheckpointFolder(ctx context.Context, r FolderRequest) (_ *FolderResult, err error) {
	switch {
	case r.Dir == "" && (r.Rootfs == "" || r.Exit):
		return nil, requestError("no folder for the checkpoint")
	case r.Options.LinkRemap && !r.Exit, r.Options.OpenTCP && r.Options.TCPClose:
		return nil, requestError("options of the dump that exclude each other")
	}
	if r.Rootfs != "" {
		if r.Rootfs, err = fullName(r.Rootfs); err != nil {
			return nil, err
		}
	}
	free, err := n.reserveFolder(r.Dir)
	if err != nil {
		return nil, err
	}
	defer free()
	c, err := n.Client(ctx)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("checkpoint %s: %w", r.Container, err)
		}
	}()
	container, err := c.LoadContainer(ctx, r.Container)
	if err != nil {
		return nil, err
	}
	work, err := n.newWork()
	if err != nil {
		return nil, err
	}
	defer func() {
		if rerr := work.remove(); rerr != nil {
			n.log.Warn(rerr.Error())
		}
	}()
	ctx, done, err := n.lease(ctx, c.LeasesService())
	if err != nil {
		return nil, err
	}
	defer done()
	d, err := n.newDumper(ctx, c, container)
	if err != nil {
		return nil, err
	}
	if r.Rootfs != "" {
		if err := d.checkRootfs(ctx, r.Rootfs); err != nil {
			return nil, err
		}
	}
	bar := r.Progress.of(r.Container)
	defer bar.end()
	defer func() {
		if err != nil {
			err = n.afterFailure(&r, err)
		}
	}()
	got, err := d.dumpFolder(ctx, &r, filepath.Join(work.dir, "rootfs"), bar)
	if err != nil {
		return nil, err
	}
	stats := got.Info.Stats
	result := &FolderResult{Frozen: stats.Frozen, ImageBytes: stats.ImageBytes, LayerBytes: stats.LayerBytes, Note: d.note}
	if r.Rootfs == "" {
		return result, nil
	}
	// A container that has ended has its files nowhere else soon.
	if r.Exit {
		ctx = context.WithoutCancel(ctx)
	}
	if result.Rootfs, err = d.storeRootfs(ctx, r.Rootfs, got, bar); err != nil {
		return nil, err
	}
	return result, nil
}

// reserveFolder makes sure that a folder is not there, and that nobody else makes a
// checkpoint in it until free is called. No folder is none.
func (n *Node) reserveFolder(dir string) (free func(), err error) {
	if dir == "" {
		return func() {}, nil
	}
	if _, taken := n.folders.LoadOrStore(dir, true); taken {
		return nil, fmt.Errorf("another checkpoint is being made in %s: %w", dir, errdefs.ErrAlreadyExists)
	}
	free = func() { n.folders.Delete(dir) }
	if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) {
		free()
		return nil, fmt.Errorf("%s is there: %w", dir, cmp.Or[error](err, errdefs.ErrAlreadyExists))
	}
	return free, nil
}

// afterFailure removes what there is of a checkpoint, or says where it is, if that is all
// there is of a container.
func (n *Node) afterFailure(r *FolderRequest, err error) error {
	if r.Dir == "" {
		return err
	}
	images := r.Dir
	if !isWhole(images) {
		images = checkpoint.Uncommitted(images)
	}
	if r.Exit && images != "" {
		err = fmt.Errorf("%w; the container has ended, its processes are in %s, and its files are in its snapshot as long as it is not removed", err, images)
		n.log.Error("checkpoint " + r.Container + ": " + err.Error())
		return err
	}
	if r.Exit {
		return err // the shim has removed it
	}
	return errors.Join(err, os.RemoveAll(r.Dir))
}

// checkRootfs tells early what would make an image of the root filesystem fail, or wrong.
func (d *dumper) checkRootfs(ctx context.Context, ref string) error {
	if strings.Contains(ref, "@") {
		return requestError("%s: a name with a digest is of another image", ref)
	}
	if err := errors.Join(d.checkBase(FormatRunnable), oci.CheckRootfsName(ctx, d.client.ImageService(), ref)); err != nil {
		return err
	}
	if d.info.SnapshotKey == "" {
		return fmt.Errorf("it has no snapshot, so what it wrote is not known: %w", errdefs.ErrFailedPrecondition)
	}
	if d.remapped {
		return fmt.Errorf("its files have the owners of its user namespace, unlike those of its image: %w", errdefs.ErrFailedPrecondition)
	}
	return nil
}

// dumpFolder has the shim do what a request asks for. copied is where a copy of the
// writable layer may go.
func (d *dumper) dumpFolder(ctx context.Context, r *FolderRequest, copied string, bar *stages) (*capture.Capture, error) {
	info, err := d.describe(ctx)
	if err != nil {
		return nil, err
	}
	request := &api.CheckpointRequest{Id: r.Container}
	if r.Dir != "" {
		request.ImagePath, request.Exit, request.Options, request.BaseConfig = r.Dir, r.Exit, r.Options.forShim(), info.Base.Config
	}
	if r.Rootfs != "" && len(d.mounts) > 0 && !r.Exit {
		request.RootfsPath = copied
	}
	conn, err := shimOf(int(d.task.Pid()))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	result, err := conn.checkpoint(ctx, request, bar, nil)
	if errdefs.IsNotImplemented(err) {
		err = fmt.Errorf("its runtime is %s, and only under Stasis's it is sure to run on, whatever happens to this process; `stasis checkpoint` saves it as an image: %w",
			d.info.Runtime.Name, errdefs.ErrNotImplemented)
	}
	if err != nil {
		return nil, err
	}
	if result.Unsigned != "" {
		d.unsigned(result.Unsigned)
	}
	info.Stats = &capture.Stats{Frozen: time.Duration(result.FrozenNs), ImageBytes: int64(result.ImageBytes), LayerBytes: int64(result.RootfsBytes)}
	return &capture.Capture{Info: info, Layer: d.layer(request.RootfsPath, result.RootfsIsUpper)}, nil
}

// storeRootfs makes an image of a container's root filesystem, and names it.
func (d *dumper) storeRootfs(ctx context.Context, ref string, got *capture.Capture, bar *stages) (*Image, error) {
	o, err := storeOptions(ctx, d.client, "", bar)
	if err != nil {
		return nil, err
	}
	bar.begin("store")
	desc, err := oci.WriteRootfs(ctx, d.client.ContentStore(), d.base, got, o)
	if err != nil {
		return nil, err
	}
	if err := oci.SaveRootfs(ctx, d.client.ImageService(), ref, desc); err != nil {
		return nil, err
	}
	return &Image{ref, desc.Digest.String()}, nil
}

// Named is a container by the names that Kubernetes has for it and its pod; without Pod,
// Container is its ID.
type Named struct{ Namespace, Pod, Container string }

// Find returns the ID of the running container of that name in containerd's namespace.
func (n *Node) Find(ctx context.Context, name Named) (id string, err error) {
	all, err := n.Running(ctx)
	if err != nil {
		return "", err
	}
	for _, c := range all {
		switch {
		case name.Pod == "" && c.ID == name.Container,
			name.Pod != "" && c.Pod != nil && c.Pod.Name == name.Pod && c.Pod.Namespace == name.Namespace && c.Name == name.Container:
			if id != "" {
				return "", fmt.Errorf("there are two containers %s/%s/%s: %w", name.Namespace, name.Pod, name.Container, errdefs.ErrFailedPrecondition)
			}
			id = c.ID
		}
	}
	if id == "" && name.Pod == "" {
		return "", fmt.Errorf("no container with the ID %s runs (of one in a pod, say which): %w", name.Container, errdefs.ErrNotFound)
	}
	if id == "" {
		return "", fmt.Errorf("no container %s/%s/%s runs: %w", name.Namespace, name.Pod, name.Container, errdefs.ErrNotFound)
	}
	return id, nil
}

// Running lists the containers that can be checkpointed: those that run or are paused, but
// for the sandboxes of pods.
func (n *Node) Running(ctx context.Context) ([]Container, error) {
	all, err := n.Containers(ctx)
	if err != nil {
		return nil, err
	}
	running := []Container{}
	for _, c := range all {
		up := c.Status == string(client.Running) || c.Status == string(client.Paused)
		if up && c.Labels["io.cri-containerd.kind"] != "sandbox" {
			running = append(running, c)
		}
	}
	return running, nil
}

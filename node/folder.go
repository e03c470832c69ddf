package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"

	"github.com/stasis-run/stasis/checkpoint/api"
	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/oci"
)

// FolderRequest says what container to save, and where: its processes in a folder, its files
// as an image, or both, of the same moment.
type FolderRequest struct {
	Container string // its ID in containerd
	// Dir is the folder for CRIU's images, which is made. It may be there if it is empty.
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
// the container has ended, the error says where its processes are.
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
	newDir, err := isNew(r.Dir)
	if err != nil {
		return nil, err
	}
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
	defer func() { err = errors.Join(err, work.remove()) }()
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
		if err := errors.Join(d.checkBase(FormatRunnable), oci.CheckRootfsName(ctx, c.ImageService(), r.Rootfs)); err != nil {
			return nil, err
		}
	}
	bar := r.Progress.of(r.Container)
	defer bar.end()
	got, err := d.dumpFolder(ctx, &r, filepath.Join(work.dir, "rootfs"), bar)
	if err != nil {
		return nil, err
	}
	stats := got.Info.Stats
	result := &FolderResult{Frozen: stats.Frozen, ImageBytes: stats.ImageBytes, LayerBytes: stats.LayerBytes, Note: d.note}
	if r.Rootfs == "" {
		return result, nil
	}
	if result.Rootfs, err = d.storeRootfs(ctx, r.Rootfs, got, bar); err == nil {
		return result, nil
	}
	switch {
	case r.Exit:
		err = fmt.Errorf("%w; the container has ended, its processes are in %s, and its files are in its snapshot still", err, r.Dir)
	case newDir:
		err = errors.Join(err, os.RemoveAll(r.Dir))
	}
	return nil, err
}

// isNew tells whether a folder is not there; one that is not empty is refused. No folder is
// none.
func isNew(dir string) (bool, error) {
	if dir == "" {
		return false, nil
	}
	entries, err := os.ReadDir(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return true, nil
	case err != nil:
		return false, fmt.Errorf("look at the folder of the checkpoint: %w", err)
	case len(entries) > 0:
		return false, fmt.Errorf("%s is not empty: %w", dir, errdefs.ErrAlreadyExists)
	}
	return false, nil
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
	if errdefs.IsNotImplemented(err) && r.Dir != "" {
		d.addNote(fmt.Sprintf("its runtime is %s and not Stasis, so the checkpoint is not signed", d.info.Runtime.Name))
		if result, err = d.checkpointByTask(ctx, request); err != nil && !r.Exit {
			// Another shim leaves what it has of it.
			err = errors.Join(err, removeContents(r.Dir))
		}
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

// removeContents empties a folder, which was empty or not there.
func removeContents(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
	}
	return err
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

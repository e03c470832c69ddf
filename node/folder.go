package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"

	"github.com/stasis-run/stasis/checkpoint/api"
)

// FolderRequest says what container to checkpoint into a folder.
type FolderRequest struct {
	Container string // its ID in containerd
	// Dir is the folder for CRIU's images, which is made. It may be there if it is empty.
	Dir     string
	Options DumpOptions

	Progress Progress
}

// CheckpointFolder saves the processes of a running container to a folder, as the shim
// makes it: CRIU's images, and what Stasis says of them. The container runs on. After an
// error, the folder is as it was.
func (n *Node) CheckpointFolder(ctx context.Context, r FolderRequest) (_ *CheckpointResult, err error) {
	started := time.Now()
	if r.Options.LinkRemap || r.Options.OpenTCP && r.Options.TCPClose {
		return nil, requestError("options of the dump that exclude each other, or need the container's end")
	}
	wasThere := true
	entries, err := os.ReadDir(r.Dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		wasThere = false
	case err != nil:
		return nil, fmt.Errorf("look at the folder of the checkpoint: %w", err)
	case len(entries) > 0:
		return nil, fmt.Errorf("%s is not empty: %w", r.Dir, errdefs.ErrAlreadyExists)
	}
	c, err := n.Client(ctx)
	if err != nil {
		return nil, err
	}
	container, err := c.LoadContainer(ctx, r.Container)
	if err != nil {
		return nil, fmt.Errorf("checkpoint %s: %w", r.Container, err)
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("checkpoint %s: %w", r.Container, err)
		}
	}()
	d, err := n.newDumper(ctx, c, container)
	if err != nil {
		return nil, err
	}
	info, err := d.describe(ctx)
	if err != nil {
		return nil, err
	}
	bar := r.Progress.of(r.Container)
	defer bar.end()
	request := &api.CheckpointRequest{Id: r.Container, ImagePath: r.Dir, Options: r.Options.forShim(), BaseConfig: info.Base.Config}
	conn, err := shimOf(int(d.task.Pid()))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	result, err := conn.checkpoint(ctx, request, bar, nil)
	if errdefs.IsNotImplemented(err) {
		d.addNote(fmt.Sprintf("its runtime is %s and not Stasis, so the checkpoint is not signed", d.info.Runtime.Name))
		if result, err = d.checkpointByTask(ctx, request); err != nil && !wasThere {
			err = errors.Join(err, os.RemoveAll(r.Dir))
		}
	}
	if err != nil {
		return nil, err
	}
	if result.Unsigned != "" {
		d.unsigned(result.Unsigned)
	}
	return &CheckpointResult{Container: r.Container, File: r.Dir, Frozen: time.Duration(result.FrozenNs), Took: time.Since(started),
		ImageBytes: int64(result.ImageBytes), Note: d.note}, nil
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

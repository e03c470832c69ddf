package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/identifiers"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/capture"
)

// A bundle container is one that Start has made from an OCI bundle: a folder with a
// config.json and a root filesystem. It has no image and no snapshot: what it writes
// stays in the bundle. Its checkpoints have names, see Save.

// labelBundle is a container's label with the folder of its bundle.
const labelBundle = "stasis.run/bundle"

// BundleConfig is the file that makes a folder a bundle (runtime-spec, bundle.md).
const BundleConfig = "config.json"

// maxBundleConfig bounds a config.json, in bytes. The largest that engines write, with a
// seccomp profile, have less than 100 KiB.
const maxBundleConfig = 4 << 20

// StartRequest says what container to start from an OCI bundle.
type StartRequest struct {
	Container string // its ID, which no container has that runs
	Bundle    string // a folder; whoever can write to it decides what the container may do
	// Checkpoint is the name of one of the container's saved checkpoints, which it is
	// restored from; empty: none. The root filesystem is the bundle's as it is now.
	Checkpoint string
	// Stdout and Stderr are files, which are appended to and made if they are not there,
	// or FIFOs that somebody reads; empty: nowhere.
	Stdout, Stderr string
}

// Start starts a container from an OCI bundle, and returns the pid of its main process.
// The error matches errdefs.ErrNotFound if there is no such bundle or checkpoint, and
// errdefs.ErrAlreadyExists if there is such a container. If a start fails, nothing is
// left of the container.
func (n *Node) Start(ctx context.Context, r StartRequest) (pid uint32, err error) {
	if err := identifiers.Validate(r.Container); err != nil {
		return 0, requestError("container: %v", err)
	}
	spec, root, err := readBundle(r.Bundle)
	if err != nil {
		return 0, fmt.Errorf("start %s: %w", r.Container, err)
	}
	rootfs := client.WithRootFS([]mount.Mount{{Type: "bind", Source: root, Options: []string{"rbind", "rw"}}})
	taskOpts := []client.NewTaskOpts{rootfs}
	if r.Checkpoint != "" {
		saved, err := n.saved(ctx, r.Container, r.Checkpoint)
		if err != nil {
			return 0, fmt.Errorf("start %s: %w", r.Container, err)
		}
		taskOpts = append(taskOpts, client.WithRestoreImagePath(saved.images()))
	}
	c, err := n.Client(ctx)
	if err != nil {
		return 0, err
	}
	release, err := n.reserve(ctx, r.Container, true)
	if err != nil {
		return 0, err
	}
	var container client.Container
	defer func() {
		release()
		if err == nil {
			// It may have ended already, and nobody could remove it then.
			if rerr := n.removeEnded(ctx, c, container); rerr != nil && !errdefs.IsNotFound(rerr) {
				n.log.Warn(rerr.Error())
			}
		}
	}()
	if err := makeRoom(ctx, c, r.Container); err != nil {
		return 0, fmt.Errorf("start %s: %w", r.Container, err)
	}
	streams, err := openStreams(spec.Process.Terminal, r.Stdout, r.Stderr)
	if err != nil {
		return 0, fmt.Errorf("start %s: %w", r.Container, err)
	}
	container, err = c.NewContainer(ctx, r.Container, client.WithSpec(spec),
		client.WithRuntime(RuntimeName, &options.Options{SystemdCgroup: bySystemd(spec)}),
		client.WithContainerLabels(map[string]string{labelBundle: r.Bundle}))
	if err != nil {
		return 0, fmt.Errorf("start %s: make the container: %w", r.Container, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("start %s: %w", r.Container, err), removeContainer(ctx, container))
		}
	}()
	task, err := container.NewTask(ctx, func(string) (cio.IO, error) { return streams, nil }, taskOpts...)
	if err != nil {
		return 0, err
	}
	if err := startTask(ctx, task); err != nil {
		_, derr := task.Delete(context.WithoutCancel(ctx), client.WithProcessKill)
		return 0, errors.Join(err, derr)
	}
	return task.Pid(), nil
}

// readBundle reads a bundle's config.json. root is the folder of its root filesystem.
// In the spec that is "rootfs": where the shim mounts it.
func readBundle(dir string) (_ *specs.Spec, root string, err error) {
	data, err := capture.ReadSmall(filepath.Join(dir, BundleConfig), maxBundleConfig)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, "", fmt.Errorf("bundle %s has no config.json: %w", dir, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, "", fmt.Errorf("bundle %s: %w", dir, err)
	}
	var spec specs.Spec
	if err := json.Unmarshal(data, &spec); err != nil {
		return nil, "", requestError("bundle %s: config.json: %v", dir, err)
	}
	switch {
	case spec.Process == nil || len(spec.Process.Args) == 0:
		return nil, "", requestError("bundle %s: config.json has no process.args", dir)
	case spec.Root == nil || spec.Root.Path == "":
		return nil, "", requestError("bundle %s: config.json has no root.path", dir)
	case spec.Linux == nil:
		return nil, "", requestError("bundle %s: config.json has no linux: it is of another platform", dir)
	}
	root = spec.Root.Path
	if !filepath.IsAbs(root) {
		root = filepath.Join(dir, root)
	}
	if info, err := os.Stat(root); err != nil || !info.IsDir() {
		return nil, "", fmt.Errorf("bundle %s: its root filesystem %s is no folder: %w", dir, root, errdefs.ErrNotFound)
	}
	spec.Root.Path = "rootfs"
	return &spec, root, nil
}

// reservation is held by what starts a container of some ID, or removes one.
type reservation struct {
	starts bool
	done   chan struct{} // closed when it is over
}

// reserve waits until nobody removes a container of that ID, and keeps others from it
// until release is called. It does not wait for one that is being started: that is an
// error.
func (n *Node) reserve(ctx context.Context, id string, starts bool) (release func(), err error) {
	key := namespaceOf(ctx) + "/" + id
	for {
		n.bundles.Lock()
		other, taken := n.reserved[key]
		if !taken {
			if n.reserved == nil {
				n.reserved = map[string]*reservation{}
			}
			mine := &reservation{starts, make(chan struct{})}
			n.reserved[key] = mine
			n.bundles.Unlock()
			return func() {
				n.bundles.Lock()
				defer n.bundles.Unlock()
				delete(n.reserved, key)
				close(mine.done)
			}, nil
		}
		n.bundles.Unlock()
		if other.starts {
			return nil, fmt.Errorf("container %s is being started: %w", id, errdefs.ErrAlreadyExists)
		}
		select {
		case <-other.done:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// isBundle tells whether Start has made a container. A label alone could come from an
// image; a container that Start has made has none.
func isBundle(info containers.Container) bool {
	return info.Labels[labelBundle] != "" && info.Image == "" && info.Runtime.Name == RuntimeName
}

// makeRoom removes a bundle container that has ended, so that its name is free. Any other
// that has the name is an error. The caller has reserved it.
func makeRoom(ctx context.Context, c *client.Client, id string) error {
	container, err := c.LoadContainer(ctx, id)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look at container %s: %w", id, err)
	}
	info, err := container.Info(ctx, client.WithoutRefreshedMetadata)
	if err != nil {
		return fmt.Errorf("look at container %s: %w", id, err)
	}
	ended := isBundle(info)
	if ended {
		if ended, err = hasEnded(ctx, container); err != nil {
			return err
		}
	}
	if !ended {
		return fmt.Errorf("there is a container %s: %w", id, errdefs.ErrAlreadyExists)
	}
	return deleteEnded(ctx, c, container)
}

// removeEnded removes a bundle container that has ended, or that was made by a process
// which died before it was started.
func (n *Node) removeEnded(ctx context.Context, c *client.Client, container client.Container) error {
	release, err := n.reserve(ctx, container.ID(), false)
	if errdefs.IsAlreadyExists(err) {
		return nil // which looks itself
	}
	if err != nil {
		return err
	}
	defer release()
	ended, err := hasEnded(ctx, container)
	if err != nil || !ended {
		return err
	}
	return deleteEnded(ctx, c, container)
}

// hasEnded tells whether a container's main process has ended, or was never started.
func hasEnded(ctx context.Context, container client.Container) (bool, error) {
	task, err := container.Task(ctx, nil)
	if errdefs.IsNotFound(err) {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("look at the task of %s: %w", container.ID(), err)
	}
	status, err := task.Status(ctx)
	if err != nil {
		return false, fmt.Errorf("look at the task of %s: %w", container.ID(), err)
	}
	return status.Status == client.Stopped || status.Status == client.Created, nil
}

// deleteTime bounds how long a container that has ended may take to be removed.
const deleteTime = time.Minute

// deleteEnded removes a container that has ended. It may be gone already. It goes on when
// ctx ends: a call to delete that is given up leaves containerd with a shim that has
// nothing to do.
func deleteEnded(ctx context.Context, c *client.Client, container client.Container) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), deleteTime)
	defer cancel()
	task, err := container.Task(ctx, nil)
	if err == nil {
		_, err = task.Delete(ctx, client.WithProcessKill)
	}
	if errdefs.IsNotFound(err) {
		// If who deleted it before died before the shim had answered, the shim has no task
		// any more, which is all that the client asks it, but containerd has one.
		_, err = c.TaskService().Delete(ctx, &tasks.DeleteTaskRequest{ContainerID: container.ID()})
		err = errgrpc.ToNative(err)
	}
	if err == nil || errdefs.IsNotFound(err) {
		err = container.Delete(ctx)
	}
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("remove container %s, which has ended: %w", container.ID(), err)
	}
	return nil
}

// openStreams makes the files that a container's output goes to, where they are not
// there. A shim opens them by their names.
func openStreams(terminal bool, stdout, stderr string) (cio.IO, error) {
	if terminal && stderr != "" && stderr != stdout {
		return nil, requestError("stderr: a container with a terminal has one stream of output, stdout")
	}
	for _, path := range []string{stdout, stderr} {
		if path == "" {
			continue
		}
		// Not opened if it is a FIFO: that waits for whoever reads it.
		info, err := os.Lstat(path)
		if err == nil && (info.Mode().IsRegular() || info.Mode()&fs.ModeNamedPipe != 0) {
			continue
		}
		if err == nil {
			return nil, requestError("%s is neither a file nor a FIFO", path)
		}
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return nil, fmt.Errorf("make the file for its output: %w", err)
		}
		f.Close()
	}
	if terminal {
		stderr = ""
	}
	return unattached{Terminal: terminal, Stdout: stdout, Stderr: stderr}, nil
}

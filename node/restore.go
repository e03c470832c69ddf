package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/identifiers"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/oci"
	"github.com/stasis-run/stasis/checkpoint/policy/allow"
)

// RestoreRequest says what checkpoint to make a container of, and what that may have.
type RestoreRequest struct {
	// Checkpoint is an image, which is pulled if it is not here, or an archive in a
	// file.
	Checkpoint string
	// Name is the container's ID; empty: the one that it had.
	Name string

	// Grants is what the container may have beyond an ordinary one, if the checkpoint's
	// spec asks for it. Its Network is "host", "none" (its own, with a loopback only), or
	// "join=" and the ID of a container or the path of a network namespace; empty: as
	// it was.
	Grants   allow.Grants
	TCPClose bool // closes all TCP connections

	Runtime     string   // containerd's name of it; empty: RuntimeName
	RuncBinary  string   // the OCI runtime; empty: the one that made the checkpoint
	Snapshotter string   // empty: containerd's own choice
	Registry    Registry // from which the checkpoint is pulled, and its base image
	// MaxSize is how many bytes the checkpoint may have unpacked; 0: half of what is
	// free on the disk.
	MaxSize int64

	// LogURI is where the container's output goes, such as file:///path; empty:
	// nowhere.
	LogURI string
	// IO, if not nil, makes the container's streams instead. terminal tells whether its
	// process has one.
	IO func(terminal bool) cio.Creator
	// Starting, if not nil, is called when there is a task, whose processes are about
	// to come back. If they then do not, undo is called, unless it is nil.
	Starting func(client.Task) (undo func())

	// Healthy, if not empty, is run in the container by sh -c, until it succeeds or
	// HealthyTimeout is over, which has to be set with it.
	Healthy        string
	HealthyTimeout time.Duration

	// Asked, if not nil, is called before the container is made with what the spec asked
	// for, and what became of that.
	Asked    func([]allow.Ask)
	Progress Progress
}

// RestoreResult is a container that runs again.
type RestoreResult struct {
	Container string        `json:"container"`
	Ref       string        `json:"ref"` // of the image that it is made of
	Pid       uint32        `json:"pid"`
	Restored  time.Duration `json:"restored_ns"` // create and start
	Took      time.Duration `json:"took_ns"`

	// Task is the container's. Exited is sent its end, also if ctx has ended before.
	Task   client.Task              `json:"-"`
	Exited <-chan client.ExitStatus `json:"-"`
}

// Restore starts a container from a checkpoint in any format. If that asks for more than
// is granted, nothing is made, and the error matches errdefs.ErrPermissionDenied. If a
// restore fails, what it has made, and pulled for it, is removed. With both a result and
// an error, the container runs, but Healthy did not succeed.
func (n *Node) Restore(ctx context.Context, r RestoreRequest) (_ *RestoreResult, err error) {
	started := time.Now()
	if r.Name != "" {
		if err := identifiers.Validate(r.Name); err != nil {
			return nil, requestError("NAME: %v", err)
		}
	}
	if err := r.Registry.check(r.Checkpoint); err != nil {
		return nil, err
	}
	if r.Runtime == "" {
		r.Runtime = RuntimeName
	}
	ctx, c, done, err := n.leased(ctx)
	if err != nil {
		return nil, err
	}
	op := &restoring{RestoreRequest: r, node: n, c: c, bar: r.Progress.of(r.Checkpoint)}
	runs := false
	defer func() {
		// When the lease has ended, so that nothing keeps the content.
		if err != nil && !runs {
			err = errors.Join(err, op.removeAdded(ctx))
		}
	}()
	defer done()
	defer op.bar.end()
	before := refusable(ctx, c, r.Checkpoint)
	record, err := op.runnable(ctx)
	if err != nil {
		return nil, fmt.Errorf("restore %s: %w", r.Checkpoint, before.undo(ctx, err))
	}
	summary, err := oci.ReadInfo(ctx, c.ContentStore(), record.Target)
	if err != nil {
		return nil, fmt.Errorf("restore %s: %w", r.Checkpoint, err)
	}
	op.RuncBinary = ociBinary(r.RuncBinary, summary.Info.OCIRuntime.Name)
	id := r.Name
	if id == "" {
		if id = summary.Info.ContainerID; identifiers.Validate(id) != nil {
			return nil, requestError("the checkpoint does not tell a container's ID that could be used again: give a NAME")
		}
	}
	if _, err := c.LoadContainer(ctx, id); err == nil {
		return nil, fmt.Errorf("restore %s: there is a container %s: give another NAME, or remove it: %w", r.Checkpoint, id, errdefs.ErrAlreadyExists)
	}
	op.bar.begin("unpack")
	img := client.NewImage(c, record)
	if err := before.unpacking(ctx, img, r.Snapshotter); err != nil {
		return nil, fmt.Errorf("restore %s: %w", r.Checkpoint, err)
	}
	if err := img.Unpack(ctx, r.Snapshotter); err != nil {
		return nil, fmt.Errorf("restore %s: unpack it: %w", r.Checkpoint, err)
	}
	container, spec, err := op.newContainer(ctx, img, id, summary.Info.Namespace)
	if err != nil {
		return nil, fmt.Errorf("restore %s: %w", r.Checkpoint, before.undo(ctx, err))
	}
	op.bar.begin("restore")
	starting := time.Now()
	task, exited, err := op.start(ctx, container, spec)
	if err != nil {
		err = fmt.Errorf("restore %s as %s: %w", r.Checkpoint, id, err)
		return nil, errors.Join(err, removeContainer(ctx, container))
	}
	runs = true
	result := &RestoreResult{Container: id, Ref: record.Name, Pid: task.Pid(), Restored: time.Since(starting), Task: task, Exited: exited}
	op.bar.end()
	if r.Healthy != "" {
		if err := op.waitHealthy(ctx, task, spec); err != nil {
			return result, fmt.Errorf("%s runs, but %w", id, err)
		}
	}
	result.Took = time.Since(started)
	return result, nil
}

// restoring is a restore at work.
type restoring struct {
	RestoreRequest
	node *Node
	c    *client.Client
	bar  *stages
	// madeHere: what is restored is an image as this host has made it.
	madeHere bool
	// added are images that were made under names that nobody typed, or pulled for
	// them. A restore that fails removes them again.
	added []images.Image
}

// ociBinary is the OCI runtime's program: the one that the caller names, else the one
// of which a checkpoint says that it was made by it. That is only a name, and only
// of one that we know: the author could name any program.
func ociBinary(named, madeBy string) string {
	if named == "" && madeBy == "crun" {
		return "crun"
	}
	return named
}

// newContainer makes the container, whose image has its checkpoint.
func (op *restoring) newContainer(ctx context.Context, img client.Image, id, oldNamespace string) (client.Container, *specs.Spec, error) {
	var spec *specs.Spec
	opts := []client.NewContainerOpts{
		client.WithImage(img),
		client.WithSnapshotter(op.Snapshotter),
		client.WithNewSnapshot(id, img),
		client.WithAdditionalContainerLabels(map[string]string{"stasis.run/restored-from": img.Name()}),
		func(ctx context.Context, c *client.Client, container *containers.Container) error {
			err := withEmbedded(ctx, c, container, func(root *os.Root) (err error) {
				spec, err = op.embedded(ctx, container, root, oldNamespace)
				return err
			})
			if err != nil {
				return err
			}
			if err := client.WithSpec(spec)(ctx, c, container); err != nil {
				return err
			}
			return client.WithRuntime(op.Runtime, &options.Options{BinaryName: op.RuncBinary, SystemdCgroup: bySystemd(spec)})(ctx, c, container)
		},
	}
	container, err := op.c.NewContainer(ctx, id, opts...)
	if err != nil {
		rerr := op.c.SnapshotService(defaultSnapshotter(ctx, op.c, op.Snapshotter)).Remove(context.WithoutCancel(ctx), id)
		if rerr != nil && !errdefs.IsNotFound(rerr) && !errdefs.IsAlreadyExists(err) {
			err = errors.Join(err, rerr)
		}
		return nil, nil, fmt.Errorf("make container %s: %w", id, err)
	}
	return container, spec, nil
}

// start restores the processes.
func (op *restoring) start(ctx context.Context, container client.Container, spec *specs.Spec) (_ client.Task, exited <-chan client.ExitStatus, err error) {
	terminal := spec.Process != nil && spec.Process.Terminal
	var creator cio.Creator
	if op.IO != nil {
		creator = op.IO(terminal)
	} else {
		creator = unattachedIO(op.LogURI, terminal)
	}
	task, err := container.NewTask(ctx, creator)
	if err != nil {
		return nil, nil, err
	}
	remove := func(err error) error {
		_, derr := task.Delete(context.WithoutCancel(ctx), client.WithProcessKill)
		return errors.Join(err, derr)
	}
	exited, err = task.Wait(context.WithoutCancel(ctx))
	if err != nil {
		return nil, nil, remove(err)
	}
	var undo func()
	if op.Starting != nil {
		undo = op.Starting(task)
	}
	if err := startTask(ctx, task); err != nil {
		if undo != nil {
			undo()
		}
		return nil, nil, remove(err)
	}
	return task, exited, nil
}

// startTask starts a task, or kills it if we are interrupted. A call that was only
// given up would go on, and the container run after it was removed.
func startTask(ctx context.Context, task client.Task) error {
	whole := context.WithoutCancel(ctx)
	stop := context.AfterFunc(ctx, func() { _ = task.Kill(whole, unix.SIGKILL) })
	err := task.Start(whole)
	if !stop() {
		return errors.Join(context.Cause(ctx), err)
	}
	return err
}

// removeContainer undoes newContainer.
func removeContainer(ctx context.Context, container client.Container) error {
	err := container.Delete(context.WithoutCancel(ctx), client.WithSnapshotCleanup)
	if err != nil {
		return fmt.Errorf("remove container %s again: %w", container.ID(), err)
	}
	return nil
}

// removeAdded removes the images that a restore has added which then failed.
func (op *restoring) removeAdded(ctx context.Context) error {
	ctx = context.WithoutCancel(ctx)
	var failed []error
	for _, img := range op.added {
		// Not one that has got the name since.
		err := op.c.ImageService().Delete(ctx, img.Name, images.DeleteTarget(&img.Target), images.SynchronousDelete())
		if err != nil && !errdefs.IsNotFound(err) {
			failed = append(failed, fmt.Errorf("remove image %s again: %w", img.Name, err))
		}
	}
	op.added = nil
	return errors.Join(failed...)
}

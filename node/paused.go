package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/identifiers"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/process"
)

// While another shim than Stasis's dumps a container, that is paused, by us or by
// containerd's client. If this process is killed meanwhile, nobody resumes it: so a record
// in the folder of the work says that it was running, and Recover and Prune look there.

// pausedRecord is the file with a pausedContainer.
const pausedRecord = "paused.json"

type pausedContainer struct {
	Namespace string `json:"namespace"`
	ID        string `json:"id"`
	Pid       uint32 `json:"pid"` // of its init: another has the ID later
}

// maxPausedRecord is in bytes.
const maxPausedRecord = 4 << 10

// notePaused writes the record. forget removes it, when the container runs again.
func (d *dumper) notePaused(ctx context.Context) (forget func(), err error) {
	path := filepath.Join(d.workDir, pausedRecord)
	data, err := json.Marshal(pausedContainer{namespaceOf(ctx), d.container.ID(), d.task.Pid()})
	if err == nil {
		err = WriteFile(ctx, path, func(w io.Writer) error { _, err := w.Write(data); return err })
	}
	if err != nil {
		return nil, fmt.Errorf("note that it is going to be paused: %w", err)
	}
	return func() { _ = os.Remove(path) }, nil // with the folder, if not now
}

const (
	// resumeTime bounds how long a dump is waited for that goes on without us.
	resumeTime = time.Minute
	// resumeEvery is the time between two looks. CRIU leaves a container as it found it,
	// paused, so it has to stay resumed for one.
	resumeEvery = time.Second
)

// resumeLeft resumes the container of a folder's record, if it is paused still.
func (n *Node) resumeLeft(ctx context.Context, dir string) error {
	path := filepath.Join(dir, pausedRecord)
	data, err := capture.ReadSmall(path, maxPausedRecord)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var p pausedContainer
	if err == nil {
		err = json.Unmarshal(data, &p)
	}
	if err == nil {
		err = errors.Join(identifiers.Validate(p.Namespace), identifiers.Validate(p.ID))
	}
	if err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	if err := n.resume(namespaces.WithNamespace(ctx, p.Namespace), p); err != nil {
		return fmt.Errorf("resume container %s, which was paused for a checkpoint that did not end (`ctr -n %s tasks resume %s`): %w", p.ID, p.Namespace, p.ID, err)
	}
	return os.Remove(path)
}

func (n *Node) resume(ctx context.Context, p pausedContainer) error {
	ctx, cancel := context.WithTimeoutCause(ctx, resumeTime, errors.New("its dump goes on"))
	defer cancel()
	c, err := n.Client(ctx)
	if err != nil {
		return err
	}
	for ran := false; ; {
		container, err := c.LoadContainer(ctx, p.ID)
		if err != nil {
			return ignoreNotFound(err)
		}
		task, err := container.Task(ctx, nil)
		if err != nil {
			return ignoreNotFound(err)
		}
		status, err := task.Status(ctx)
		switch {
		case errdefs.IsNotFound(err):
			return nil
		case err != nil:
			return err
		case task.Pid() != p.Pid || status.Status != client.Running && status.Status != client.Paused:
			return nil // it has ended
		case process.TracerOf(int(p.Pid)) != 0:
			ran = false // CRIU is at work
		case status.Status == client.Paused:
			ran = false
			if err := task.Resume(ctx); err != nil {
				return err
			}
			n.log.Info(fmt.Sprintf("resumed container %s, which was paused for a checkpoint that did not end", p.ID))
		case ran:
			return nil
		default:
			ran = true
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(resumeEvery):
		}
	}
}

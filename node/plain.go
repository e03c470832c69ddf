package node

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	runc "github.com/containerd/go-runc"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/criu"
	"github.com/stasis-run/stasis/process"
)

// Containers that runc runs without containerd. Their root is runc's state folder, such as
// /run/runc.

// PlainContainers lists the containers in a state folder of runc's that run or are paused.
func (n *Node) PlainContainers(ctx context.Context, root string) ([]Container, error) {
	all, err := (&runc.Runc{Root: root}).List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list the containers of runc in %s: %w", root, err)
	}
	found := []Container{}
	for _, c := range all {
		if plainRuns(c) {
			found = append(found, Container{ID: c.ID, Name: c.ID, Status: c.Status, Pid: uint32(c.Pid), Created: c.Created})
		}
	}
	slices.SortFunc(found, func(a, b Container) int { return strings.Compare(a.ID, b.ID) })
	return found, nil
}

func plainRuns(c *runc.Container) bool { return c.Status == "running" || c.Status == "paused" }

// PlainRequest says what container of runc's to checkpoint into a folder.
type PlainRequest struct {
	Root      string // runc's state folder
	Container string // its ID there
	// Dir is the folder for CRIU's images, which is made. It may be there if it is empty.
	Dir     string
	Options DumpOptions
}

// CheckpointPlain saves the processes of a container that runc runs without containerd to a
// folder. It runs on. After an error, the folder is as it was.
//
// CRIU freezes it, and not we: if this process is killed meanwhile, CRIU thaws it, and
// nobody else would.
func (n *Node) CheckpointPlain(ctx context.Context, r PlainRequest) (_ *FolderResult, err error) {
	if strings.HasPrefix(r.Container, "-") || r.Container == "" || filepath.Base(r.Container) != r.Container {
		return nil, requestError("%q is no ID of a container", r.Container)
	}
	if _, err := isNew(r.Dir); err != nil {
		return nil, err
	}
	found, err := (&runc.Runc{Root: r.Root}).List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list the containers of runc in %s: %w", r.Root, err)
	}
	i := slices.IndexFunc(found, func(c *runc.Container) bool { return c.ID == r.Container })
	if i < 0 || !plainRuns(found[i]) {
		return nil, fmt.Errorf("no container %s of runc runs in %s: %w", r.Container, r.Root, errdefs.ErrNotFound)
	}
	work, err := n.newWork()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, work.remove()) }()
	request := criu.DumpRequest{
		// runc's log goes to the folder of the bundle.
		Runtime: process.NewRuntime(process.RuntimeConfig{Root: filepath.Dir(r.Root)}, filepath.Base(r.Root), work.dir, r.Container),
		InitPid: found[i].Pid,
		Dir:     r.Dir,
		WorkDir: filepath.Join(work.dir, "criu"),
		Options: checkpoint.Options{OpenTCP: r.Options.OpenTCP, ExternalUnixSockets: r.Options.ExternalUnixSockets, Terminal: r.Options.Terminal,
			FileLocks: r.Options.FileLocks},
		DumpOptions: criu.DumpOptions{TCPClose: r.Options.TCPClose, GhostLimit: r.Options.GhostLimit},
		Container:   checkpoint.Container{ID: r.Container},
	}
	result := &FolderResult{}
	if request.Key, err = n.keys.Key(); err != nil {
		result.Note = "the checkpoint is not signed: " + err.Error()
	}
	if spec, err := capture.ReadSmall(filepath.Join(found[i].Bundle, BundleConfig), maxBundleConfig); err == nil {
		request.Container.SpecDigest, _ = checkpoint.SpecDigest(spec)
	}
	started := time.Now()
	dumped, err := criu.Dump(ctx, request)
	if err != nil {
		return nil, err
	}
	result.Frozen = time.Since(started)
	if s := dumped.Stats; s != nil {
		result.Frozen = time.Duration(s.GetFrozenTime()) * time.Microsecond
	}
	result.ImageBytes, err = sizeOf(r.Dir)
	return result, err
}

package node

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"

	"github.com/stasis-run/stasis/checkpoint/api"
	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/process"
)

// shim is a connection to the shim that a container runs under.
type shim struct {
	api.CheckpointsClient
	*ttrpc.Client
}

// shimOf connects to the shim of a container with that init. The init's parent is
// the shim, which works in its bundle, where containerd has noted its address:
// bootstrap.json since 2.0, address before.
func shimOf(init int) (*shim, error) {
	parent := process.ParentOf(init)
	if parent == 0 {
		return nil, fmt.Errorf("find the shim of process %d: it has ended: %w", init, fs.ErrNotExist)
	}
	bundle, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", parent))
	if err != nil {
		return nil, fmt.Errorf("find the bundle of shim %d: %w", parent, err)
	}
	address, err := shimAddress(bundle)
	if err != nil {
		return nil, fmt.Errorf("find the address of shim %d in %s: %w", parent, bundle, err)
	}
	conn, err := net.DialTimeout("unix", strings.TrimPrefix(address, "unix://"), 5*time.Second)
	if err != nil {
		return nil, fmt.Errorf("connect to shim %d: %w", parent, err)
	}
	client := ttrpc.NewClient(conn)
	return &shim{api.NewCheckpointsClient(client), client}, nil
}

func shimAddress(bundle string) (string, error) {
	data, err := os.ReadFile(filepath.Join(bundle, "bootstrap.json"))
	if errors.Is(err, fs.ErrNotExist) {
		data, err = os.ReadFile(filepath.Join(bundle, "address"))
		return strings.TrimSpace(string(data)), err
	}
	if err != nil {
		return "", err
	}
	var params struct {
		Address string `json:"address"`
	}
	if err := json.Unmarshal(data, &params); err != nil {
		return "", fmt.Errorf("bootstrap.json: %w", err)
	}
	return params.Address, nil
}

// checkpoint makes a checkpoint by Stasis's own service. hasFile is called with the
// memory file if the shim tells of one, and must not wait; it may be nil. The error matches
// errdefs.ErrNotImplemented if the shim is not Stasis's.
func (s *shim) checkpoint(ctx context.Context, r *api.CheckpointRequest, bar *stages, hasFile func(*api.MemoryFile)) (*api.CheckpointResult, error) {
	stream, err := s.Checkpoint(ctx, r)
	if err != nil {
		return nil, errgrpc.ToNative(err)
	}
	var sum dumpProgress
	for {
		update, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("the shim ended without a result: %w", errdefs.ErrUnavailable)
		}
		if err != nil {
			if ctx.Err() != nil {
				s.abort(r)
				return nil, context.Cause(ctx)
			}
			return nil, errgrpc.ToNative(err)
		}
		switch p := update.GetProgress(); {
		case p == nil:
		case p.Stage == "pre-dump":
			bar.begin(p.Stage)
			bar.set(int64(p.DoneBytes), int64(max(p.TotalBytes, p.DoneBytes)))
		default:
			bar.begin("dump")
			bar.set(sum.add(p))
		}
		if file := update.GetMemoryFile(); file != nil && hasFile != nil {
			hasFile(file)
		}
		if result := update.GetResult(); result != nil {
			return result, nil
		}
	}
}

// dumpProgress adds up what CRIU and the copy of the writable layer have done, which
// they do at the same time.
type dumpProgress map[string]*api.Progress

// add returns how many bytes are done, and of how many at least.
func (s *dumpProgress) add(p *api.Progress) (done, total int64) {
	if *s == nil {
		*s = dumpProgress{}
	}
	(*s)[p.Stage] = p
	for _, p := range *s {
		done += int64(p.DoneBytes)
		total += int64(max(p.TotalBytes, p.DoneBytes))
	}
	return done, total
}

// abort has the shim give a checkpoint up, which it does when we go away, and
// waits until the container runs again and nothing is left; or until the
// checkpoint is whole, if it is too late to give it up.
func (s *shim) abort(r *api.CheckpointRequest) {
	s.Client.Close()
	waitSettled(context.Background(), cmp.Or(r.ImagePath, r.RootfsPath))
}

// waitSettled waits until a folder that a shim makes a checkpoint in is whole, or gone;
// for a minute at most.
func waitSettled(ctx context.Context, images string) {
	for end := time.Now().Add(time.Minute); time.Now().Before(end) && ctx.Err() == nil; {
		_, err := os.Lstat(images)
		if errors.Is(err, fs.ErrNotExist) || isWhole(images) {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// isWhole tells whether a folder holds a checkpoint, whose last file comes last.
func isWhole(dir string) bool {
	_, err := os.Lstat(filepath.Join(dir, layout.Inventory))
	return err == nil
}

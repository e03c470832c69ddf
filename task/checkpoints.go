package task

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"

	"github.com/stasis-run/stasis/checkpoint/api"
	"github.com/stasis-run/stasis/checkpoint/criu"
	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/checkpoint/rootfs"
)

// checkpoints is the shim's own service: a checkpoint whose freeze holds no more
// than what has to see the container stand still.
type checkpoints struct{ s *Service }

// maxPreDumps are more than ever help.
const maxPreDumps = 127

// progressEvery is how often a client hears how far its checkpoint is.
const progressEvery = 200 * time.Millisecond

// Checkpoint serves one checkpoint. A client that goes away aborts it.
func (s checkpoints) Checkpoint(ctx context.Context, r *api.CheckpointRequest, stream api.Checkpoints_CheckpointServer) error {
	// The shim must not end before the result is sent, which with exit is
	// after the container's end.
	s.s.background.Add(1)
	defer s.s.background.Done()
	result, err := s.checkpoint(ctx, r, stream.Send)
	if err != nil {
		return errgrpc.ToGRPC(err)
	}
	return stream.Send(&api.CheckpointUpdate{Update: &api.CheckpointUpdate_Result{Result: result}})
}

func (s checkpoints) checkpoint(ctx context.Context, r *api.CheckpointRequest, send func(*api.CheckpointUpdate) error) (*api.CheckpointResult, error) {
	c, err := s.s.find(r.Id)
	if err != nil {
		return nil, err
	}
	filesOnly := r.ImagePath == "" && r.RootfsPath != ""
	if !filepath.IsAbs(r.ImagePath) && !filesOnly {
		return nil, invalid("image_path %q is not absolute", r.ImagePath)
	}
	if r.RootfsPath != "" && !filepath.IsAbs(r.RootfsPath) {
		return nil, invalid("rootfs_path %q is not absolute", r.RootfsPath)
	}
	if filesOnly && (r.Exit || r.PreDumps != 0 || r.LeaveSum || r.TellMemoryFile || r.Options != nil || r.BaseConfig != "") {
		return nil, invalid("rootfs_path without image_path: no dump is made, so nothing else goes with it")
	}
	if r.RootfsPath != "" && r.Exit {
		return nil, invalid("rootfs_path with exit: nothing writes to the writable layer any more, and a copy that fails would come too late")
	}
	if r.LeaveSum && r.Exit {
		return nil, invalid("leave_sum with exit: the checkpoint has to be whole when the container has ended")
	}
	if r.BaseConfig != "" && digest.Digest(r.BaseConfig).Validate() != nil {
		return nil, invalid("base_config %.80q is no digest", r.BaseConfig)
	}
	preDumps := int(r.PreDumps)
	if preDumps < 0 {
		preDumps = criu.PreDumpAuto
	}
	if preDumps > maxPreDumps {
		return nil, invalid("pre_dumps %d: at most %d", preDumps, maxPreDumps)
	}
	o := r.Options
	if o == nil {
		o = &api.CRIUOptions{}
	}
	if o.LinkRemap && !r.Exit {
		return nil, invalid("link_remap without exit: CRIU removes the links again when the container runs on, and no restore would find them")
	}
	criuOptions, err := checkpointOptions(o)
	if err != nil {
		return nil, err
	}
	client := ctx
	ctx, release, err := c.exclusive(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(client, func() { cancel(errors.New("the client went away")) })()

	m := &meter{container: c, dir: r.ImagePath, memoryFile: make(chan criu.MemoryFile, 1)}
	defer m.run(func(u *api.CheckpointUpdate) {
		if err := send(u); err != nil {
			cancel(fmt.Errorf("tell the client of the progress: %w", err))
		}
	})()
	if filesOnly {
		if err := absent(r.RootfsPath); err != nil {
			return nil, err
		}
		return c.copyRootfs(ctx, r.RootfsPath, func(n int64) { m.copied.Add(n) })
	}
	d := dump{
		dir:         r.ImagePath,
		options:     criuOptions,
		dumpOptions: criu.DumpOptions{TCPClose: o.TcpClose, LinkRemap: o.LinkRemap, GhostLimit: o.GhostLimit},
		preDumps:    preDumps,
		exit:        r.Exit,
		durable:     r.Exit,
		leaveSum:    r.LeaveSum,
		baseConfig:  r.BaseConfig,
	}
	if r.TellMemoryFile {
		d.memoryFile = func(f criu.MemoryFile) { m.memoryFile <- f }
	}
	result := &api.CheckpointResult{}
	copied := time.Duration(0)
	if r.RootfsPath != "" {
		if err := absent(r.RootfsPath); err != nil {
			return nil, err
		}
		var from string
		if from, result.RootfsIsUpper, err = c.writableLayer(); err != nil {
			return nil, err
		}
		d.while = func(ctx context.Context) error {
			started := time.Now()
			n, err := rootfs.Copy(ctx, r.RootfsPath, from, func(n int64) { m.copied.Add(n) })
			if err != nil {
				return fmt.Errorf("copy its writable layer %s: %w", from, err)
			}
			copied, result.RootfsBytes = time.Since(started), uint64(n)
			return nil
		}
	}
	started := time.Now()
	dumped, err := c.checkpoint(ctx, d)
	if err != nil {
		if r.RootfsPath != "" {
			err = errors.Join(err, os.RemoveAll(r.RootfsPath))
		}
		return nil, err
	}
	if err := copyLogs(r.ImagePath, c.bundle.dumpDir()); err != nil {
		// The checkpoint is whole, and with exit all there is of the container.
		log.G(ctx).WithError(err).WithField("container", c.id).Warn("a checkpoint is without CRIU's log and figures")
	}
	for _, p := range dumped.PreDumps {
		result.PreDumps = append(result.PreDumps, &api.PreDump{DurationNs: uint64(p.Took), PagesWritten: p.Pages})
	}
	result.FrozenNs = uint64(dumped.Frozen)
	result.ImageBytes = uint64(sizeOf(r.ImagePath))
	result.CriuVersion = dumped.CRIU
	result.Unsigned = dumped.Unsigned
	result.RuntimeName, result.RuntimeVersion = dumped.Runtime.Name, dumped.Runtime.Version
	if s := dumped.Stats; s != nil {
		result.Criu = &api.CRIUStats{
			FreezingUs:   uint64(s.GetFreezingTime()),
			FrozenUs:     uint64(s.GetFrozenTime()),
			MemdumpUs:    uint64(s.GetMemdumpTime()),
			MemwriteUs:   uint64(s.GetMemwriteTime()),
			PagesScanned: s.GetPagesScanned(),
			PagesWritten: s.GetPagesWritten(),
		}
	}
	result.Stages = []*api.Stage{{Name: "frozen", DurationNs: result.FrozenNs}}
	if copied > 0 {
		result.Stages = append(result.Stages, &api.Stage{Name: "rootfs", DurationNs: uint64(copied)})
	}
	result.Stages = append(result.Stages, &api.Stage{Name: "total", DurationNs: uint64(time.Since(started))})
	return result, nil
}

// absent refuses a copy of the writable layer that is there: it is removed after a failure,
// which only ours may be.
func absent(rootfsPath string) error {
	if _, err := os.Lstat(rootfsPath); !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("rootfs_path %s, a copy of the writable layer, exists: %w", rootfsPath, cmp.Or[error](err, errdefs.ErrAlreadyExists))
	}
	return nil
}

// copyLogs puts CRIU's log and figures beside the images, which no restore reads
// and every format of a checkpoint has.
func copyLogs(dir, workDir string) error {
	for _, name := range []string{layout.DumpLog, layout.DumpStats} {
		data, err := os.ReadFile(filepath.Join(workDir, name))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err == nil {
			err = replaceFile(filepath.Join(dir, name), data)
		}
		if err != nil {
			return fmt.Errorf("copy %s to the checkpoint: %w", name, err)
		}
	}
	return nil
}

// replaceFile writes a file, and through no link that is there in its place.
func replaceFile(path string, data []byte) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Close())
}

// meter tells a client how far its checkpoint is. Its goroutine is the only one that
// sends while the checkpoint is made.
type meter struct {
	container  *container
	dir        string
	copied     atomic.Int64
	memoryFile chan criu.MemoryFile // has room for the one that there is at most
}

// run sends updates until the returned function is called.
func (m *meter) run(send func(*api.CheckpointUpdate)) (stop func()) {
	total := m.container.anonymous()
	done, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		tick := time.NewTicker(progressEvery)
		defer tick.Stop()
		for {
			select {
			case <-done:
				return
			case f := <-m.memoryFile:
				send(&api.CheckpointUpdate{Update: &api.CheckpointUpdate_MemoryFile{
					MemoryFile: &api.MemoryFile{Path: f.Path, Size: uint64(f.Size)},
				}})
			case <-tick.C:
				m.sendProgress(send, total)
			}
		}
	}()
	return func() {
		close(done)
		<-stopped
	}
}

// sendProgress says how much of about total bytes is written.
func (m *meter) sendProgress(send func(*api.CheckpointUpdate), total int64) {
	progress := func(p *api.Progress) {
		send(&api.CheckpointUpdate{Update: &api.CheckpointUpdate_Progress{Progress: p}})
	}
	stage, dir := "dump", filepath.Join(m.dir, layout.Partial)
	if images := sizeOf(dir); images == 0 {
		if rounds, _ := filepath.Glob(filepath.Join(dir, layout.PreDumps)); len(rounds) > 0 {
			stage, dir = "pre-dump", filepath.Join(dir, layout.PreDump(len(rounds)))
		}
	}
	if m.dir != "" {
		progress(&api.Progress{Stage: stage, DoneBytes: uint64(sizeOf(dir)), TotalBytes: uint64(total)})
	}
	if n := m.copied.Load(); n > 0 {
		progress(&api.Progress{Stage: "rootfs", DoneBytes: uint64(n)})
	}
}

// sizeOf is what the files of a folder take, in bytes.
func sizeOf(dir string) (size int64) {
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		// What begins with a dot is no image.
		if info, err := e.Info(); err == nil && info.Mode().IsRegular() && !strings.HasPrefix(e.Name(), ".") {
			size += info.Size()
		}
	}
	return size
}

// anonymous estimates what CRIU will write: the private memory of the
// container's processes, in bytes.
func (c *container) anonymous() (size int64) {
	cg := c.loadedCgroup()
	if cg == nil {
		return 0
	}
	pids, _ := cg.Pids()
	for _, pid := range pids {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
		if err != nil {
			continue
		}
		// size resident shared …, in pages
		fields := strings.Fields(string(data))
		if len(fields) > 2 {
			resident, _ := strconv.ParseInt(fields[1], 10, 64)
			shared, _ := strconv.ParseInt(fields[2], 10, 64)
			size += (resident - shared) * int64(os.Getpagesize())
		}
	}
	return size
}

package criu

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	runc "github.com/containerd/go-runc"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/criu/img"
	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/layout"
)

// A pre-dump writes the memory while the container runs, but for the moment in which
// CRIU notes which pages there are; the kernel tells the next one, and the dump,
// which of them were written to since. So the dump, for which the container stands
// still, has little left to write.

// PreDumpAuto makes pre-dumps until one has no less to write than the one before.
const PreDumpAuto = -1

// maxPreDumps ends PreDumpAuto for a container that writes less and less for ever.
const maxPreDumps = 16

// PreDump is what a pre-dump has done.
type PreDump struct {
	Took  time.Duration
	Pages uint64 // written
}

// preDump makes the pre-dumps that were asked for and tells what each has done.
func (r *DumpRequest) preDump(ctx, callCtx context.Context, folder *checkpoint.Folder) (done []PreDump, err error) {
	if r.PreDumps == 0 || r.Paused {
		return nil, nil // in a frozen container nothing changes
	}
	if works, err := SoftDirty(); err != nil || !works {
		return nil, &ownError{fault.Unusable("there is no pre-dump on this kernel, which does not track changes of memory; boot one with CONFIG_MEM_SOFT_DIRTY, or leave the pre-dump out")}
	}
	stats := filepath.Join(r.WorkDir, layout.DumpStats)
	for n := 1; r.PreDumps == PreDumpAuto || n <= r.PreDumps; n++ {
		dir := filepath.Join(folder.Path(), layout.PreDump(n))
		if err := os.Mkdir(dir, 0o700); err != nil {
			return nil, &ownError{err}
		}
		opts := dumpOpts(r.Options, dir, r.WorkDir)
		if n > 1 {
			opts.ParentPath = filepath.Join("..", layout.PreDump(n-1))
		}
		_ = os.Remove(stats) // of the one before
		started := time.Now()
		if err := r.Runtime.Checkpoint(callCtx, opts, runc.PreDump); err != nil {
			return nil, fmt.Errorf("pre-dump %d: %w", n, err)
		}
		// What img.Flatten could not read is refused as long as the container runs.
		if _, err := img.PageLists(dir); err != nil {
			return nil, &ownError{fmt.Errorf("read pre-dump %d, on which the dump is to build: %w", n, err)}
		}
		round := PreDump{Took: time.Since(started)}
		if s := ReadDumpStats(stats); s != nil {
			round.Pages = s.GetPagesWritten()
		}
		done = append(done, round)
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if r.PreDumps == PreDumpAuto && (n == maxPreDumps || n > 1 && round.Pages >= done[n-2].Pages) {
			break
		}
	}
	return done, nil
}

// resident is how much memory the container's processes have, in bytes: at most so
// much is put together.
func (r *DumpRequest) resident() (size int64) {
	if r.Cgroup == nil {
		return 0
	}
	pids, err := r.Cgroup.Pids()
	if err != nil {
		return 0
	}
	for _, pid := range pids {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
		if err != nil {
			continue // it has ended
		}
		var total, pages int64
		if _, err := fmt.Sscan(string(data), &total, &pages); err == nil {
			size += pages * int64(os.Getpagesize())
		}
	}
	return size
}

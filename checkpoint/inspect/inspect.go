// Package inspect tells what is in a checkpoint: processes, memory, open files,
// sockets, mounts, and what a host must have to restore it.
//
// It reads the images of CRIU, of whatever version, architecture and maker, and
// judges nothing: checkpoint.Open says whether this host can restore one. The
// images are untrusted. Only regular files of the one folder are read, no link
// is followed, and memory is bounded by the limits in limits.go, whatever the
// images claim.
package inspect

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"

	core "github.com/checkpoint-restore/go-criu/v8/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/inventory"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/stats"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/utsns"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/layout"
)

// Options say what to read besides the usual.
type Options struct {
	// Environment reads the environment of each process, where passwords and
	// keys are often kept.
	Environment bool
}

// Inspect reads the checkpoint in the folder dir: CRIU's images, and stasis.json
// if it is there. Errors match errdefs: ErrNotFound if there is no such folder,
// ErrInvalidArgument if it holds no checkpoint, or one with an image that is
// missing or malformed; they name the image.
func Inspect(ctx context.Context, dir string, o Options) (*Report, error) {
	f, err := openFolder(dir)
	if err == nil {
		defer f.close()
		r := newReader(ctx, f, o)
		if err = r.read(); err == nil {
			return r.report, nil
		}
	}
	return nil, fmt.Errorf("inspect checkpoint %s: %w", dir, err)
}

// reader reads one checkpoint into a report.
type reader struct {
	ctx     context.Context
	folder  *folder
	options Options
	left    int // items that the report may yet get
	report  *Report

	files     *fileTable
	shared    map[uint64]int64       // sizes of shared memory in bytes, by its number
	addresses map[string]bool        // local ones of TCP connections, but loopback's
	namespace *core.TaskKobjIdsEntry // of the first process
}

func newReader(ctx context.Context, f *folder, o Options) *reader {
	return &reader{
		ctx: ctx, folder: f, options: o, left: maxItems,
		report: &Report{Sockets: []Socket{}, Mounts: []Mount{}},
		shared: map[uint64]int64{}, addresses: map[string]bool{},
	}
}

// take accounts for n items of the report.
func (r *reader) take(n int) error {
	if r.left -= n; r.left < 0 {
		return fault.Invalid("more than %d processes, mappings and open files", maxItems)
	}
	return context.Cause(r.ctx)
}

func (r *reader) read() error {
	for _, step := range []func() error{
		r.readManifest, r.readInventory, r.readHostname, r.readFiles, r.readProcesses, r.readMounts, r.readStats,
	} {
		if err := step(); err != nil {
			return err
		}
	}
	r.report.Sizes = r.folder.sizes()
	r.report.Needs = r.needs()
	return nil
}

// readManifest shows what stasis.json says without a check against the files,
// which is for checkpoint.Open.
func (r *reader) readManifest() error {
	data, err := r.folder.small(layout.Manifest, maxManifest)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := capture.CheckNodes(data, 4*maxEntries); err != nil {
		return fmt.Errorf("%s: %w", layout.Manifest, err)
	}
	var m checkpoint.Manifest
	if err := json.Unmarshal(data, &m); err != nil {
		return fault.Invalid("%s: no manifest: %v", layout.Manifest, err)
	}
	r.report.Manifest = &m
	return r.take(len(m.Files) + len(m.CPUFeatures))
}

func (r *reader) readInventory() error {
	var inv inventory.InventoryEntry
	if err := r.folder.one(layout.Inventory, "INVENTORY", &inv); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return fault.Invalid("no checkpoint: the folder has no %s", layout.Inventory)
		}
		return err
	}
	r.namespace = inv.GetRootIds()
	r.report.TCPClosed = inv.GetTcpClose()
	if lsm := inv.GetLsmtype(); lsm != inventory.Lsmtype_NO_LSM {
		r.report.LSM = strings.ToLower(lsm.String())
	}
	return nil
}

func (r *reader) readHostname() error {
	var u utsns.UtsnsEntry
	err := r.folder.one(layout.UTSNamespace.Name(r.namespace.GetUtsNsId()), "UTSNS", &u)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	r.report.Hostname = text(u.GetNodename())
	return err
}

func (r *reader) readStats() error {
	var s stats.StatsEntry
	err := r.folder.one(layout.DumpStats, "STATS", &s)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if d := s.GetDump(); d != nil {
		r.report.Stats = &Stats{
			FreezingUS: d.GetFreezingTime(), FrozenUS: d.GetFrozenTime(),
			MemoryDumpUS: d.GetMemdumpTime(), MemoryWriteUS: d.GetMemwriteTime(),
			PagesScanned: d.GetPagesScanned() + d.GetShpagesScanned(),
			PagesWritten: d.GetPagesWritten() + d.GetShpagesWritten(),
			PagesParent:  d.GetPagesSkippedParent() + d.GetShpagesSkippedParent(),
			PagesLazy:    d.GetPagesLazy(),
		}
	}
	return err
}

// text makes a string of an image fit for JSON and for people.
func text(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }

// stop ends an iteration without an error.
var stop = io.EOF

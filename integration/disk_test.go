package integration

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/client"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/integration/stack"
)

// The tests of this file take away the disk on which a checkpoint is written.

// mount mounts a tmpfs of a size in bytes until the test ends.
func (p *patient) mount(dir string, size int64, flags uintptr) {
	p.scene.t.Helper()
	p.must("mkdir", os.MkdirAll(dir, 0o700))
	// With as many files as there may be, so that only their content counts.
	p.must("mount", unix.Mount("tmpfs", dir, "tmpfs", flags, "mode=700,nr_inodes=0,size="+itoa(size)))
	p.scene.t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
}

// fill writes to a file system until it is full.
func (p *patient) fill(dir string) {
	p.scene.t.Helper()
	f, err := os.Create(filepath.Join(dir, "fill"))
	p.must("fill", err)
	defer f.Close()
	for buf := make([]byte, 4096); err == nil; {
		_, err = f.Write(buf)
	}
}

// whole restores the patient if a dump that should end it has succeeded, and
// checks that it is fine in any case. It returns whether the dump has.
func (p *patient) whole(dir string, err error, exit bool) bool {
	p.scene.t.Helper()
	if err == nil && exit {
		p.c.Restore(p.ctx, dir)
	}
	if err != nil && !strings.Contains(strings.ToLower(err.Error()), "no space left on device") {
		p.errorf("the error does not say that the disk is full: %v", err)
	}
	p.fine()
	return err == nil
}

// TestFullImageFolder dumps to file systems on which less and less of the
// checkpoint has room. A container that ends with its dump must never be lost.
func TestFullImageFolder(t *testing.T) {
	t.Parallel()
	p := newPatient(t)
	dir := p.dir()
	p.must("checkpoint", p.dump(dir, false))
	var size int64 // as tmpfs counts
	entries, err := os.ReadDir(dir)
	p.must("read", err)
	for _, e := range entries {
		info, err := e.Info()
		p.must("stat", err)
		size += (info.Size() + 4095) &^ 4095
	}
	const page, reserve = 4096, 4 << 20 // the latter is checkpoint's reserveSize
	for _, try := range []struct {
		size int64
		exit bool
		ok   bool // else it may fail
	}{
		{size + 512*page, false, true},
		{size + reserve + 512*page, true, true},
		{page, false, false},
		{page, true, false},
		{size / 2, false, false},        // in pages-1.img
		{size/2 + reserve, true, false}, //
		{size - 20*page, false, false},  // in the small images after it
		{size + reserve - 20*page, true, false},
		{size - page, false, false}, // the manifest has no room
		{size + reserve - page, true, false},
		{size + 4*page, true, false}, // would have, were it not for what is reserved
	} {
		p.at("size %d (%+d pages), exit %v", try.size, (try.size-size)/page, try.exit)
		fs := filepath.Join(p.Dir, "small-"+itoa(try.size))
		p.mount(fs, try.size, 0)
		dir := filepath.Join(fs, "checkpoint")
		err := p.dump(dir, try.exit)
		if !p.whole(dir, err, try.exit) {
			if try.ok {
				p.errorf("the dump failed: %v", err)
			}
			if files := list(dir); len(files) > 0 {
				p.errorf("left in the checkpoint's folder: %q", files)
			}
		}
		p.must("unmount", unix.Unmount(fs, unix.MNT_DETACH))
	}
}

// TestFullWorkPath dumps with no room for CRIU's log.
func TestFullWorkPath(t *testing.T) {
	t.Parallel()
	p := newPatient(t)
	work := filepath.Join(p.Dir, "full")
	p.mount(work, 64<<10, 0)
	p.fill(work)
	for _, exit := range []bool{false, true} {
		p.at("exit %v", exit)
		dir := p.dir()
		err := p.c.CheckpointErr(p.ctx, dir, &options.CheckpointOptions{OpenTcp: true, Exit: exit, WorkPath: work})
		p.whole(dir, err, exit)
	}
}

// TestFullBundle dumps and restores with no room in the bundle.
func TestFullBundle(t *testing.T) {
	t.Parallel()
	p := newPatient(t)
	// The bundles of further containers.
	bundles := filepath.Dir(p.c.Bundle())
	p.end(p.c)
	p.mount(bundles, 1<<20, 0)
	p.c = p.NewContainer(p.ctx, "c", stack.Probe, stack.ProbeArgs("-items", "counter"))
	p.c.StartProbe(p.ctx)
	full := filepath.Join(bundles, "fill")
	for _, exit := range []bool{false, true} {
		p.at("exit %v", exit)
		p.fill(bundles)
		dir := p.dir()
		err := p.c.CheckpointErr(p.ctx, dir, &options.CheckpointOptions{Exit: exit})
		p.must("make room", os.Remove(full))
		if err == nil && exit {
			p.must("create", p.c.Create(p.ctx, client.WithRestoreImagePath(dir)))
			p.fill(bundles)
			err := p.start()
			p.must("make room", os.Remove(full))
			if err != nil {
				p.scene.t.Logf("restore: %v", err)
				p.retryable()
				p.must("start", p.start())
			}
		}
		p.counts()
	}
	p.c.Kill(p.ctx, syscall.SIGKILL)
	p.c.Delete(p.ctx)
}

// TestReadOnlyImageFolder dumps to where nothing can be written.
func TestReadOnlyImageFolder(t *testing.T) {
	t.Parallel()
	p := newPatient(t)
	dir := filepath.Join(p.Dir, "readonly")
	p.mount(dir, 1<<20, unix.MS_RDONLY)
	for _, exit := range []bool{false, true} {
		p.at("exit %v", exit)
		if err := p.dump(dir, exit); err == nil || !strings.Contains(err.Error(), "read-only file system") {
			p.errorf("got %v", err)
		}
		p.fine()
	}
}

// TestImageFolderGone removes the image folder while CRIU writes to it.
func TestImageFolderGone(t *testing.T) {
	t.Parallel()
	p := newPatient(t)
	for _, exit := range []bool{false, true} {
		p.at("exit %v", exit)
		dir := p.dir()
		dump := p.hold("checkpoint", stack.During("page-xfer: Transferring"), func() error { return p.dump(dir, exit) })
		p.must("remove", os.RemoveAll(dir))
		if dump.release() == nil {
			p.errorf("the dump succeeded")
		}
		p.fine()
	}
}

func itoa(n int64) string { return strconv.FormatInt(n, 10) }

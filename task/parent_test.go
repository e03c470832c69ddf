package task

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/pagemap"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/api"
	"github.com/stasis-run/stasis/checkpoint/criu/img"
	"github.com/stasis-run/stasis/checkpoint/criu/img/imgtest"
	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/process/processtest"
)

// keep is a checkpoint in a folder that stays, as of containerd's clients with
// image_path. It returns the folder.
func (f *fixture) keep(name string, opts *options.CheckpointOptions) string {
	f.Helper()
	opts.ImagePath = filepath.Join(f.keys, name)
	must(f.T, f.dump("", opts))
	return opts.ImagePath
}

// builtOn tells whether the last dump builds on another.
func (f *fixture) builtOn() bool {
	dumps := f.rt.Dumps()
	return dumps[len(dumps)-1].ParentPath != ""
}

// TestParent builds a dump on its parent if the kernel's notes of what was written to
// begin there for certain. In all other cases the dump is full, and no error.
func TestParent(t *testing.T) {
	for name, tc := range map[string]struct {
		untracked bool                                  // by the kernel
		parent    func(t *testing.T, f *fixture) string // parent_path of the checkpoint "new"
		opts      func(opts *options.CheckpointOptions) // of "new"
		to        string                                // where it goes; "new" if empty
		want      bool                                  // it builds on the parent
	}{
		"last":     {parent: last, want: true},
		"relative": {parent: func(*testing.T, *fixture) string { return "../old" }, want: true},
		"by a link": {want: true, parent: func(t *testing.T, f *fixture) string {
			link := filepath.Join(t.TempDir(), "link")
			must(t, os.Symlink(last(t, f), link))
			return link
		}},
		"moved": {want: true, parent: func(t *testing.T, f *fixture) string {
			to := filepath.Join(t.TempDir(), "moved")
			must(t, os.Rename(last(t, f), to))
			return to
		}},
		"copied": {want: true, parent: func(t *testing.T, f *fixture) string {
			to := filepath.Join(t.TempDir(), "copied")
			must(t, os.CopyFS(to, os.DirFS(last(t, f))))
			return to
		}},
		"for a folder behind a link": {want: true, to: "link/new", parent: func(t *testing.T, f *fixture) string {
			must(t, os.MkdirAll(filepath.Join(f.keys, "x", "y"), 0o700))
			must(t, os.Symlink("x/y", filepath.Join(f.keys, "link")))
			return last(t, f)
		}},
		"of a paused container": {want: true, parent: func(t *testing.T, f *fixture) string {
			must(t, pauseOf(t.Context(), f))
			return last(t, f)
		}},
		"after one that was refused": {want: true, parent: func(t *testing.T, f *fixture) string {
			if err := f.dump("", &options.CheckpointOptions{ImagePath: filepath.Join(f.keys, "refused"), ParentPath: "/does/not/exist"}); !errdefs.IsNotFound(err) {
				t.Errorf("%v", err)
			}
			return last(t, f)
		}},
		"with exit": {parent: last, want: true, opts: func(opts *options.CheckpointOptions) { opts.Exit = true }},
		"a second time": {want: true, parent: func(t *testing.T, f *fixture) string {
			next := f.keep("next", &options.CheckpointOptions{ParentPath: last(t, f)})
			if !f.builtOn() {
				t.Error("the first time it is a full dump")
			}
			return next
		}},

		"none":                    {parent: func(*testing.T, *fixture) string { return "" }},
		"kernel without tracking": {untracked: true, parent: last},
		"not the last": {parent: func(t *testing.T, f *fixture) string {
			f.keep("later", &options.CheckpointOptions{})
			return last(t, f)
		}},
		"twice on one": {parent: func(t *testing.T, f *fixture) string {
			f.keep("next", &options.CheckpointOptions{ParentPath: last(t, f)})
			return last(t, f)
		}},
		"before one that did not track": {parent: func(t *testing.T, f *fixture) string {
			must(t, f.dump(filepath.Join(t.TempDir(), "temporary"), &options.CheckpointOptions{}))
			return last(t, f)
		}},
		// It may have reset the notes of some processes.
		"before one that failed": {parent: func(t *testing.T, f *fixture) string {
			f.rt.Before(processtest.Checkpoint, fails)
			if err := f.dump("", &options.CheckpointOptions{ImagePath: filepath.Join(f.keys, "failed"), ParentPath: last(t, f)}); err == nil {
				t.Error("no error")
			}
			f.rt.Before(processtest.Checkpoint, nil)
			return last(t, f)
		}},
		"before one of the shim's own service": {parent: func(t *testing.T, f *fixture) string {
			_, err := (checkpoints{f.s}).checkpoint(t.Context(), &api.CheckpointRequest{Id: "c", ImagePath: filepath.Join(t.TempDir(), "own")}, func(*api.CheckpointUpdate) error { return nil })
			must(t, err)
			return last(t, f)
		}},
		"of the shim's own service": {parent: func(t *testing.T, f *fixture) string {
			dir := filepath.Join(t.TempDir(), "own")
			_, err := (checkpoints{f.s}).checkpoint(t.Context(), &api.CheckpointRequest{Id: "c", ImagePath: dir}, func(*api.CheckpointUpdate) error { return nil })
			must(t, err)
			return dir
		}},
		"that did not track": {parent: func(t *testing.T, f *fixture) string {
			// As if the runtime had not passed on what CRIU is told.
			f.rt.Before(processtest.Checkpoint, func(context.Context) error { return os.Remove(f.criuConfig()) })
			dir := f.keep("untracked", &options.CheckpointOptions{})
			f.rt.Before(processtest.Checkpoint, nil)
			return dir
		}},
		"of other software": {parent: func(t *testing.T, f *fixture) string {
			return foreign(t)
		}},
		"of processes that have ended": {parent: func(t *testing.T, f *fixture) string {
			// A restore in place will do this.
			c, err := f.s.find("c")
			must(t, err)
			c.tracked.init = nil
			return last(t, f)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			f.softDirty = !tc.untracked
			f.run()
			f.keep("old", &options.CheckpointOptions{})
			opts := &options.CheckpointOptions{ParentPath: tc.parent(t, f)}
			if tc.opts != nil {
				tc.opts(opts)
			}
			dir := f.keep(cmp.Or(tc.to, "new"), opts)
			if got := f.builtOn(); got != tc.want {
				t.Errorf("it builds on the parent: %t", got)
			}
			ckpt, err := checkpoint.Open(t.Context(), dir)
			must(t, err)
			if slices.Contains(ckpt.Names(), layout.Parent) {
				t.Error("it needs its parent")
			}
			inv, err := ckpt.Inventory()
			must(t, err)
			// With exit there is nothing to track.
			if tracks := inv.DumpUptime != nil; tracks == tc.untracked {
				t.Errorf("CRIU tracks from then on: %t", tracks)
			}
		})
	}
}

// last is the checkpoint that TestParent has made.
func last(_ *testing.T, f *fixture) string { return filepath.Join(f.keys, "old") }

// foreign is a checkpoint that runc has made. Its memory is zeros.
func foreign(t *testing.T) (dir string) {
	t.Helper()
	if runtime.GOARCH != "amd64" {
		t.Skip("it was made on amd64")
	}
	dir = filepath.Join(t.TempDir(), "foreign")
	must(t, os.CopyFS(dir, os.DirFS("../checkpoint/testdata/runc-sleep")))
	must(t, os.Chmod(dir, 0o700))
	lists, err := filepath.Glob(filepath.Join(dir, layout.Pagemap.Glob()))
	must(t, err)
	for _, list := range lists {
		var id uint32
		var pages uint64
		must(t, img.EachIn(dir, filepath.Base(list), "PAGEMAP", img.Pagemap(&id, func(r img.PageRun) error {
			pages += r.Pages
			return nil
		})))
		must(t, os.WriteFile(filepath.Join(dir, layout.Pages.Name(id)), nil, 0o600))
		must(t, os.Truncate(filepath.Join(dir, layout.Pages.Name(id)), int64(pages)*int64(os.Getpagesize())))
	}
	return dir
}

// criuConfig is the file in which CRIU is told what the runtime has no flag for.
func (f *fixture) criuConfig() string {
	return filepath.Join(f.bundle, "work", "checkpoint", "criu.conf")
}

// TestTracked has CRIU track changes for checkpoints that can be a parent, only.
func TestTracked(t *testing.T) {
	for name, tc := range map[string]struct {
		dir  string
		opts *options.CheckpointOptions
		want bool
	}{
		"kept":                   {opts: &options.CheckpointOptions{ImagePath: "kept"}, want: true},
		"temporary":              {dir: "temporary", opts: &options.CheckpointOptions{}},
		"temporary, on a parent": {dir: "temporary", opts: &options.CheckpointOptions{ParentPath: "kept"}, want: true},
		"with exit":              {opts: &options.CheckpointOptions{ImagePath: "exit", Exit: true}},
	} {
		f := newFixture(t)
		f.softDirty = true
		f.run()
		f.keep("kept", &options.CheckpointOptions{})
		for _, path := range []*string{&tc.dir, &tc.opts.ImagePath, &tc.opts.ParentPath} {
			if *path != "" {
				*path = filepath.Join(f.keys, *path)
			}
		}
		var config []byte
		f.rt.Before(processtest.Checkpoint, func(context.Context) (err error) {
			config, err = os.ReadFile(f.criuConfig())
			return err
		})
		must(t, f.dump(tc.dir, tc.opts))
		if got := strings.Contains(string(config), "track-mem\n"); got != tc.want {
			t.Errorf("%s: CRIU is told %q", name, config)
		}
	}
}

// TestParentRefused: what parent_path names cannot be a parent. The container is not
// touched, and the next checkpoint builds on the last one as if nothing had been.
func TestParentRefused(t *testing.T) {
	f := newFixture(t)
	f.softDirty = true
	f.run()
	good := f.keep("good", &options.CheckpointOptions{})
	dir := t.TempDir()
	copied := func(name string) string {
		t.Helper()
		to := filepath.Join(dir, name)
		must(t, os.CopyFS(to, os.DirFS(good)))
		return to
	}
	changed := func(name string, change func(dir string) error) string {
		t.Helper()
		to := copied(name)
		must(t, change(to))
		return to
	}
	calls := f.rt.Calls()
	for name, tc := range map[string]struct {
		parent string
		says   string
		class  func(error) bool
	}{
		"missing":         {filepath.Join(dir, "nothing"), "no such folder", errdefs.IsNotFound},
		"missing, beside": {"../nothing", "no such folder", errdefs.IsNotFound},
		"around it":       {f.keys, "lie in each other", errdefs.IsInvalidArgument},
		"file":            {filepath.Join(good, layout.Manifest), "not a folder", errdefs.IsInvalidArgument},
		"empty": {changed("empty", func(dir string) error {
			return errors.Join(os.RemoveAll(dir), os.Mkdir(dir, 0o700))
		}), "no checkpoint", errdefs.IsInvalidArgument},
		"no inventory": {changed("no inventory", func(dir string) error {
			return os.Remove(filepath.Join(dir, layout.Inventory))
		}), "unfinished", errdefs.IsFailedPrecondition},
		"altered": {changed("altered", func(dir string) error {
			return os.WriteFile(filepath.Join(dir, layout.Inventory), make([]byte, len(processtest.Inventory)+2), 0o600)
		}), "altered", errdefs.IsInvalidArgument},
		"link in it": {changed("link", func(dir string) error {
			return os.Symlink(good, filepath.Join(dir, layout.Parent))
		}), "symbolic link", errdefs.IsInvalidArgument},
		"more in it": {changed("more", func(dir string) error {
			return os.WriteFile(filepath.Join(dir, layout.Pagemap.Name(1)), nil, 0o600)
		}), "added later", errdefs.IsInvalidArgument},
		"manifest": {changed("manifest", func(dir string) error {
			return os.WriteFile(filepath.Join(dir, layout.Manifest), []byte("{"), 0o600)
		}), "no valid JSON", errdefs.IsInvalidArgument},
		"another's folder": {changed("another's", func(dir string) error {
			return os.Chown(dir, 1, 1)
		}), "only root", errdefs.IsInvalidArgument},
		"folder open to others": {changed("open", func(dir string) error {
			return os.Chmod(dir, 0o770)
		}), "only root", errdefs.IsInvalidArgument},
		"another's file": {changed("file", func(dir string) error {
			return os.Chown(filepath.Join(dir, layout.Inventory), 1, 1)
		}), "only root", errdefs.IsInvalidArgument},
		"file open to others": {changed("open file", func(dir string) error {
			return os.Chmod(filepath.Join(dir, layout.Inventory), 0o666)
		}), "only root", errdefs.IsInvalidArgument},
		"another container's": {changed("other", func(dir string) error {
			manifest := filepath.Join(dir, layout.Manifest)
			data, err := os.ReadFile(manifest)
			if err != nil {
				return err
			}
			if err := os.Remove(filepath.Join(dir, layout.Signature)); err != nil && !os.IsNotExist(err) {
				return err
			}
			return os.WriteFile(manifest, bytes.Replace(data, []byte(`"id": "c"`), []byte(`"id": "d"`), 1), 0o600)
		}), `of container "d"`, errdefs.IsInvalidArgument},
	} {
		t.Run(name, func(t *testing.T) {
			opts := &options.CheckpointOptions{ImagePath: filepath.Join(f.keys, "new"), ParentPath: tc.parent}
			err := f.dump("", opts)
			if !tc.class(err) || !strings.Contains(err.Error(), "options: parent_path: ") || !strings.Contains(err.Error(), tc.says) {
				t.Errorf("%v; want %q", err, tc.says)
			}
			if _, err := os.Lstat(opts.ImagePath); !os.IsNotExist(err) {
				t.Errorf("the folder of the checkpoint: %v", err)
			}
		})
	}
	for name, opts := range map[string]*options.CheckpointOptions{
		"the same": {ImagePath: good, ParentPath: good},
		"in it":    {ImagePath: filepath.Join(good, "new"), ParentPath: good},
		"in it, by a link": {ImagePath: filepath.Join(good, "new"), ParentPath: func() string {
			link := filepath.Join(dir, "to good")
			must(t, os.Symlink(good, link))
			return link
		}()},
	} {
		if err := f.dump("", opts); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "lie in each other") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if !slices.Equal(f.rt.Calls(), calls) || f.frozen() {
		t.Errorf("calls %q, frozen: %t", f.rt.Calls(), f.frozen())
	}
	f.keep("new", &options.CheckpointOptions{ParentPath: good})
	if !f.builtOn() {
		t.Error("a full dump")
	}
}

// TestParentMerged: the checkpoint has the memory of its parent, and needs it no more,
// even if that is removed in the middle of the dump.
func TestParentMerged(t *testing.T) {
	for _, exit := range []bool{false, true} {
		f := newFixture(t)
		f.softDirty = true
		f.run()
		size := os.Getpagesize()
		page := func(b byte) []byte { return bytes.Repeat([]byte{b}, size) }
		// writes has CRIU write a list of pages, and the content of some.
		writes := func(name, from string, content []byte, entries ...*pagemap.PagemapEntry) {
			f.rt.Before(processtest.Checkpoint, func(context.Context) error {
				partial := filepath.Join(f.keys, name, layout.Partial)
				list := []proto.Message{&pagemap.PagemapHead{PagesId: proto.Uint32(1)}}
				for _, e := range entries {
					list = append(list, e)
				}
				must(t, os.WriteFile(filepath.Join(partial, layout.Pagemap.Name(1)), imgtest.Encode(t, "PAGEMAP", list...), 0o600))
				must(t, os.WriteFile(filepath.Join(partial, layout.Pages.Name(1)), content, 0o600))
				if from != "" {
					// As CRIU does.
					must(t, os.Symlink(layout.ParentLink, filepath.Join(partial, layout.Parent)))
				}
				return nil
			})
			f.rt.After(processtest.Checkpoint, func(context.Context) error {
				if from == "" {
					return nil
				}
				return os.RemoveAll(from)
			})
		}
		run := func(first, pages uint64, flags uint32) *pagemap.PagemapEntry {
			return &pagemap.PagemapEntry{Vaddr: proto.Uint64(first * uint64(size)), NrPages: &pages, CompatNrPages: proto.Uint32(0), Flags: &flags}
		}
		const inParent, present = 1, 4
		writes("old", "", slices.Concat(page(1), page(2), page(3)), run(10, 3, present))
		old := f.keep("old", &options.CheckpointOptions{})
		writes("new", old, page(9), run(10, 1, inParent), run(11, 1, present), run(12, 1, inParent))
		dir := f.keep("new", &options.CheckpointOptions{ParentPath: old, Exit: exit})
		ckpt, err := checkpoint.Open(t.Context(), dir)
		must(t, err)
		for _, name := range ckpt.Names() {
			if name == layout.Parent {
				t.Error("it has a link to its parent")
			}
		}
		ids, err := img.PageLists(dir)
		must(t, err)
		lists, err := img.OpenLists(dir)
		must(t, err)
		lists.Close()
		data, err := os.ReadFile(filepath.Join(dir, layout.Pages.Name(ids[layout.Pagemap.Name(1)])))
		must(t, err)
		if want := slices.Concat(page(1), page(9), page(3)); !bytes.Equal(data, want) {
			t.Errorf("exit %t: other memory", exit)
		}
	}
}

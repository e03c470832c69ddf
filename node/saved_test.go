package node

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"

	"github.com/stasis-run/stasis/checkpoint/layout"
)

// savedNode is a node without a containerd.
func savedNode(t *testing.T) (*Node, context.Context) {
	t.Helper()
	state := filepath.Join(t.TempDir(), "state")
	n := Dial(filepath.Join(t.TempDir(), "none.sock"), Options{State: state})
	return n, namespaces.WithNamespace(t.Context(), "ns")
}

// saving makes what a process that was killed while it saved c has left.
func saving(t *testing.T, n *Node, s Saved, files ...string) string {
	t.Helper()
	w, err := n.newWork()
	if err != nil {
		t.Fatal(err)
	}
	w.release()
	dir := filepath.Join(n.o.State, savingFolder, filepath.Base(w.dir))
	s.dir = dir
	if err := os.MkdirAll(s.images(), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		data, err := os.ReadFile(filepath.Join("../checkpoint/testdata/runc-sleep", f))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(s.images(), f), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.write(); err != nil {
		t.Fatal(err)
	}
	return dir
}

// testFiles are all files of a checkpoint in testdata.
func testFiles(t *testing.T) (names []string) {
	t.Helper()
	entries, err := os.ReadDir("../checkpoint/testdata/runc-sleep")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// TestRecover: a checkpoint that is whole gets its place; what is not is removed, unless
// it may be all that is left of a container.
func TestRecover(t *testing.T) {
	n, ctx := savedNode(t)
	whole := saving(t, n, Saved{Name: "whole", Container: "c", Namespace: "ns", Exit: true, Options: DumpOptions{OpenTCP: true}}, testFiles(t)...)
	evil := saving(t, n, Saved{Name: "../../x", Container: "c", Namespace: "ns"}, testFiles(t)...)
	broken := saving(t, n, Saved{Name: "broken", Container: "c", Namespace: "ns"}, layout.Inventory)
	reserved := filepath.Join(n.o.State, savedFolder, "ns", "c", "reserved")
	if err := os.MkdirAll(reserved, 0o700); err != nil {
		t.Fatal(err)
	}
	removed := saving(t, n, Saved{Name: "removed", Container: "c", Namespace: "ns"})
	if err := os.Rename(filepath.Join(removed, savedRecord), filepath.Join(removed, "x")); err != nil {
		t.Fatal(err)
	}
	if err := n.Recover(ctx); err == nil || !strings.Contains(err.Error(), evil) || !strings.Contains(err.Error(), broken) {
		t.Errorf("recover: %v; want errors about %s and %s", err, evil, broken)
	}
	for dir, kept := range map[string]bool{whole: false, evil: true, broken: true, removed: false, reserved: false} {
		if _, err := os.Lstat(dir); (err == nil) != kept {
			t.Errorf("%s: %v; want that it is there: %v", dir, err, kept)
		}
	}
	all, err := n.SavedCheckpoints(ctx, "c")
	if err != nil || len(all) != 1 || all[0].Name != "whole" || !all[0].Options.OpenTCP {
		t.Errorf("checkpoints %+v, %v", all, err)
	}
	if err := n.RemoveSaved(ctx, "c", "whole"); err != nil {
		t.Fatal(err)
	}
	if err := n.RemoveSaved(ctx, "c", "whole"); !errdefs.IsNotFound(err) {
		t.Errorf("remove it again: %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(n.o.State, savedFolder, "*", "*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// TestRecoverOfTheDead: what CRIU has written to the end, and was to end its container,
// is kept if it was not completed; and nobody waits for it.
func TestRecoverOfTheDead(t *testing.T) {
	n, ctx := savedNode(t)
	partial := func(name string, exit, written bool) string {
		dir := saving(t, n, Saved{Name: name, Container: "c", Namespace: "ns", Exit: exit})
		in := filepath.Join(dir, layout.Images, layout.Partial)
		must0(t, os.Mkdir(in, 0o700))
		if written {
			must0(t, os.WriteFile(filepath.Join(in, layout.Inventory), nil, 0o600))
		}
		return dir
	}
	dead, early, runs := partial("dead", true, true), partial("early", true, false), partial("runs", false, true)
	unread := saving(t, n, Saved{Name: "unread", Container: "c", Namespace: "ns"})
	must0(t, os.WriteFile(filepath.Join(unread, savedRecord), []byte("{"), 0o600))
	started := time.Now()
	if err := n.Recover(ctx); err == nil || !strings.Contains(err.Error(), dead) || !strings.Contains(err.Error(), unread) {
		t.Errorf("recover: %v; want errors about %s and %s", err, dead, unread)
	}
	if took := time.Since(started); took > 30*time.Second {
		t.Errorf("it waited %s for shims that are not there", took)
	}
	for dir, kept := range map[string]bool{dead: true, early: false, runs: false, unread: true} {
		if _, err := os.Lstat(dir); (err == nil) != kept {
			t.Errorf("%s: %v; want that it is there: %v", dir, err, kept)
		}
	}
}

// TestReserve: who starts a container waits for its removal, and not for another start.
func TestReserve(t *testing.T) {
	n, ctx := savedNode(t)
	removed, err := n.reserve(ctx, "c", false)
	must0(t, err)
	started := make(chan func(), 1)
	go func() {
		release, err := n.reserve(ctx, "c", true)
		if err != nil {
			t.Error(err)
		}
		started <- release
	}()
	ended, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := n.reserve(ended, "c", true); !errors.Is(err, context.Canceled) && !errdefs.IsAlreadyExists(err) {
		t.Errorf("with a context that has ended: %v", err)
	}
	if other, err := n.reserve(ctx, "d", true); err != nil {
		t.Error(err)
	} else {
		other()
	}
	removed()
	release := <-started
	for _, starts := range []bool{true, false} {
		if _, err := n.reserve(ctx, "c", starts); !errdefs.IsAlreadyExists(err) {
			t.Errorf("while it is started: %v", err)
		}
	}
	release()
	if len(n.reserved) > 0 {
		t.Errorf("left: %v", n.reserved)
	}
}

func TestSavedNames(t *testing.T) {
	n, ctx := savedNode(t)
	if err := os.MkdirAll(filepath.Join(n.o.State, "other"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"", "..", "a/b", "../../../other", "a\x00"} {
		if _, err := n.saved(ctx, "c", name); !errors.Is(err, ErrRequest) {
			t.Errorf("checkpoint %q: %v, want a wrong request", name, err)
		}
		if _, err := n.SavedCheckpoints(ctx, name); !errors.Is(err, ErrRequest) {
			t.Errorf("container %q: %v, want a wrong request", name, err)
		}
		if err := n.RemoveSaved(ctx, name, "x"); !errors.Is(err, ErrRequest) {
			t.Errorf("remove of container %q: %v, want a wrong request", name, err)
		}
		if _, err := n.Save(ctx, SaveRequest{Container: "c", Name: name}); !errors.Is(err, ErrRequest) {
			t.Errorf("save as %q: %v, want a wrong request", name, err)
		}
	}
}

func TestReadBundle(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "root"), 0o755); err != nil {
		t.Fatal(err)
	}
	for config, want := range map[string]string{
		`{`:                                     "config.json",
		`{"root":{"path":"root"},"linux":{}}`:   "process.args",
		`{"process":{"args":["x"]},"linux":{}}`: "root.path",
		`{"process":{"args":["x"]},"root":{"path":"root"}}`:                        "linux",
		`{"process":{"args":["x"]},"root":{"path":"none"},"linux":{}}`:             "no folder",
		`{"process":{"args":["x"]},"root":{"path":"config.json"},"linux":{}}`:      "no folder",
		strings.Repeat(" ", maxBundleConfig) + `{"process":{"args":["x"]}}`:        "larger",
		`{"process":{"args":["x"]},"root":{"path":"root"},"linux":{}}`:             "",
		`{"process":{"args":["x"]},"root":{"path":"` + dir + `/root"},"linux":{}}`: "",
	} {
		if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(config), 0o600); err != nil {
			t.Fatal(err)
		}
		spec, root, err := readBundle(dir)
		if want == "" {
			if err != nil || root != filepath.Join(dir, "root") || spec.Root.Path != "rootfs" {
				t.Errorf("%s: root %q, %v", config, root, err)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.80s: %v; want %q", config, err, want)
		}
	}
	if _, _, err := readBundle(filepath.Join(dir, "none")); !errdefs.IsNotFound(err) {
		t.Errorf("no bundle: %v", err)
	}
}

// TestSavedRecord: what is in it is read back by a later version of us.
func TestSavedRecord(t *testing.T) {
	s := Saved{Name: "n", Container: "c", Namespace: "ns", Time: time.Unix(1, 0).UTC(), Exit: true, Options: DumpOptions{OpenTCP: true, Terminal: true}, Frozen: time.Second, dir: t.TempDir()}
	if err := s.write(); err != nil {
		t.Fatal(err)
	}
	got, err := readSaved(s.dir)
	if err != nil || *got != s {
		t.Errorf("%+v, %v; want %+v", got, err, s)
	}
	data, _ := json.Marshal(s)
	if !strings.Contains(string(data), `"frozen_ns":1000000000`) {
		t.Errorf("%s", data)
	}
}

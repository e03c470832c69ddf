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

// TestRecoverOfTheDead: a dump that ended its container, or was about to, and was not
// completed, is not removed when nobody knows whether the container runs.
func TestRecoverOfTheDead(t *testing.T) {
	n, ctx := savedNode(t)
	dead := saving(t, n, Saved{Name: "x", Container: "c", Namespace: "ns", Exit: true})
	runs := saving(t, n, Saved{Name: "y", Container: "c", Namespace: "ns"})
	for _, dir := range []string{dead, runs} { // the shim gave it up
		if err := os.Remove(filepath.Join(dir, layout.Images)); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.Recover(ctx); err == nil || !strings.Contains(err.Error(), dead) {
		t.Errorf("recover: %v; want an error about %s", err, dead)
	}
	if _, err := os.Lstat(dead); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(runs); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s: %v; want that it is removed", runs, err)
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

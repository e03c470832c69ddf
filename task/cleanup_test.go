package task

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/containerd/api/types/runc/options"
	runc "github.com/containerd/go-runc"
)

// TestCleanup removes what a container leaves whose shim is gone, and tells how it has
// ended. The runtime is one that knows no container, as is the case in a restore.
func TestCleanup(t *testing.T) {
	f := newFixture(t)
	f.createRequest()
	b := bundle(f.bundle)
	// A runtime that cannot be run is not asked: it has no state.
	must(t, b.writeOptions(&options.Options{BinaryName: filepath.Join(f.bundle, "none"), Root: filepath.Join(f.bundle, "root"), CriuWorkPath: f.bundle}))
	temporary := filepath.Join(t.TempDir(), "ctrd-checkpoint42")
	other := filepath.Join(t.TempDir(), "somebody's")
	for _, dir := range []string{temporary, other, b.fetchedDir()} {
		must(t, os.MkdirAll(dir, 0o700))
	}
	must(t, os.WriteFile(b.path(restoreFrom), []byte(temporary), 0o600))
	// What CRIU has made so far is in the control group, frozen by a shim that is gone.
	child, err := testReaper().Launch(func() (int, error) { return f.rt.Create(t.Context(), &runc.CreateOpts{}) })
	must(t, err)
	must(t, f.rt.Pause(t.Context()))

	resp, err := Cleanup(t.Context(), "test", f.bundle, "c")
	must(t, err)
	if resp.ExitStatus != 128+9 || resp.Pid != 0 {
		t.Errorf("%v", resp)
	}
	<-child.Done()
	for _, dir := range []string{temporary, b.fetchedDir()} {
		wantNoFile(t, dir)
	}
	// The note is not believed if it names anything but a copy of containerd's.
	must(t, os.WriteFile(b.path(restoreFrom), []byte(other), 0o600))
	must(t, b.writeExit(7, 3, time.Unix(1, 0)))
	if resp, err = Cleanup(t.Context(), "test", f.bundle, "c"); err != nil || resp.Pid != 7 || resp.ExitStatus != 3 || resp.ExitedAt.AsTime() != time.Unix(1, 0).UTC() {
		t.Errorf("as it was recorded: %v, %v", resp, err)
	}
	if _, err := os.Lstat(other); err != nil {
		t.Error(err)
	}
}

// TestCleanupOfLittle: a bundle of which little is left is no reason to fail.
func TestCleanupOfLittle(t *testing.T) {
	testReaper()
	for name, options := range map[string]string{"nothing": "", "options that are none": "{", "a folder": "/"} {
		b := bundle(t.TempDir())
		switch options {
		case "":
		case "/":
			must(t, os.Mkdir(b.path("options.json"), 0o700))
		default:
			must(t, os.WriteFile(b.path("options.json"), []byte(options), 0o600))
		}
		resp, err := Cleanup(t.Context(), "test-without-containers", string(b), "c")
		if err != nil || resp.ExitStatus != 128+9 {
			t.Errorf("%s: %v, %v", name, resp, err)
		}
	}
}

// TestBundleOptions come back as they were written, in upstream's form.
func TestBundleOptions(t *testing.T) {
	b := bundle(t.TempDir())
	must(t, b.writeOptions(everyField))
	got, err := b.readOptions()
	must(t, err)
	want, _ := json.Marshal(everyField)
	if have, _ := json.Marshal(got); string(have) != string(want) {
		t.Errorf("%s, want %s", have, want)
	}
	if name, err := os.ReadFile(b.path("runtime")); err != nil || string(name) != "crun" {
		t.Errorf("runtime: %q, %v", name, err)
	}
	if dir := b.restoreDir(got); dir != "/work" {
		t.Errorf("CRIU's folder: %q", dir)
	}
	if dir := b.restoreDir(nil); dir != b.workDir() {
		t.Errorf("CRIU's folder: %q", dir)
	}
}

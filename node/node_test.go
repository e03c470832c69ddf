package node

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
)

func must0(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// That containerd is not there is said in a way that helps.
func TestConnectErrors(t *testing.T) {
	refused := filepath.Join(t.TempDir(), "refused.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: refused})
	must0(t, err)
	l.SetUnlinkOnClose(false)
	must0(t, l.Close())
	for address, part := range map[string]string{
		filepath.Join(t.TempDir(), "x"): "start it, or name its socket with --address",
		refused:                         "is it running?",
		"unix://" + refused:             "is it running?",
	} {
		n := Dial(address, Options{})
		if _, err := n.Client(t.Context()); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), part) {
			t.Errorf("%s: %v", address, err)
		}
	}
}

// newNode returns a node without containerd, and its state folder.
func newNode(t *testing.T) (n *Node, state string) {
	state = filepath.Join(t.TempDir(), "state")
	return Dial(filepath.Join(t.TempDir(), "none.sock"), Options{State: state}), state
}

func TestStateFolder(t *testing.T) {
	n, state := newNode(t)
	w, err := n.newWork()
	must0(t, err)
	if info, err := os.Stat(state); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", info, err)
	}
	must0(t, w.remove())
	must0(t, os.Chmod(state, 0o755))
	if _, err := n.newWork(); err == nil || !strings.Contains(err.Error(), "chmod 700") {
		t.Errorf("a folder that others can read: %v", err)
	}
}

// sleep is a folder of CRIU's images.
const sleep = "../checkpoint/testdata/runc-sleep"

// TestConcurrent has one node do several things at the same time, with what it would
// have to unpack.
func TestConcurrent(t *testing.T) {
	n, state := newNode(t)
	file := filepath.Join(t.TempDir(), "x.tar")
	must0(t, os.WriteFile(file, []byte("no archive"), 0o600))
	ctx := namespaces.WithNamespace(t.Context(), "ns")
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			if in, err := n.Inspect(ctx, InspectRequest{Checkpoint: sleep}); err != nil || len(in.Processes) != 1 {
				t.Errorf("inspect: %v", err)
			}
			if d, err := n.Diff(ctx, DiffRequest{First: sleep, Second: sleep}); err != nil || len(d.Processes) != 1 {
				t.Errorf("diff: %v", err)
			}
			if _, err := n.Inspect(ctx, InspectRequest{Checkpoint: file}); !errdefs.IsInvalidArgument(err) {
				t.Errorf("no archive: %v", err)
			}
			if r, err := n.Prune(ctx, PruneRequest{}); err != nil || len(r.Leftovers) > 0 {
				t.Errorf("prune: %+v, %v", r, err)
			}
			if _, err := n.List(ctx, ListRequest{}); !errdefs.IsUnavailable(err) {
				t.Errorf("list: %v", err)
			}
		})
	}
	group.Wait()
	if left, err := filepath.Glob(filepath.Join(state, "*", "*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %q, %v", left, err)
	}
	must0(t, n.Close())
}

// What is wrong with a request is told before anything is done.
func TestRequests(t *testing.T) {
	n, _ := newNode(t)
	archive := Output{Path: filepath.Join(t.TempDir(), "x.tar")}
	for says, r := range map[string]CheckpointRequest{
		"no container":                  {},
		"either containers or --pod":    {Containers: []string{"c"}, Pod: "p"},
		"not --format index":            {Containers: []string{"c"}, Format: FormatIndex, Archive: archive},
		"needs --output":                {Containers: []string{"c"}, Format: FormatArchive},
		"no format":                     {Containers: []string{"c"}, Format: "zip"},
		"no compression":                {Containers: []string{"c"}, Compression: "lz4"},
		"takes one container":           {Containers: []string{"c", "d"}, Archive: archive},
		"names of their own":            {Pod: "p", Ref: "x:1"},
		"REF UPPER:case":                {Containers: []string{"c"}, Ref: "UPPER:case"},
		"--link-remap needs --exit":     {Containers: []string{"c"}, Options: DumpOptions{LinkRemap: true}},
		"either --tcp-established":      {Containers: []string{"c"}, Options: DumpOptions{OpenTCP: true, TCPClose: true}},
		"--from takes one container":    {Pod: "p", From: "/x"},
		"it takes no options of a dump": {Containers: []string{"c"}, From: "/x", Exit: true},
		"--pre-dump 4294967297":         {Containers: []string{"c"}, PreDumps: 1<<32 + 1},
		"--pre-dump -2":                 {Containers: []string{"c"}, PreDumps: -2},
		"either --push or --output":     {Containers: []string{"c"}, Push: true, Archive: archive},
		"--push needs a REF":            {Containers: []string{"c"}, Push: true},
	} {
		if _, err := n.Checkpoint(t.Context(), r); !errors.Is(err, ErrRequest) || !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), says) {
			t.Errorf("%+v: %v, want %q", r, err, says)
		}
	}
	if _, err := n.Restore(t.Context(), RestoreRequest{Checkpoint: "x:1", Name: "no/name"}); !errors.Is(err, ErrRequest) {
		t.Errorf("restore: %v", err)
	}
	if _, err := n.Convert(t.Context(), ConvertRequest{Checkpoint: sleep, Ref: "UPPER:case"}); !errors.Is(err, ErrRequest) {
		t.Errorf("convert: %v", err)
	}
	if err := n.Export(t.Context(), ExportRequest{Checkpoint: sleep, Format: "zip"}); !errors.Is(err, ErrRequest) {
		t.Errorf("export: %v", err)
	}
}

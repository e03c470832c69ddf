package node

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/api"
	"github.com/stasis-run/stasis/checkpoint/contentstore"
	"github.com/stasis-run/stasis/checkpoint/oci"
)

// TestStartEarly starts the layer with the file that the shim tells of. It starts none
// if the shim tells of none, as one does that is older, or of what is no such file.
func TestStartEarly(t *testing.T) {
	const content = "the memory of a process"
	for about, tc := range map[string]struct {
		files  []*api.MemoryFile
		starts bool
	}{
		"told":           {[]*api.MemoryFile{{Path: "sub/pages-1.img", Size: uint64(len(content))}}, true},
		"told twice":     {[]*api.MemoryFile{{Path: "sub/pages-1.img", Size: uint64(len(content))}, {Path: "x", Size: 1}}, true},
		"an older shim":  {nil, false},
		"another size":   {[]*api.MemoryFile{{Path: "sub/pages-1.img", Size: uint64(len(content)) + 1}}, false},
		"no size":        {[]*api.MemoryFile{{Path: "sub/pages-1.img"}}, false},
		"an absurd size": {[]*api.MemoryFile{{Path: "sub/pages-1.img", Size: 1 << 63}}, false},
		"elsewhere":      {[]*api.MemoryFile{{Path: "../pages-1.img", Size: uint64(len(content))}}, false},
	} {
		t.Run(about, func(t *testing.T) {
			root, dir := t.TempDir(), t.TempDir()
			if tc.starts && !(cached(int64(len(content))) && hasRoom(root, int64(len(content)))) {
				t.Skip("the disk is busy or full, so nothing starts early")
			}
			store, err := local.NewStore(root)
			must0(t, err)
			c, err := client.New("", client.WithServices(client.WithContentStore(store)))
			must0(t, err)
			images := filepath.Join(dir, "images")
			must0(t, os.MkdirAll(filepath.Join(images, "sub"), 0o700))
			for _, file := range []string{filepath.Join(images, "sub", "pages-1.img"), filepath.Join(dir, "pages-1.img")} {
				must0(t, os.WriteFile(file, []byte(content), 0o600))
			}
			idle := make(chan bool, 2)
			d := &dumper{client: c, node: Dial("", Options{IdleCPUs: func() (undo func()) {
				idle <- true
				return func() { idle <- false }
			}})}
			e := d.startEarly(t.Context(), images, time.Now(), oci.Options{Compression: compression.Uncompressed, Folder: contentstore.At(root, "2.4.2"), Progress: func(string, int64, int64) {}})
			defer e.discard(t.Context())
			for _, file := range tc.files {
				e.hasFile(file)
			}
			if tc.starts {
				if !<-idle {
					t.Error("it is done before it has begun")
				}
			}
			e.hasEnded()
			<-e.done
			if tc.starts && <-idle {
				t.Error("it begins twice")
			}
			name, size, _ := e.layer.Started()
			if got := name == "pages-1.img" && size == int64(len(content)); got != tc.starts || !got && name != "" {
				t.Errorf("started with %q, %d bytes", name, size)
			}
		})
	}
}

// TestOpenMemory: what a shim tells of is opened only where it was asked to write to,
// and only if it is a file.
func TestOpenMemory(t *testing.T) {
	dir := t.TempDir()
	images := filepath.Join(dir, "images")
	must0(t, os.MkdirAll(filepath.Join(images, "sub"), 0o700))
	for _, file := range []string{filepath.Join(dir, "secret"), filepath.Join(images, "sub", "pages-1.img")} {
		must0(t, os.WriteFile(file, []byte("x"), 0o600))
	}
	must0(t, os.Symlink(filepath.Join(dir, "secret"), filepath.Join(images, "link")))
	must0(t, unix.Mkfifo(filepath.Join(images, "fifo"), 0o600))
	f, err := openMemory(images, &api.MemoryFile{Path: "sub/pages-1.img"})
	must0(t, err)
	defer f.Close()
	if got := filepath.Base(f.Name()); got != "pages-1.img" {
		t.Errorf("it is called %s", got)
	}
	for _, path := range []string{"", ".", "sub", "none", "link", "fifo", "../secret", "sub/../../secret", filepath.Join(dir, "secret"), filepath.Join(images, "sub", "pages-1.img")} {
		if f, err := openMemory(images, &api.MemoryFile{Path: path}); err == nil {
			t.Errorf("%q: opened %s", path, f.Name())
		}
	}
}

// TestGrowing reads a file while it is written, as CRIU does.
func TestGrowing(t *testing.T) {
	e := &earlyLayer{dumped: make(chan struct{})}
	w, err := os.Create(filepath.Join(t.TempDir(), "pages-2.img"))
	must0(t, err)
	defer w.Close()
	_, err = io.WriteString(w, "0123456789a")
	must0(t, err)
	f, err := os.Open(w.Name())
	must0(t, err)
	defer f.Close()
	read := make(chan string)
	started := make(chan struct{})
	go func() {
		r := &growing{f, 14, e}
		head := make([]byte, 11)
		if _, err := io.ReadFull(r, head); err != nil {
			t.Error(err)
		}
		close(started)
		rest, err := io.ReadAll(r)
		if err != nil {
			t.Error(err)
		}
		read <- string(head) + string(rest)
	}()
	<-started
	_, err = io.WriteString(w, "bc")
	must0(t, err)
	select {
	case got := <-read:
		t.Errorf("ended with %q before CRIU has", got)
	case <-time.After(10 * pause):
	}
	_, err = io.WriteString(w, "d")
	must0(t, err)
	close(e.dumped)
	if got := <-read; got != "0123456789abcd" {
		t.Errorf("read %q", got)
	}
	if n, err := (&growing{f, 15, e}).Read(make([]byte, 1)); n != 0 || !errors.Is(err, errSize) {
		t.Errorf("another size: %d, %v", n, err)
	}
}

func TestDirtyRoom(t *testing.T) {
	const vmstat = "nr_free_pages 100\nnr_dirty 5\nnr_writeback 2\nnr_writeback_temp 50\nnr_dirty_threshold 40\nnr_dirty_background_threshold 20\n"
	if got, want := dirtyRoom(vmstat), int64(23*os.Getpagesize()); got != want {
		t.Errorf("%d, want %d", got, want)
	}
	if got := dirtyRoom(""); got != 0 {
		t.Errorf("nothing known: %d", got)
	}
}

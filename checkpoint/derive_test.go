package checkpoint

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/inventory"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pagemap"
	inet "github.com/checkpoint-restore/go-criu/v8/crit/images/sk-inet"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/tty"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	"github.com/stasis-run/stasis/checkpoint/criu/img/imgtest"
	"github.com/stasis-run/stasis/checkpoint/layout"
)

// Flags of pagemap entries, CRIU's include/pagemap.h.
const (
	pagesParent  = 1 << 0
	pagesLazy    = 1 << 1
	pagesPresent = 1 << 2
)

// States of sockets, Linux's include/net/tcp_states.h.
const (
	tcpClose  = 7
	tcpListen = 10
)

// Every image that is cut short is noticed, by its name, except for those whose
// length only CRIU can know.
func TestTruncatedImages(t *testing.T) {
	for _, name := range []string{"runc-sleep", "runc-tcp", "runc-terminal"} {
		entries, err := os.ReadDir(realFolder(t, name))
		must(t, err)
		for _, e := range entries {
			if !layout.IsImage(e.Name()) || layout.Tmpfs.Has(e.Name()) || layout.PipesData.Has(e.Name()) || layout.TCPStream.Has(e.Name()) {
				continue
			}
			dir := realFolder(t, name)
			path := filepath.Join(dir, e.Name())
			info, err := os.Stat(path)
			must(t, err)
			for _, size := range []int64{info.Size() - 1, 6, 0} {
				must(t, os.Truncate(path, size))
				_, err := Open(t.Context(), dir)
				if err == nil {
					t.Errorf("%s/%s: opened with %d bytes of %d", name, e.Name(), size, info.Size())
					continue
				}
				wantError(t, err, errdefs.ErrInvalidArgument, e.Name())
			}
		}
	}
}

func TestDeriveRefuses(t *testing.T) {
	pages := func(entries ...proto.Message) []byte {
		return imgtest.Encode(t, "PAGEMAP", append([]proto.Message{&pagemap.PagemapHead{PagesId: proto.Uint32(1)}}, entries...)...)
	}
	for _, tc := range []struct {
		name, file string
		data       []byte // nil removes the file
		kind       error
		part       string
	}{
		{"no tree", layout.ProcessTree, nil, errdefs.ErrInvalidArgument, "pstree.img: missing"},
		{"empty tree", layout.ProcessTree, imgtest.Encode(t, "PSTREE"), errdefs.ErrInvalidArgument, "lists no process"},
		{"no core", "core-1.img", nil, errdefs.ErrInvalidArgument, "core-1.img: missing"},
		{"no core of a thread", "core-6.img", nil, errdefs.ErrInvalidArgument, "core-6.img: missing"},
		{"no memory map", "mm-8.img", nil, errdefs.ErrInvalidArgument, "mm-8.img: missing"},
		{"no page map", "pagemap-1.img", nil, errdefs.ErrInvalidArgument, "pagemap-1.img: missing"},
		{"no pages", "pages-2.img", nil, errdefs.ErrInvalidArgument, "pages-2.img: missing; pagemap-8.img"},
		{"no files", layout.Files, nil, errdefs.ErrInvalidArgument, "files.img: missing"},
		{"wrong kind", layout.ProcessTree, imgtest.Encode(t, "FILES"), errdefs.ErrInvalidArgument, "pstree.img: is no image of kind PSTREE"},
		{"format", layout.Inventory, imgtest.Encode(t, "INVENTORY", &inventory.InventoryEntry{ImgVersion: proto.Uint32(7)}),
			errdefs.ErrInvalidArgument, "image version 7"},
		{"huge message", "core-1.img", append(imgtest.Encode(t, "CORE"), 0xff, 0xff, 0xff, 0xff), errdefs.ErrInvalidArgument, "truncated"},
		{"pre-dump", "pagemap-1.img", pages(&pagemap.PagemapEntry{NrPages: proto.Uint64(1), Flags: proto.Uint32(pagesParent)}),
			errdefs.ErrInvalidArgument, "older checkpoint"},
		{"lazy", "pagemap-1.img", pages(&pagemap.PagemapEntry{NrPages: proto.Uint64(1), Flags: proto.Uint32(pagesLazy)}),
			errdefs.ErrInvalidArgument, "lazy pages"},
		{"too much", "pagemap-1.img", pages(&pagemap.PagemapEntry{NrPages: proto.Uint64(1 << 60), Flags: proto.Uint32(pagesPresent)}),
			errdefs.ErrInvalidArgument, "more memory"},
		{"no part", "spec.dump", []byte("{}"), errdefs.ErrInvalidArgument, "spec.dump"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := realFolder(t, "runc-tcp")
			path := filepath.Join(dir, tc.file)
			if tc.data == nil {
				must(t, os.Remove(path))
			} else {
				write(t, path, tc.data)
			}
			_, err := Open(t.Context(), dir)
			if err == nil {
				t.Fatal("opened")
			}
			wantError(t, err, tc.kind, tc.part)
		})
	}
}

func TestDerivedOptions(t *testing.T) {
	tcp := func(state uint32, words ...uint32) *fdinfo.FileEntry {
		return &fdinfo.FileEntry{Isk: &inet.InetSkEntry{Proto: proto.Uint32(6), State: proto.Uint32(state), SrcAddr: words}}
	}
	terminal := func(sid uint32) []byte {
		return imgtest.Encode(t, "TTY_INFO", &tty.TtyInfoEntry{Id: proto.Uint32(0), Sid: proto.Uint32(sid)})
	}
	closing := imgtest.Encode(t, "INVENTORY", &inventory.InventoryEntry{ImgVersion: proto.Uint32(2), TcpClose: proto.Bool(true)})
	for _, tc := range []struct {
		name, file string
		data       []byte
		want       Options
	}{
		{"nothing", layout.Files, imgtest.Encode(t, "FILES"), Options{}},
		{"listening", layout.Files, imgtest.Encode(t, "FILES", tcp(tcpListen, 0)), Options{}},
		{"closed", layout.Files, imgtest.Encode(t, "FILES", tcp(tcpClose, 0)), Options{}},
		{"connecting", layout.Files, imgtest.Encode(t, "FILES", tcp(2, 0)), Options{OpenTCP: true}},
		{"UDP", layout.Files, imgtest.Encode(t, "FILES", &fdinfo.FileEntry{Isk: &inet.InetSkEntry{Proto: proto.Uint32(17), State: proto.Uint32(1)}}), Options{}},
		{"dumped with tcp-close", layout.Inventory, closing, Options{}},
		{"no lock", layout.FileLocks, imgtest.Encode(t, "FILE_LOCKS"), Options{}},
		{"own terminal", layout.Terminals, terminal(1), Options{}},
		{"no session", layout.Terminals, terminal(0), Options{}},
		{"foreign terminal", layout.Terminals, terminal(4711), Options{Terminal: true}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := realFolder(t, "runc-sleep")
			write(t, filepath.Join(dir, tc.file), tc.data)
			ckpt, err := Open(t.Context(), dir)
			must(t, err)
			if got := ckpt.Options(); !equalOptions(got, tc.want) {
				t.Errorf("options %+v, want %+v", got, tc.want)
			}
		})
	}
}

// An image of another architecture is recognised without a manifest.
func TestOtherArchitecture(t *testing.T) {
	dir := realFolder(t, "runc-sleep")
	path := filepath.Join(dir, "core-1.img")
	data, err := os.ReadFile(path)
	must(t, err)
	// The first field of the message, after two magic numbers and the length.
	if data[12] != 1<<3 || data[13] != 1 {
		t.Fatalf("core-1.img begins with % x", data[:16])
	}
	data[13] = 3 // AARCH64
	write(t, path, data)
	_, err = Open(t.Context(), dir)
	wantError(t, err, errdefs.ErrFailedPrecondition, "made on arm64, this host is amd64")
}

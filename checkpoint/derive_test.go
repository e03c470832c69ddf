package checkpoint

import (
	"encoding/binary"
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

	"github.com/stasis-run/stasis/checkpoint/layout"
)

// image builds an image of messages.
func image(t testing.TB, kind string, msgs ...proto.Message) []byte {
	t.Helper()
	var out []byte
	if kind != "INVENTORY" {
		out = binary.LittleEndian.AppendUint32(out, uint32(magics().ByName["IMG_COMMON"]))
	}
	out = binary.LittleEndian.AppendUint32(out, uint32(magics().ByName[kind]))
	for _, m := range msgs {
		msg, err := proto.MarshalOptions{AllowPartial: true}.Marshal(m)
		must(t, err)
		out = binary.LittleEndian.AppendUint32(out, uint32(len(msg)))
		out = append(out, msg...)
	}
	return out
}

// Every image that is cut short is noticed, by its name, except for those whose
// length only CRIU can know.
func TestTruncatedImages(t *testing.T) {
	for _, name := range []string{"runc-sleep", "runc-tcp", "runc-terminal"} {
		entries, err := os.ReadDir(realFolder(t, name))
		must(t, err)
		for _, e := range entries {
			if !layout.IsImage(e.Name()) || isOf(e.Name(), []layout.Series{layout.Tmpfs, layout.PipesData, layout.TCPStream}) {
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
		return image(t, "PAGEMAP", append([]proto.Message{&pagemap.PagemapHead{PagesId: proto.Uint32(1)}}, entries...)...)
	}
	for _, tc := range []struct {
		name, file string
		data       []byte // nil removes the file
		kind       error
		part       string
	}{
		{"no tree", layout.ProcessTree, nil, errdefs.ErrInvalidArgument, "pstree.img: missing"},
		{"empty tree", layout.ProcessTree, image(t, "PSTREE"), errdefs.ErrInvalidArgument, "lists no process"},
		{"no core", "core-1.img", nil, errdefs.ErrInvalidArgument, "core-1.img: missing"},
		{"no core of a thread", "core-6.img", nil, errdefs.ErrInvalidArgument, "core-6.img: missing"},
		{"no memory map", "mm-8.img", nil, errdefs.ErrInvalidArgument, "mm-8.img: missing"},
		{"no page map", "pagemap-1.img", nil, errdefs.ErrInvalidArgument, "pagemap-1.img: missing"},
		{"no pages", "pages-2.img", nil, errdefs.ErrInvalidArgument, "pages-2.img: missing; pagemap-8.img"},
		{"no files", layout.Files, nil, errdefs.ErrInvalidArgument, "files.img: missing"},
		{"wrong kind", layout.ProcessTree, image(t, "FILES"), errdefs.ErrInvalidArgument, "pstree.img: is no image of kind PSTREE"},
		{"format", layout.Inventory, image(t, "INVENTORY", &inventory.InventoryEntry{ImgVersion: proto.Uint32(7)}),
			errdefs.ErrInvalidArgument, "image version 7"},
		{"huge message", "core-1.img", append(image(t, "CORE"), 0xff, 0xff, 0xff, 0xff), errdefs.ErrInvalidArgument, "truncated"},
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

func TestPagemapOfAllVersions(t *testing.T) {
	dir := t.TempDir()
	head := &pagemap.PagemapHead{PagesId: proto.Uint32(3)}
	data := image(t, "PAGEMAP", head,
		&pagemap.PagemapEntry{CompatNrPages: proto.Uint32(5)}, // before 2.9
		&pagemap.PagemapEntry{CompatNrPages: proto.Uint32(7), Flags: proto.Uint32(pagesPresent)},
		&pagemap.PagemapEntry{CompatNrPages: proto.Uint32(0), NrPages: proto.Uint64(11), Flags: proto.Uint32(pagesPresent | pagesLazy)},
		&pagemap.PagemapEntry{NrPages: proto.Uint64(13), Flags: proto.Uint32(0)}) // a hole
	write(t, filepath.Join(dir, "pagemap-1.img"), data)
	im := images{dir: dir}
	id, pages, err := im.pagemap("pagemap-1.img")
	if err != nil || id != 3 || pages != 23 {
		t.Errorf("pages-%d.img, %d pages, %v; want pages-3.img, 23", id, pages, err)
	}
	// A field of a future CRIU may change what a page takes.
	future := &pagemap.PagemapEntry{NrPages: proto.Uint64(11), Flags: proto.Uint32(pagesPresent)}
	future.ProtoReflect().SetUnknown([]byte{6 << 3, 1})
	write(t, filepath.Join(dir, "pagemap-1.img"), image(t, "PAGEMAP", head, future))
	if _, pages, err = im.pagemap("pagemap-1.img"); err != nil || pages != 0 {
		t.Errorf("%d pages, %v; want none that are known", pages, err)
	}
}

func TestDerivedOptions(t *testing.T) {
	tcp := func(state uint32, words ...uint32) *fdinfo.FileEntry {
		return &fdinfo.FileEntry{Isk: &inet.InetSkEntry{Proto: proto.Uint32(6), State: proto.Uint32(state), SrcAddr: words}}
	}
	terminal := func(sid uint32) []byte {
		return image(t, "TTY_INFO", &tty.TtyInfoEntry{Id: proto.Uint32(0), Sid: proto.Uint32(sid)})
	}
	closing := image(t, "INVENTORY", &inventory.InventoryEntry{ImgVersion: proto.Uint32(2), TcpClose: proto.Bool(true)})
	for _, tc := range []struct {
		name, file string
		data       []byte
		want       Options
	}{
		{"nothing", layout.Files, image(t, "FILES"), Options{}},
		{"listening", layout.Files, image(t, "FILES", tcp(tcpListen, 0)), Options{}},
		{"closed", layout.Files, image(t, "FILES", tcp(tcpClose, 0)), Options{}},
		{"connecting", layout.Files, image(t, "FILES", tcp(2, 0)), Options{OpenTCP: true}},
		{"UDP", layout.Files, image(t, "FILES", &fdinfo.FileEntry{Isk: &inet.InetSkEntry{Proto: proto.Uint32(17), State: proto.Uint32(1)}}), Options{}},
		{"dumped with tcp-close", layout.Inventory, closing, Options{}},
		{"no lock", layout.FileLocks, image(t, "FILE_LOCKS"), Options{}},
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

func TestLocalAddress(t *testing.T) {
	sk := func(b ...byte) *inet.InetSkEntry {
		var words []uint32
		for ; len(b) >= 4; b = b[4:] {
			words = append(words, binary.NativeEndian.Uint32(b))
		}
		return &inet.InetSkEntry{SrcAddr: words}
	}
	for _, tc := range []struct {
		sk   *inet.InetSkEntry
		want string
	}{
		{sk(10, 1, 2, 3), "10.1.2.3"},
		{sk(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 1, 2, 3), "10.1.2.3"},
		{sk(0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9), "fd00::9"},
		{sk(), ""},
		{sk(1, 2, 3, 4, 5, 6, 7, 8), ""},
	} {
		got, err := localAddress(tc.sk)
		if (err != nil) != (tc.want == "") || err == nil && got.String() != tc.want {
			t.Errorf("%v: %v, %v; want %s", tc.sk.SrcAddr, got, err, tc.want)
		}
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

func TestSkipInFlight(t *testing.T) {
	for version, want := range map[string]int{"": 0, "1.1.5+ds1": 0, "1.2.6": 0, "1.3.0": 1, "1.5.2": 1, "2.0.0-rc.1": 1} {
		if got := skipInFlight("runc", version); len(got) != want {
			t.Errorf("runc %q: %q", version, got)
		}
	}
	if got := skipInFlight("crun", "1.21"); got != nil {
		t.Errorf("crun: %q", got)
	}
}

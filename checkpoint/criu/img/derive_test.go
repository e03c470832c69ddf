package img

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/pagemap"
	inet "github.com/checkpoint-restore/go-criu/v8/crit/images/sk-inet"
	"google.golang.org/protobuf/proto"

	"github.com/stasis-run/stasis/checkpoint/criu/img/imgtest"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestPagemapOfAllVersions(t *testing.T) {
	dir := t.TempDir()
	head := &pagemap.PagemapHead{PagesId: proto.Uint32(3)}
	data := imgtest.Encode(t, "PAGEMAP", head,
		&pagemap.PagemapEntry{CompatNrPages: proto.Uint32(5)}, // before 2.9
		&pagemap.PagemapEntry{CompatNrPages: proto.Uint32(7), Flags: proto.Uint32(pagesPresent)},
		&pagemap.PagemapEntry{CompatNrPages: proto.Uint32(0), NrPages: proto.Uint64(11), Flags: proto.Uint32(pagesPresent | pagesLazy)},
		&pagemap.PagemapEntry{NrPages: proto.Uint64(13), Flags: proto.Uint32(0)}) // a hole
	must(t, os.WriteFile(filepath.Join(dir, "pagemap-1.img"), data, 0o600))
	im := Set{Dir: dir}
	id, pages, err := im.pagemap("pagemap-1.img")
	if err != nil || id != 3 || pages != 23 {
		t.Errorf("pages-%d.img, %d pages, %v; want pages-3.img, 23", id, pages, err)
	}
	// A field of a future CRIU may change what a page takes.
	future := &pagemap.PagemapEntry{NrPages: proto.Uint64(11), Flags: proto.Uint32(pagesPresent)}
	future.ProtoReflect().SetUnknown([]byte{6 << 3, 1})
	must(t, os.WriteFile(filepath.Join(dir, "pagemap-1.img"), imgtest.Encode(t, "PAGEMAP", head, future), 0o600))
	if _, pages, err = im.pagemap("pagemap-1.img"); err != nil || pages != 0 {
		t.Errorf("%d pages, %v; want none that are known", pages, err)
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

package img

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/pagemap"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	"github.com/stasis-run/stasis/checkpoint/criu/img/imgtest"
	"github.com/stasis-run/stasis/checkpoint/layout"
)

// memory is what a process has: the content of pages by their number.
type memory map[uint64][]byte

// writePages makes the images of a dump: of the pages in dirty there is the content,
// the others are in the parent. A page of nil is a hole.
func writePages(t *testing.T, dir, name string, id uint32, m memory, dirty func(uint64) bool) {
	t.Helper()
	size := uint64(os.Getpagesize())
	list := []proto.Message{&pagemap.PagemapHead{PagesId: &id}}
	var pages bytes.Buffer
	var last *pagemap.PagemapEntry
	for _, n := range sortedPages(m) {
		flags := uint32(pagesParent)
		switch {
		case m[n] == nil:
			flags = 0
		case dirty(n):
			flags = pagesPresent | pagesLazy
			pages.Write(m[n])
		}
		if last == nil || last.GetFlags() != flags || last.GetVaddr()+last.GetNrPages()*size != n*size {
			last = &pagemap.PagemapEntry{Vaddr: proto.Uint64(n * size), NrPages: proto.Uint64(0), CompatNrPages: proto.Uint32(0), Flags: &flags}
			list = append(list, last)
		}
		*last.NrPages++
	}
	must(t, os.MkdirAll(dir, 0o700))
	must(t, os.WriteFile(filepath.Join(dir, name), imgtest.Encode(t, "PAGEMAP", list...), 0o600))
	if pages.Len() > 0 {
		must(t, os.WriteFile(filepath.Join(dir, layout.Pages.Name(id)), pages.Bytes(), 0o600))
	}
}

func sortedPages(m memory) (numbers []uint64) {
	for n := range m {
		numbers = append(numbers, n)
	}
	slices.Sort(numbers)
	return numbers
}

// readPages reads what writePages writes, and fails if a page is in a parent.
func readPages(t *testing.T, dir, name string) memory {
	t.Helper()
	l, err := openPageList(dir, name)
	must(t, err)
	defer l.close()
	size := uint64(os.Getpagesize())
	m := memory{}
	at := int64(0)
	for _, r := range l.runs {
		if r.InParent() {
			t.Errorf("%s: %d pages at %x are in a parent", name, r.Pages, r.Addr)
		}
		for i := range r.Pages {
			n := r.Addr/size + i
			m[n] = nil
			if r.Present() {
				m[n] = make([]byte, size)
				_, err := l.pages.ReadAt(m[n], at)
				must(t, err)
				at += int64(size)
			}
		}
	}
	if l.pages != nil {
		info, err := l.pages.Stat()
		must(t, err)
		if info.Size() != at {
			t.Errorf("%s has %d bytes, its list needs %d", info.Name(), info.Size(), at)
		}
	}
	return m
}

// TestFlatten makes chains of random dumps: pages are written to, unmapped, mapped
// anew between them; processes begin between them too. With odd seeds the first is a base.
func TestFlatten(t *testing.T) {
	for seed := range uint64(60) {
		r := rand.New(rand.NewPCG(seed, 7))
		page := func() []byte {
			b := make([]byte, os.Getpagesize())
			for i := range b[:16] {
				b[i] = byte(r.Uint32())
			}
			return b
		}
		dir := t.TempDir()
		var chain []string
		rounds := 1 + r.IntN(4)
		names := []string{"pagemap-1.img", "pagemap-7.img", "pagemap-shmem-9.img"}
		now := map[string]memory{}
		for round := range rounds + 1 {
			at := filepath.Join(dir, "final")
			if round < rounds {
				at = filepath.Join(dir, fmt.Sprint(round))
				chain = append(chain, at)
			}
			must(t, os.MkdirAll(at, 0o700))
			for i, name := range names {
				before, old := now[name]
				if !old && i > 0 && round == 0 && r.IntN(2) == 0 {
					continue // begins later
				}
				next, dirty := memory{}, map[uint64]bool{}
				for n := uint64(16); n < 200; n++ {
					was, there := before[n]
					switch k := r.IntN(10); {
					case k == 0: // unmapped
					case there && k < 8:
						next[n] = was
					case k == 8:
						next[n] = nil
					case k == 9 || !old:
						next[n], dirty[n] = page(), true
					}
				}
				now[name] = next
				writePages(t, at, name, uint32(i+1), next, func(n uint64) bool { return dirty[n] })
			}
		}
		final := filepath.Join(dir, "final")
		must(t, os.Symlink("../"+filepath.Base(chain[len(chain)-1]), filepath.Join(final, layout.Parent)))
		var base *Lists
		if seed%2 == 1 {
			var err error
			base, err = OpenLists(chain[0])
			must(t, err)
			must(t, os.RemoveAll(chain[0])) // it is held open
			chain = chain[1:]
		}
		must(t, Flatten(final, base, chain))
		if base != nil {
			base.Close()
		}
		for _, name := range names {
			if now[name] == nil {
				continue
			}
			got := readPages(t, final, name)
			if !slices.Equal(sortedPages(got), sortedPages(now[name])) {
				t.Fatalf("seed %d: %s: other pages than before", seed, name)
			}
			for n, want := range now[name] {
				if !bytes.Equal(got[n], want) {
					t.Fatalf("seed %d: %s: page %d is another", seed, name, n)
				}
			}
		}
		entries, err := os.ReadDir(final)
		must(t, err)
		for _, e := range entries {
			if !e.Type().IsRegular() || filepath.Ext(e.Name()) != ".img" {
				t.Errorf("seed %d: %s is left", seed, e.Name())
			}
		}
	}
}

// TestOpenLists refuses a base that needs a parent itself.
func TestOpenLists(t *testing.T) {
	dir := t.TempDir()
	page := make([]byte, os.Getpagesize())
	writePages(t, dir, "pagemap-1.img", 1, memory{1: page}, func(uint64) bool { return true })
	lists, err := OpenLists(dir)
	must(t, err)
	if lists.Dir() != dir {
		t.Errorf("of %s", lists.Dir())
	}
	lists.Close()
	writePages(t, dir, "pagemap-2.img", 2, memory{1: page, 2: page}, func(n uint64) bool { return n == 1 })
	if _, err := OpenLists(dir); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "pagemap-2.img") {
		t.Errorf("%v", err)
	}
}

// TestFlattenFails leaves a dump as it was if a parent has not what it needs.
func TestFlattenFails(t *testing.T) {
	page := make([]byte, os.Getpagesize())
	all := func(uint64) bool { return true }
	for name, spoil := range map[string]func(t *testing.T, pre string){
		"no list":  func(t *testing.T, pre string) { must(t, os.Remove(filepath.Join(pre, "pagemap-1.img"))) },
		"no pages": func(t *testing.T, pre string) { must(t, os.Remove(filepath.Join(pre, "pages-1.img"))) },
		"truncated": func(t *testing.T, pre string) {
			must(t, os.Truncate(filepath.Join(pre, "pages-1.img"), int64(len(page))+1))
		},
		"a page less": func(t *testing.T, pre string) {
			writePages(t, pre, "pagemap-1.img", 1, memory{1: page}, all)
		},
		"a hole": func(t *testing.T, pre string) {
			writePages(t, pre, "pagemap-1.img", 1, memory{1: page, 2: nil}, all)
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			pre, final := filepath.Join(dir, "pre"), filepath.Join(dir, "final")
			m := memory{1: page, 2: page, 3: page}
			writePages(t, pre, "pagemap-1.img", 1, memory{1: page, 2: page}, all)
			writePages(t, final, "pagemap-1.img", 1, m, func(n uint64) bool { return n == 3 })
			spoil(t, pre)
			list, err := os.ReadFile(filepath.Join(final, "pagemap-1.img"))
			must(t, err)
			if err := Flatten(final, nil, []string{pre}); err == nil {
				t.Fatal("no error")
			}
			after, err := os.ReadFile(filepath.Join(final, "pagemap-1.img"))
			must(t, err)
			left, err := filepath.Glob(filepath.Join(final, "*"))
			must(t, err)
			if !bytes.Equal(list, after) || len(left) != 2 {
				t.Errorf("the dump is another: %v", left)
			}
		})
	}
}

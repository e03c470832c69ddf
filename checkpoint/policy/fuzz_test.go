package policy

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// Whatever one of a checkpoint's images holds, Check neither panics nor hangs, and
// what it says is one line of a class that callers know.
func FuzzCheck(f *testing.F) {
	good := newForgery(f)
	entries, err := os.ReadDir(good.dir)
	must(f, err)
	var names []string
	for _, e := range entries {
		if name := e.Name(); !strings.HasPrefix(name, "pages-") {
			names = append(names, name)
		}
	}
	names = append(names, "userns-7.img", "netdev-10.img", "nftables-10.img", "remap-fpath.img", "ghost-file-1.img", "tty-info.img", "memfd.img")
	slices.Sort(names)
	for i, name := range names {
		data, err := os.ReadFile(filepath.Join(good.dir, name))
		if err == nil {
			f.Add(uint8(i), data)
		}
	}
	f.Fuzz(func(t *testing.T, target uint8, data []byte) {
		name := names[int(target)%len(names)]
		path := filepath.Join(good.dir, name)
		before, err := os.ReadFile(path)
		good.t = t
		good.raw(name, data)
		defer func() {
			if err == nil {
				must(t, os.WriteFile(path, before, 0o600))
			} else {
				must(t, os.Remove(path))
			}
		}()
		got := good.check()
		if got == nil {
			return
		}
		if !errdefs.IsPermissionDenied(got) && !errdefs.IsInvalidArgument(got) && !errdefs.IsFailedPrecondition(got) {
			t.Fatalf("%v: of no class", got)
		}
		if text := got.Error(); len(text) > 16<<10 || strings.ContainsAny(text, "\n\r\x00\x1b") {
			t.Fatalf("%q", text)
		}
	})
}

package integration

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/integration/stack"
)

// hostileEntry is a file of a tar: data, and then so many bytes of fill.
type hostileEntry struct {
	name, data, fill string
	times            int
}

// writeHostile writes a compressed tar, which is small, whatever is in it.
func writeHostile(t *testing.T, path string, entries ...hostileEntry) {
	t.Helper()
	f, err := os.Create(path)
	must(t, err)
	defer f.Close()
	var z io.WriteCloser = gzip.NewWriter(f)
	if strings.HasSuffix(path, ".zst") {
		z, err = zstd.NewWriter(f, zstd.WithEncoderLevel(zstd.SpeedFastest))
		must(t, err)
	}
	w := tar.NewWriter(z)
	for _, e := range entries {
		fill := strings.Repeat(e.fill, 1<<20)
		must(t, w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: e.name, Mode: 0o600, Size: int64(len(e.data) + e.times*len(fill))}))
		_, err := io.WriteString(w, e.data)
		must(t, err)
		for range e.times {
			_, err := io.WriteString(w, fill)
			must(t, err)
		}
	}
	must(t, w.Close())
	must(t, z.Close())
}

// measured runs a command that has to fail, and returns what it says. It must not take
// much memory, whatever it reads. No test may run beside the caller: to the kernel, a
// command's peak begins with that of the process that starts it, which is this one.
func measured(t *testing.T, s *stack.Stack, args ...string) string {
	t.Helper()
	debug.FreeOSMemory()
	must(t, os.WriteFile("/proc/self/clear_refs", []byte("5"), 0)) // resets the peak
	cmd := s.StasisCommand(args...)
	out, err := cmd.CombinedOutput()
	if err == nil {
		t.Errorf("stasis %q succeeds: %s", args, out)
	}
	const most = 400 << 10 // KiB
	if rss := cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss; rss > most {
		t.Errorf("stasis %q took %d MiB of memory", args, rss>>10)
	}
	return string(out)
}

// TestCLIBombs reads files that are small and would be large: neither memory nor the
// disk may be full of them.
func TestCLIBombs(t *testing.T) {
	s := stack.Start(t, stack.Options{})
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	config := hostileEntry{name: "config.dump", data: `{"id":"c","name":"c"}`}
	spec := hostileEntry{name: "spec.dump", data: `{}`}
	inventory := hostileEntry{name: "checkpoint/inventory.img", data: "x"}
	layoutFile := hostileEntry{name: "oci-layout", data: `{"imageLayoutVersion":"1.0.0"}`}
	writeHostile(t, in("index.tar.gz"), layoutFile, hostileEntry{name: "index.json", data: `{"manifests":[`, fill: "{},", times: 300})
	writeHostile(t, in("objects.tar.gz"), layoutFile, hostileEntry{name: "index.json", data: `{"manifests":[`, fill: "{},", times: 2})
	writeHostile(t, in("version.tar.gz"), hostileEntry{name: "oci-layout", fill: " ", times: 300})
	writeHostile(t, in("blob.tar.gz"), layoutFile, hostileEntry{name: "blobs/sha256/" + strings.Repeat("0", 64), fill: "\x00", times: 300})
	writeHostile(t, in("config.tar.zst"), hostileEntry{name: "config.dump", fill: " ", times: 1000}, spec, inventory)
	writeHostile(t, in("spec.tar.zst"), config, hostileEntry{name: "spec.dump", data: `{"mounts":[`, fill: "{},", times: 5}, inventory)
	writeHostile(t, in("pages.tar.zst"), config, spec, inventory, hostileEntry{name: "checkpoint/pages-1.img", fill: "\x00", times: 1000})
	many := []hostileEntry{config, spec, inventory}
	for i := range 1<<16 + 300 {
		many = append(many, hostileEntry{name: fmt.Sprintf("checkpoint/%d.img", i)})
	}
	writeHostile(t, in("many.tar.zst"), many...)

	// A small disk for the work, of which others can see how much is taken.
	state := filepath.Join(s.Dir, "stasis")
	must(t, os.MkdirAll(state, 0o700))
	must(t, unix.Mount("tmpfs", state, "tmpfs", 0, "size=256m,mode=0700,nr_inodes=200000"))
	unmounted := false
	unmount := func() {
		if !unmounted {
			unmounted = true
			must(t, unix.Unmount(state, 0))
		}
	}
	defer unmount()
	commands := func(file string) [][]string {
		return [][]string{{"import", file}, {"inspect", file}, {"restore", file, "x"}, {"convert", file, "stasis.test/x:1"}, {"diff", file, file}}
	}
	for file, tc := range map[string]struct {
		layout bool
		want   []string
	}{
		"index.tar.gz":   {true, []string{"index.json", "at most 8388608"}},
		"objects.tar.gz": {true, []string{"index.json", "objects and lists"}},
		"version.tar.gz": {true, []string{"oci-layout", "at most 4096"}},
		"blob.tar.gz":    {true, []string{"blobs/sha256/000", "larger than is allowed", "--max-size"}},
		"config.tar.zst": {false, []string{"config.dump", "at most 16777216"}},
		"spec.tar.zst":   {false, []string{"spec.dump", "objects and lists"}},
		"pages.tar.zst":  {false, []string{"checkpoint/pages-1.img", "larger than is allowed", "half of what is free", "--max-size allows more"}},
		"many.tar.zst":   {false, []string{"too many files"}},
	} {
		t.Run(file, func(t *testing.T) {
			lines := commands(in(file))
			if tc.layout {
				lines = [][]string{{"import", in(file), "--max-size", "100M"}}
			}
			for _, line := range lines {
				said := measured(t, s, line...)
				for _, want := range tc.want {
					if !strings.Contains(said, want) {
						t.Errorf("stasis %q says %q; want %q in it", line, said, want)
					}
				}
			}
			checkTidy(t, s)
			checkNone(t, s, "stasis.test/x:1")
		})
	}
	// A bound of the user's own, in place of half the disk.
	if said := measured(t, s, "inspect", in("pages.tar.zst"), "--max-size", "10M"); !strings.Contains(said, "10485760 bytes") || strings.Contains(said, "half") {
		t.Errorf("with --max-size: %q", said)
	}
	if said := measured(t, s, "inspect", in("pages.tar.zst"), "--max-size", "much"); !strings.Contains(said, "64M or 20G") {
		t.Errorf("with a wrong --max-size: %q", said)
	}
	unmount()
}

// TestCLIHostileRegistry pulls from a registry whose manifests would take much memory, or
// lead to each other in very many ways.
func TestCLIHostileRegistry(t *testing.T) {
	s := stack.Start(t, stack.Options{})
	manifests := map[string][]byte{} // by digest, or tag
	add := func(tag string, index ocispec.Index) ocispec.Descriptor {
		index.MediaType, index.SchemaVersion = ocispec.MediaTypeImageIndex, 2
		data, err := json.Marshal(index)
		must(t, err)
		d := digest.FromBytes(data)
		manifests[d.String()], manifests[tag] = data, data
		return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageIndex, Digest: d, Size: int64(len(data))}
	}
	large := add("", ocispec.Index{Annotations: map[string]string{"a": strings.Repeat("x", 5<<20)}})
	add("large", ocispec.Index{Manifests: []ocispec.Descriptor{large}})
	next := add("", ocispec.Index{})
	for range 40 {
		next = add("ways", ocispec.Index{Manifests: []ocispec.Descriptor{next, next}})
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		data, ok := manifests[filepath.Base(r.URL.Path)]
		switch {
		case r.URL.Path == "/v2/":
		case !ok:
			w.WriteHeader(http.StatusNotFound)
		default:
			w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
			w.Header().Set("Docker-Content-Digest", digest.FromBytes(data).String())
			w.Header().Set("Content-Length", fmt.Sprint(len(data)))
			if r.Method != http.MethodHead {
				_, _ = w.Write(data)
			}
		}
	}))
	defer server.Close()
	host := strings.TrimPrefix(server.URL, "http://")
	for tag, want := range map[string]string{"large": "at most 4194304 are read", "ways": "too many descriptors"} {
		if said := measured(t, s, "pull", host+"/x:"+tag); !strings.Contains(said, want) {
			t.Errorf("%s: says %q; want %q in it", tag, said, want)
		}
		checkTidy(t, s)
		if names := imageNames(t, s); len(names) != 0 {
			t.Errorf("images %v", names)
		}
	}
}

// imageNames lists all images and what they are.
func imageNames(t *testing.T, s *stack.Stack) map[string]string {
	t.Helper()
	list, err := s.Client().ImageService().List(s.Ctx())
	must(t, err)
	names := map[string]string{}
	for _, img := range list {
		names[img.Name] = img.Target.Digest.String()
	}
	return names
}

// blobs lists containerd's content.
func blobs(t *testing.T, s *stack.Stack) (all []string) {
	t.Helper()
	must(t, s.Client().ContentStore().Walk(s.Ctx(), func(i content.Info) error {
		all = append(all, i.Digest.String())
		return nil
	}))
	slices.Sort(all)
	return all
}

// TestCLINames imports files that name themselves like what is there: nothing is
// replaced unless the user typed the name.
func TestCLINames(t *testing.T) {
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	counter(ctx, s, "c")
	dir := t.TempDir()
	const ref, other = "stasis.test/name:1", "stasis.test/other:1"
	tars := map[string]string{}
	for _, which := range []string{"one", "two"} {
		s.Stasis("checkpoint", "c", ref)
		tars[which] = filepath.Join(dir, which+".tar")
		s.Stasis("export", ref, tars[which], "--format", "oci")
	}
	two := imageNames(t, s)[ref]
	suffixed := func(digest string) string { return ref + "-" + strings.TrimPrefix(digest, "sha256:")[:12] }

	// A checkpoint has the name.
	one := strings.TrimSpace(s.Stasis("import", tars["one"]))
	names := imageNames(t, s)
	if names[ref] != two || one != suffixed(names[one]) {
		t.Errorf("import as %s, images %v", one, names)
	}
	// The same again is the same.
	if out := s.Stasis("import", tars["one"]); out != one+"\n" {
		t.Errorf("imported again as %s, before as %s", out, one)
	}
	if out := s.Stasis("import", tars["two"]); out != ref+"\n" {
		t.Errorf("what has its name already is imported as %s", out)
	}
	// Another image has it.
	base, err := s.Client().ImageService().Get(ctx, stack.Busybox)
	must(t, err)
	must(t, s.Client().ImageService().Delete(ctx, ref))
	_, err = s.Client().ImageService().Create(ctx, images.Image{Name: ref, Target: base.Target})
	must(t, err)
	if out := strings.TrimSpace(s.Stasis("import", tars["two"])); out != suffixed(two) || imageNames(t, s)[ref] != base.Target.Digest.String() {
		t.Errorf("import as %s, images %v", out, imageNames(t, s))
	}
	// The user typed it.
	if _, err := s.StasisErr("import", tars["two"], ref); err == nil || imageNames(t, s)[ref] != base.Target.Digest.String() {
		t.Errorf("an image that is no checkpoint was replaced: %v", err)
	}
	s.Stasis("import", tars["one"], other)
	s.Stasis("import", tars["two"], other)
	if got := imageNames(t, s)[other]; got != two {
		t.Errorf("%s is %s, want %s", other, got, two)
	}
	// Archives have the name of their container and time.
	archive := filepath.Join(dir, "archive.tar")
	s.Stasis("export", other, archive)
	first := strings.TrimSpace(s.Stasis("import", archive))
	_, err = s.Client().ImageService().Update(ctx, images.Image{Name: first, Target: base.Target}, "target")
	must(t, err)
	if second := strings.TrimSpace(s.Stasis("import", archive)); !strings.HasPrefix(second, first+"-") || imageNames(t, s)[first] != base.Target.Digest.String() {
		t.Errorf("the archive is imported as %s and %s", first, second)
	}
	// Several at once want one name.
	for name := range imageNames(t, s) {
		if name != stack.Busybox {
			must(t, s.Client().ImageService().Delete(ctx, name))
		}
	}
	var group sync.WaitGroup
	for range 3 {
		for _, which := range []string{"one", "two"} {
			group.Go(func() {
				if _, err := s.StasisErr("import", tars[which]); err != nil {
					t.Error(err)
				}
			})
		}
	}
	group.Wait()
	names = imageNames(t, s)
	if len(names) != 3 || names[ref] == "" || names[suffixed(two)] == names[ref] || names[one] == names[ref] {
		t.Errorf("images %v", names)
	}
	checkTidy(t, s)
}

// TestCLIRestoreFails restores a file, and fails at several points: no image is left,
// nor what it consists of.
func TestCLIRestoreFails(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	f := s.Faults()
	c := counter(ctx, s, "c")
	file := filepath.Join(t.TempDir(), "c.tar")
	s.Stasis("checkpoint", "c", "--output", file)
	before, content := imageNames(t, s), blobs(t, s)
	failing := func(what string, args ...string) {
		t.Helper()
		if out, err := s.StasisErr(append([]string{"restore", file}, args...)...); err == nil {
			t.Errorf("%s: restored: %s", what, out)
		}
		if got := imageNames(t, s); fmt.Sprint(got) != fmt.Sprint(before) {
			t.Errorf("%s: images %v, want %v", what, got, before)
		}
		checkTidy(t, s)
		s.Poll(ctx, "the content of the image to go", func() bool { return slices.Equal(blobs(t, s), content) })
	}
	failing("the name is taken", "c")
	failing("no such network", "d", "--network", "join=none")
	f.Fail("restore", stack.Before, "as requested")
	failing("the runtime fails", "d", "--runc-binary", s.OCIRuntime())
	f.Clear("restore")
	// An image that was there stays.
	ref := strings.TrimSpace(s.Stasis("import", file))
	before = imageNames(t, s)
	content = blobs(t, s)
	if _, err := s.StasisErr("restore", file, "c"); err == nil || imageNames(t, s)[ref] != before[ref] {
		t.Errorf("%v, images %v", err, imageNames(t, s))
	}
	s.Stasis("rm", ref)
	// What succeeds leaves its image, as before.
	s.Stasis("restore", file, "d")
	if got := imageNames(t, s); len(got) != 2 {
		t.Errorf("images %v", got)
	}
	d := load(t, s, "d")
	countsOn(t, s, d)
	countsOn(t, s, c)
}

// TestHostileTmpfs gives CRIU's tar another name of a file than Stasis's reader sees.
func TestHostileTmpfs(t *testing.T) {
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	c := s.NewContainer(ctx, "c", stack.Busybox, stack.Args("sleep", "1000"))
	c.Start(ctx)
	good := filepath.Join(s.Dir, "good")
	c.Checkpoint(ctx, good, &options.CheckpointOptions{Exit: true})
	// As made by others: without sums and signature.
	plain, err := filepath.Glob(filepath.Join(good, "stasis.*"))
	must(t, err)
	for _, name := range plain {
		must(t, os.Remove(name))
	}
	var long, pax bytes.Buffer
	must(t, tar.NewWriter(&long).WriteHeader(&tar.Header{Format: tar.FormatGNU, Typeflag: tar.TypeReg, Name: strings.Repeat("../", 40) + "tmp/hostile"}))
	must(t, tar.NewWriter(&pax).WriteHeader(&tar.Header{Format: tar.FormatPAX, Typeflag: tar.TypeReg, Name: "./é"}))
	end := make([]byte, 1024)
	for name, head := range map[string][]byte{
		"two names":       append(bytes.Clone(long.Bytes()[:1024]), pax.Bytes()...),
		"after the end":   append(append(bytes.Clone(pax.Bytes()), end...), pax.Bytes()...),
		"two PAX headers": append(bytes.Clone(pax.Bytes()[:1024]), pax.Bytes()...),
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(s.Dir, "forged", strings.ReplaceAll(name, " ", "-"))
			must(t, os.CopyFS(dir, os.DirFS(good)))
			paths, err := filepath.Glob(filepath.Join(dir, "tmpfs-*"))
			must(t, err)
			if len(paths) == 0 {
				t.Fatal("the container has no tmpfs")
			}
			var b bytes.Buffer
			z := gzip.NewWriter(&b)
			_, err = z.Write(append(bytes.Clone(head), end...))
			must(t, err)
			must(t, z.Close())
			must(t, os.WriteFile(paths[0], b.Bytes(), 0o600))
			err = c.RestoreErr(ctx, dir)
			if err == nil || !strings.Contains(err.Error(), filepath.Base(paths[0])) || !strings.Contains(err.Error(), "no tar archive") {
				t.Errorf("error %v", err)
			}
			if c.Task != nil {
				c.DeleteTask(ctx)
			}
			nothingOf(ctx, t, s, c)
		})
	}
	// The same, honest.
	c.Restore(ctx, good)
}

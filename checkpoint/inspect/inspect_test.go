package inspect

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	core "github.com/checkpoint-restore/go-criu/v8/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pagemap"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pstree"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/regfile"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/stats"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/vma"
	"github.com/checkpoint-restore/go-criu/v8/magic"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	"github.com/stasis-run/stasis/checkpoint/layout"
)

// testdata are checkpoints that runc made.
func testdata(name string) string { return filepath.Join("..", "testdata", name) }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// copyOf returns a folder with a copy of a checkpoint that runc made.
func copyOf(t testing.TB, name string) string {
	dir := filepath.Join(t.TempDir(), name)
	must(t, os.CopyFS(dir, os.DirFS(testdata(name))))
	return dir
}

// image builds an image of messages.
func image(t testing.TB, kind string, msgs ...proto.Message) []byte {
	t.Helper()
	out := binary.LittleEndian.AppendUint32(nil, uint32(magic.LoadMagic().ByName["IMG_COMMON"]))
	out = binary.LittleEndian.AppendUint32(out, uint32(magic.LoadMagic().ByName[kind]))
	for _, m := range msgs {
		msg, err := proto.MarshalOptions{AllowPartial: true}.Marshal(m)
		must(t, err)
		out = binary.LittleEndian.AppendUint32(out, uint32(len(msg)))
		out = append(out, msg...)
	}
	return out
}

func TestInspect(t *testing.T) {
	r, err := Inspect(t.Context(), testdata("runc-sleep"), Options{})
	must(t, err)
	if len(r.Processes) != 1 {
		t.Fatalf("%d processes", len(r.Processes))
	}
	p := r.Processes[0]
	if got := []any{r.Architecture, p.PID, p.Comm, p.State, p.Exe, p.Cwd, p.Root}; !reflect.DeepEqual(got,
		[]any{"amd64", uint32(1), "sleep", "alive", "/usr/bin/busybox", "/", "/"}) {
		t.Errorf("%q", got)
	}
	if !slices.Equal(p.Args, []string{"sleep", "1000"}) || p.Environment != nil {
		t.Errorf("arguments %q, environment %q", p.Args, p.Environment)
	}
	c := p.Credentials
	if c.UID != 0 || !c.NoNewPrivs || !slices.Contains(c.Capabilities, "CAP_KILL") || slices.Contains(c.Capabilities, "CAP_SYS_ADMIN") {
		t.Errorf("credentials %+v", c)
	}
	if m := p.Memory; m.Dumped != 65536 || r.Sizes.Memory != 65536 || m.PageSize != 4096 {
		t.Errorf("memory %+v, sizes %+v", m, r.Sizes)
	}
	heap := slices.IndexFunc(p.Memory.Mappings, func(m Mapping) bool { return m.Kind == "heap" })
	if heap < 0 || p.Memory.Mappings[heap].Protection != "rw-p" || p.Memory.Mappings[heap].Dumped != 8192 {
		t.Errorf("mappings %+v", p.Memory.Mappings)
	}
	if len(p.Descriptors) != 3 || p.Descriptors[0].Kind != "pipe" || p.Descriptors[1].Flags != "O_WRONLY" {
		t.Errorf("descriptors %+v", p.Descriptors)
	}
	if len(r.Mounts) == 0 || r.Mounts[0].Mountpoint != "/" {
		t.Errorf("mounts %+v", r.Mounts)
	}
	if !slices.Contains(r.Needs.KernelOptions, "TIME_NS") || !slices.Equal(r.Needs.Files, []string{"/usr/bin/busybox"}) {
		t.Errorf("needs %+v", r.Needs)
	}

	r, err = Inspect(t.Context(), testdata("runc-sleep"), Options{Environment: true})
	must(t, err)
	if !slices.Equal(r.Processes[0].Environment, []string{"PATH=/bin:/sbin", "HOME=/root"}) {
		t.Errorf("environment %q", r.Processes[0].Environment)
	}
}

func TestSockets(t *testing.T) {
	r, err := Inspect(t.Context(), testdata("runc-tcp"), Options{})
	must(t, err)
	for _, want := range []Socket{
		{Kind: "tcp", State: "listen", Local: "127.0.0.1:9000"},
		{Kind: "tcp", State: "established", Local: "127.0.0.1:46478", Remote: "127.0.0.1:9000"},
		{Kind: "tcp6", State: "listen", Local: "[::]:9001"},
		{Kind: "tcp6", State: "established", Local: "[::1]:41078", Remote: "[::1]:9001"},
		{Kind: "udp", State: "connected", Local: "127.0.0.1:9002", Remote: "127.0.0.1:53"},
	} {
		if !slices.Contains(r.Sockets, want) {
			t.Errorf("no %+v in %+v", want, r.Sockets)
		}
	}
	if len(r.Needs.Addresses) != 0 {
		t.Errorf("loopback's addresses are everywhere: %v", r.Needs.Addresses)
	}
	last := r.Processes[len(r.Processes)-1]
	if len(r.Processes) != 3 || last.Depth != 1 {
		t.Errorf("processes %+v", r.Processes)
	}

	r, err = Inspect(t.Context(), testdata("runc-unix"), Options{})
	must(t, err)
	if len(r.Sockets) != 1 || !r.Sockets[0].External || !slices.Equal(r.Needs.Sockets, []string{"/tmp/ckpt/exp/sockd/d.sock"}) {
		t.Errorf("sockets %+v, needs %+v", r.Sockets, r.Needs.Sockets)
	}
}

func TestStats(t *testing.T) {
	dir := copyOf(t, "runc-sleep")
	data := image(t, "STATS", &stats.StatsEntry{Dump: &stats.DumpStatsEntry{FrozenTime: proto.Uint32(7), PagesWritten: proto.Uint64(16)}})
	must(t, os.WriteFile(filepath.Join(dir, layout.DumpStats), data, 0o600))
	r, err := Inspect(t.Context(), dir, Options{})
	must(t, err)
	if r.Stats == nil || r.Stats.FrozenUS != 7 || r.Stats.PagesWritten != 16 {
		t.Errorf("%+v", r.Stats)
	}
}

// What programs read says the same when it is read again.
func TestJSON(t *testing.T) {
	for _, name := range []string{"runc-sleep", "runc-tcp", "runc-terminal", "runc-unix"} {
		r, err := Inspect(t.Context(), testdata(name), Options{Environment: true})
		must(t, err)
		data, err := json.Marshal(r)
		must(t, err)
		var again Report
		must(t, json.Unmarshal(data, &again))
		second, err := json.Marshal(&again)
		must(t, err)
		if string(data) != string(second) {
			t.Errorf("%s:\n%s\n%s", name, data, second)
		}
	}
}

func TestRefuses(t *testing.T) {
	process := func(pid, ppid uint32) *pstree.PstreeEntry {
		return &pstree.PstreeEntry{Pid: &pid, Ppid: &ppid, Pgid: &pid, Sid: &pid}
	}
	u64 := proto.Uint64
	for _, tc := range []struct {
		name, file string
		data       []byte // nil removes the file
		part       string
	}{
		{"no inventory", "inventory.img", nil, "has no inventory.img"},
		{"no tree", "pstree.img", nil, "pstree.img: missing"},
		{"empty tree", "pstree.img", image(t, "PSTREE"), "lists no process"},
		{"orphan", "pstree.img", image(t, "PSTREE", process(1, 9)), "below none that is listed"},
		{"loop", "pstree.img", image(t, "PSTREE", process(1, 1)), "below none that is listed"},
		{"twice", "pstree.img", image(t, "PSTREE", process(1, 0), process(1, 0)), "listed twice"},
		{"no core", "core-1.img", nil, "core-1.img"},
		{"no memory map", "mm-1.img", nil, "mm-1.img"},
		{"no page map", "pagemap-1.img", nil, "pagemap-1.img"},
		{"no files", "files.img", nil, "files.img: missing"},
		{"another kind", "mm-1.img", image(t, "CORE", &core.CoreEntry{}), "no image of kind MM"},
		{"cut", "mm-1.img", image(t, "MM", &mm.MmEntry{MmBrk: u64(1)})[:10], "truncated"},
		{"huge message", "mm-1.img", append(image(t, "MM"), 0xff, 0xff, 0xff, 0xff), "truncated"},
		{"cut message", "mm-1.img", append(image(t, "MM"), 0xff, 0xff, 0x3f, 0, 1), "truncated"},
		{"garbage", "mm-1.img", append(image(t, "MM"), 1, 0, 0, 0, 0xff), "malformed"},
		{"backwards", "mm-1.img", image(t, "MM", &mm.MmEntry{Vmas: []*vma.VmaEntry{{Start: u64(8192), End: u64(4096)}}}), "a mapping from"},
		{"too much memory", "pagemap-1.img", image(t, "PAGEMAP", &pagemap.PagemapHead{PagesId: proto.Uint32(1)},
			&pagemap.PagemapEntry{Vaddr: u64(0), NrPages: u64(1 << 60)}), "more memory than there can be"},
		{"long name", "files.img", image(t, "FILES", &fdinfo.FileEntry{
			Type: fdinfo.FdTypes_REG.Enum(), Id: proto.Uint32(1),
			Reg: &regfile.RegFileEntry{Name: proto.String(strings.Repeat("x", maxPath+1))},
		}), "a name of"},
		{"manifest", "stasis.json", []byte("{"), "stasis.json"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := copyOf(t, "runc-sleep")
			path := filepath.Join(dir, tc.file)
			if tc.data == nil {
				must(t, os.Remove(path))
			} else {
				must(t, os.WriteFile(path, tc.data, 0o600))
			}
			_, err := Inspect(t.Context(), dir, Options{})
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), tc.part) || !strings.Contains(err.Error(), dir) {
				t.Errorf("%v", err)
			}
		})
	}
	if _, err := Inspect(t.Context(), filepath.Join(t.TempDir(), "none"), Options{}); !errdefs.IsNotFound(err) {
		t.Errorf("no folder: %v", err)
	}
}

func TestRefusesLinks(t *testing.T) {
	dir := copyOf(t, "runc-sleep")
	path := filepath.Join(dir, "mm-1.img")
	must(t, os.Rename(path, filepath.Join(t.TempDir(), "mm")))
	must(t, os.Symlink("/etc/passwd", path))
	if _, err := Inspect(t.Context(), dir, Options{}); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "mm-1.img") {
		t.Errorf("%v", err)
	}
}

// The list of pages may name the arguments' page a million times.
func TestRepeatedPages(t *testing.T) {
	dir := copyOf(t, "runc-sleep")
	msgs := []proto.Message{&pagemap.PagemapHead{PagesId: proto.Uint32(1)}}
	entry := &pagemap.PagemapEntry{Vaddr: proto.Uint64(0), NrPages: proto.Uint64(1 << 36)}
	for range 1 << 15 {
		msgs = append(msgs, entry)
	}
	must(t, os.WriteFile(filepath.Join(dir, "pagemap-1.img"), image(t, "PAGEMAP", msgs...), 0o600))
	if _, err := Inspect(t.Context(), dir, Options{}); err == nil || errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v", err)
	}
}

// Whatever one of a checkpoint's images holds, Inspect neither panics nor hangs,
// and what it reports is JSON.
func FuzzInspect(f *testing.F) {
	targets := []string{"inventory.img", "pstree.img", "core-1.img", "mm-1.img", "pagemap-1.img", "files.img", "fdinfo-2.img",
		"fs-1.img", "ids-1.img", "mountpoints-13.img", "utsns-12.img", "stats-dump", "remap-fpath.img", "stasis.json"}
	for i, name := range targets {
		paths, err := filepath.Glob(filepath.Join("..", "testdata", "*", name))
		must(f, err)
		for _, path := range paths {
			data, err := os.ReadFile(path)
			must(f, err)
			f.Add(uint8(i), data)
		}
	}
	f.Add(uint8(11), image(f, "STATS", &stats.StatsEntry{Dump: &stats.DumpStatsEntry{FrozenTime: proto.Uint32(7)}}))
	f.Add(uint8(13), []byte(`{"version":1,"files":[]}`))
	dir := copyOf(f, "runc-sleep")
	f.Fuzz(func(t *testing.T, target uint8, data []byte) {
		name := targets[int(target)%len(targets)]
		path := filepath.Join(dir, name)
		good, err := os.ReadFile(path)
		if err == nil {
			defer os.WriteFile(path, good, 0o600)
		} else {
			defer os.Remove(path)
		}
		must(t, os.WriteFile(path, data, 0o600))
		r, err := Inspect(t.Context(), dir, Options{Environment: true})
		if err != nil {
			if !strings.HasPrefix(err.Error(), "inspect checkpoint "+dir+": ") {
				t.Fatal(err)
			}
			return
		}
		if _, err := json.Marshal(r); err != nil {
			t.Fatal(err)
		}
	})
}

func TestDiff(t *testing.T) {
	dir := copyOf(t, "runc-sleep")
	diffs, err := Diff(t.Context(), testdata("runc-sleep"), dir)
	must(t, err)
	if len(diffs) != 1 || diffs[0].Same != 65536 || diffs[0].Changed+diffs[0].Added+diffs[0].Removed != 0 {
		t.Fatalf("the same: %+v", diffs)
	}
	// One byte of the heap, whose two pages follow 9 others.
	r, err := Inspect(t.Context(), dir, Options{})
	must(t, err)
	var at int64
	for _, m := range r.Processes[0].Memory.Mappings {
		if m.Kind == "heap" {
			break
		}
		at += m.Dumped
	}
	f, err := os.OpenFile(filepath.Join(dir, "pages-1.img"), os.O_RDWR, 0)
	must(t, err)
	var b [1]byte
	_, err = f.ReadAt(b[:], at)
	must(t, err)
	b[0]++
	_, err = f.WriteAt(b[:], at)
	must(t, err)
	must(t, f.Close())
	diffs, err = Diff(t.Context(), testdata("runc-sleep"), dir)
	must(t, err)
	d := diffs[0]
	if d.Changed != 4096 || d.Same != 65536-4096 || len(d.Mappings) != 1 || d.Mappings[0].Kind != "heap" || d.Mappings[0].Changed != 4096 {
		t.Errorf("one page: %+v", d)
	}
	must(t, os.Truncate(filepath.Join(dir, "pages-1.img"), 100))
	if _, err := Diff(t.Context(), testdata("runc-sleep"), dir); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "pages-1.img") {
		t.Errorf("truncated: %v", err)
	}
}

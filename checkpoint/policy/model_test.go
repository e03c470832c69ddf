package policy

import (
	"encoding/binary"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/mnt"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/vma"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
)

// A model of what CRIU does with an image, written without a look at how it is
// checked: where it puts its restorer, in which order it mounts, and where open(2)
// leads. What the checks accept, must be safe in it.

// placeRestorer is CRIU's search for a gap of length bytes in the memory of a
// process (theirs) and its own (ours), with the habit of passing over the last
// mapping of each, and of taking for the last what a guard follows.
func placeRestorer(theirs, ours []*vma.VmaEntry, length uint64) (uint64, bool) {
	const end = 1<<47 - 4096
	stop := &vma.VmaEntry{Start: proto.Uint64(end), End: proto.Uint64(end)}
	next := func(list []*vma.VmaEntry, i int) (*vma.VmaEntry, bool) {
		if i+1 == len(list) || list[i+1].GetStatus()&(1<<16) != 0 {
			return stop, false
		}
		return list[i+1], true
	}
	at := uint64(64 << 10)
	lists := [][]*vma.VmaEntry{ours, theirs}
	index, now := [2]int{}, [2]*vma.VmaEntry{ours[0], theirs[0]}
search:
	for {
		for k := range lists {
			if at+length <= now[k].GetStart() {
				continue
			}
			if now[k] == stop {
				return 0, false
			}
			following, more := next(lists[k], index[k])
			if more {
				at = max(at, now[k].GetEnd())
				index[k]++
			}
			now[k] = following
			continue search
		}
		return at, true
	}
}

// criusOwn is the memory of a CRIU that has a copy of what is private.
func criusOwn(copied uint64) []*vma.VmaEntry {
	var own []*vma.VmaEntry
	for _, s := range []span{{0x555555554000, 0x555555754000}, {0x555555900000, 0x555557000000}, {0x7fff00000000 - copied, 0x7fff00000000},
		{0x7ffff7d00000, 0x7ffff7ff0000}, {0x7ffffffde000, 0x7ffffffff000}, {vsyscall, vsyscall + 4096}} {
		if s.start < s.end {
			own = append(own, area(s.start, s.end))
		}
	}
	return own
}

// unsafeMemory says what goes wrong when CRIU restores a list of mappings.
func unsafeMemory(areas []*vma.VmaEntry) string {
	var copied uint64
	for i, v := range areas {
		if v.GetFd() != -1 {
			return "a descriptor of CRIU's is mapped"
		}
		if v.GetFdflags()&0o3000 != 0 || v.GetFdflags()&0o100 != 0 {
			return "a file is made or emptied"
		}
		if v.GetStatus()&(1<<16) != 0 {
			covered := v.GetStart()
			for _, o := range areas {
				if o.GetStatus()&(1<<16) == 0 && o.GetStart() <= covered && covered < o.GetEnd() {
					covered = o.GetEnd()
				}
			}
			if covered < v.GetEnd() {
				return "a guard is put where no mapping is"
			}
			continue
		}
		if v.GetStart() >= v.GetEnd() || v.GetStart() != vsyscall && v.GetEnd() > 1<<56 {
			return "a mapping is not in the process's addresses"
		}
		if v.GetStatus()>>27 != 0 {
			return "a mapping is taken for one of CRIU's"
		}
		copied += v.GetEnd() - v.GetStart()
		for _, o := range areas[:i] {
			if o.GetStatus()&(1<<16) == 0 && v.GetStart() < o.GetEnd() && o.GetStart() < v.GetEnd() {
				return "two mappings overlap"
			}
		}
	}
	copied = min(copied, 0x7f0000000000)
	for _, length := range []uint64{1 << 20, 16 << 20, 200 << 20} {
		start, ok := placeRestorer(areas, criusOwn(copied), length)
		if !ok {
			continue // CRIU ends
		}
		for _, v := range areas {
			if v.GetStatus()&(1<<16) == 0 && v.GetStart() != vsyscall && start < v.GetEnd() && v.GetStart() < start+length {
				return fmt.Sprintf("a mapping at %#x is made over the restorer at %#x", v.GetStart(), start)
			}
		}
	}
	return ""
}

// FuzzMemory gives a process mappings out of bytes.
func FuzzMemory(f *testing.F) {
	spec := newForgery(f).spec
	add := func(fields ...uint64) {
		var b []byte
		for _, n := range fields {
			b = binary.LittleEndian.AppendUint64(b, n)
		}
		f.Add(b)
	}
	const private = 513<<32 | 0x22
	add(0x10, 0x10, private, 0x7f0000000, 1, private)
	add(0x10, 1, private, 0x300, 1, 1<<48, 0x11, 0x1f0, private)
	add(0x10, 0x10, private, 0x7f0000000, 1, private, 0x300, 1, 1<<48)
	add(0x10, 0x10, private, 0x20, 0x400, private)
	f.Fuzz(func(t *testing.T, data []byte) {
		m := filled(&mm.MmEntry{})
		for len(data) >= 24 && len(m.Vmas) < 32 {
			start := binary.LittleEndian.Uint64(data)
			kind := binary.LittleEndian.Uint64(data[16:])
			v := area(start<<12, (start+binary.LittleEndian.Uint64(data[8:]))<<12)
			*v.Status, *v.Flags = uint32(kind>>32), uint32(kind)&0xfffff
			if kind>>20&0xf == 1 {
				*v.Fd = int64(kind >> 24 & 0xff)
			}
			if kind>>20&0xf == 2 {
				v.Fdflags = proto.Uint32(uint32(kind >> 24 & 0xff << 3))
			}
			m.Vmas = append(m.Vmas, v)
			data = data[24:]
		}
		c := &checker{spec: spec, grant: grantOf(spec), budget: newBudget(t.Context())}
		c.checkAreas(&task{pid: 1, threads: []uint32{1}}, m)
		if len(c.found) > 0 || c.more > 0 {
			return
		}
		if bad := unsafeMemory(m.Vmas); bad != "" {
			t.Fatalf("%s: %v", bad, m.Vmas)
		}
	})
}

// mountOrder is the order in which CRIU mounts a tree: each before what is below it,
// of siblings the deepest first.
func mountOrder(all []*mnt.MntEntry) (order []*mnt.MntEntry) {
	done := map[*mnt.MntEntry]bool{}
	var mount func(m *mnt.MntEntry)
	mount = func(m *mnt.MntEntry) {
		if done[m] {
			return
		}
		done[m] = true
		order = append(order, m)
		var below []*mnt.MntEntry
		for _, o := range all {
			if o.GetParentMntId() == m.GetMntId() && o != m {
				below = append(below, o)
			}
		}
		slices.SortStableFunc(below, func(a, b *mnt.MntEntry) int {
			return strings.Count(b.GetMountpoint(), "/") - strings.Count(a.GetMountpoint(), "/")
		})
		for _, o := range below {
			mount(o)
		}
	}
	for _, m := range all {
		if m.GetMountpoint() == "/" {
			mount(m)
			break
		}
	}
	return order
}

// hidden returns a mount that is not seen once all are made.
func hidden(all []*mnt.MntEntry) string {
	order := mountOrder(all)
	if len(order) != len(all) {
		return "some are never made"
	}
	for i, m := range order {
		for _, later := range order[i+1:] {
			if p := later.GetMountpoint(); p == m.GetMountpoint() || p == "/" || strings.HasPrefix(m.GetMountpoint(), p+"/") {
				return m.GetMountpoint()
			}
		}
	}
	return ""
}

// FuzzMountTree gives mounts numbers, parents and paths out of bytes.
func FuzzMountTree(f *testing.F) {
	spec := newForgery(f).spec
	places := []string{"/", "/proc", "/proc/sys", "/proc/keys", "/dev", "/dev/shm", "/volume", "/volume/a", "/volume/a/b", "/proc/sys/a"}
	f.Add([]byte{0, 1, 9, 1, 2, 1, 2, 3, 2, 3, 4, 2})
	f.Add([]byte{0, 1, 9, 1, 2, 1, 2, 3, 1})
	f.Add([]byte{0, 1, 9, 1, 2, 3, 2, 3, 2})
	f.Fuzz(func(t *testing.T, data []byte) {
		var raw []*mnt.MntEntry
		var all []mountEntry
		for ; len(data) >= 3 && len(raw) < 40; data = data[3:] {
			at := places[int(data[0])%len(places)]
			m := &mnt.MntEntry{Mountpoint: &at, MntId: u32(uint32(data[1])), ParentMntId: u32(uint32(data[2]))}
			raw = append(raw, m)
			all = append(all, mountEntry{m, at})
		}
		c := &checker{spec: spec, grant: grantOf(spec), budget: newBudget(t.Context())}
		c.compareMounts(newMountTree(all), map[string]wanted{})
		// That the spec has none of them is not asked here.
		twice := slices.ContainsFunc(c.found, func(s string) bool { return strings.Contains(s, "there twice") || strings.Contains(s, "no root mount") })
		if c.more > 0 || twice {
			return
		}
		c.found = nil
		c.checkTree(all, map[uint32]bool{})
		if len(c.found) > 0 {
			return
		}
		if at := hidden(raw); at != "" {
			t.Fatalf("%s is hidden: %v", at, raw)
		}
	})
}

// procLink are the links of procfs.
var procLink = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`^/proc/(self|thread-self|net|mounts|[0-9]+/(task/[0-9]+/)?(root|cwd|exe|(fd|ns|map_files)/[^/]+))$`)
})

// leadsOut follows a path as the kernel would, in a container whose links are known,
// while CRIU has the host's files behind those of procfs.
func leadsOut(links map[string]string, at, rest string, left *int) bool {
	for rest != "" {
		var name string
		name, rest, _ = strings.Cut(rest, "/")
		switch name {
		case "", ".":
			continue
		case "..":
			at = path.Dir(at)
			continue
		}
		at = path.Join(at, name)
		if procLink().MatchString(at) {
			return true
		}
		target, ok := links[at]
		if !ok {
			continue
		}
		if *left--; *left < 0 {
			return false // an error
		}
		if strings.HasPrefix(target, "/") {
			at = "/"
		} else {
			at = path.Dir(at)
		}
		rest = target + "/" + rest
	}
	return false
}

// FuzzPath follows paths over links of the image, a volume, and a tmpfs.
func FuzzPath(f *testing.F) {
	good := newForgery(f)
	root, volume := f.TempDir(), f.TempDir()
	for _, dir := range []string{"proc", "volume", "tmp", "a/b", "etc"} {
		must(f, os.MkdirAll(filepath.Join(root, dir), 0o755))
	}
	must(f, os.MkdirAll(filepath.Join(volume, "a"), 0o755))
	var all []mountEntry
	for i, m := range []*mnt.MntEntry{
		{Mountpoint: proto.String("/"), Fstype: u32(uint32(mnt.Fstype_OVERLAYFS)), RootDev: u32(1)},
		{Mountpoint: proto.String("/proc"), Fstype: u32(uint32(mnt.Fstype_PROC)), RootDev: u32(2)},
		{Mountpoint: proto.String("/volume"), ExtKey: proto.String("/volume"), RootDev: u32(3)},
		{Mountpoint: proto.String("/tmp"), Fstype: u32(uint32(mnt.Fstype_TMPFS)), RootDev: u32(4)},
	} {
		m.MntId, m.Root = u32(uint32(100+i)), proto.String("/")
		all = append(all, mountEntry{m, m.GetMountpoint()})
	}
	places := []string{"/x", "/y", "/a/x", "/a/b/y", "/volume/x", "/volume/a/y", "/tmp/x", "/tmp/a/y"}
	f.Add("/x/etc", "/y\n../a/x\n/proc/self/root")
	f.Add("/volume/x/etc", "\n\n\n\n/proc/1/cwd")
	f.Add("/tmp/a/y/z", "/etc\n\n\n\n\n\n../../proc\n../x/self/fd/121/2/root")
	f.Add("/a/../proc/6/stat", "")
	f.Fuzz(func(t *testing.T, name, targets string) {
		if strings.Contains(name+targets, "\x00") || len(name) > 1<<10 || len(targets) > 1<<10 {
			return
		}
		links, tmpfs := map[string]string{}, map[string]string{}
		for i, target := range strings.Split(targets, "\n") {
			if i == len(places) {
				break
			}
			at := places[i]
			host := filepath.Join(root, at)
			if rel, ok := strings.CutPrefix(at, "/volume"); ok {
				host = filepath.Join(volume, rel)
			}
			_ = os.Remove(host)
			if target == "" {
				continue
			}
			if rel, ok := strings.CutPrefix(at, "/tmp/"); ok {
				tmpfs[rel] = target
			} else if os.Symlink(target, host) != nil {
				continue
			}
			links[at] = target
		}
		c := &checker{spec: good.spec, grant: grantOf(good.spec), budget: newBudget(t.Context()), tmpfsLinks: map[string]map[string]string{"4": tmpfs},
			wanted: map[string]wanted{"/volume": {Mount: specs.Mount{Type: "bind", Source: volume}}}}
		v := c.newView(all, root)
		defer v.close()
		to, err := v.follow("/"+name, true)
		must(t, err)
		left := 1000
		if to.bad == "" && leadsOut(links, "/", name, &left) {
			t.Fatalf("%q is taken for %q; %q", name, to.at, links)
		}
		for _, at := range places {
			if !strings.HasPrefix(at, "/volume") {
				_ = os.Remove(filepath.Join(root, at))
			} else {
				_ = os.Remove(filepath.Join(volume, at[len("/volume"):]))
			}
		}
	})
}

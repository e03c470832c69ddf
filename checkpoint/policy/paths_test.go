package policy

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fh"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fifo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fsnotify"
	ghost "github.com/checkpoint-restore/go-criu/v8/crit/images/ghost-file"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/memfd"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/mnt"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/regfile"
	remap "github.com/checkpoint-restore/go-criu/v8/crit/images/remap-file-path"
	skunix "github.com/checkpoint-restore/go-criu/v8/crit/images/sk-unix"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/tty"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// descriptors is the way to the host's root that CRIU has open while it restores.
const descriptors = "/proc/self/fd/121/2/root"

// regular opens a file by name, as entry 77.
func (f *forgery) regular(name string, flags uint32) {
	f.t.Helper()
	f.addFile(&fdinfo.FileEntry{Type: fdinfo.FdTypes_REG.Enum(), Id: u32(77), Reg: &regfile.RegFileEntry{Id: u32(77), Name: &name, Flags: &flags}})
}

// held makes that a process has an entry of files.img.
func (f *forgery) held(id uint32) {
	f.t.Helper()
	alter(f, "fdinfo-2.img", "FDINFO", func(all []*fdinfo.FdinfoEntry) []*fdinfo.FdinfoEntry {
		return append(all, filled(&fdinfo.FdinfoEntry{Id: &id, Fd: u32(77), Type: fdinfo.FdTypes_REG.Enum()}))
	})
}

func (f *forgery) remap(kind remap.RemapType, orig, to uint32) {
	f.t.Helper()
	f.write("remap-fpath.img", "REMAP_FPATH", &remap.RemapFilePathEntry{OrigId: &orig, RemapId: &to, RemapType: &kind})
}

func (f *forgery) ghost(mode uint32) {
	f.t.Helper()
	f.write("ghost-file-1.img", "GHOST_FILE", filled(&ghost.GhostFileEntry{Mode: &mode}))
}

// link makes a link in the root filesystem.
func (f *forgery) link(target, name string) {
	f.t.Helper()
	must(f.t, os.MkdirAll(filepath.Dir(filepath.Join(f.root, name)), 0o755))
	must(f.t, os.Symlink(target, filepath.Join(f.root, name)))
}

// volume gives the container a folder of the host's at /volume.
func (f *forgery) volume() (dir string) {
	f.t.Helper()
	dir = f.t.TempDir()
	f.spec.Mounts = append(f.spec.Mounts, specs.Mount{Destination: "/volume", Type: "bind", Source: dir, Options: []string{"rbind"}})
	f.addMount(&mnt.MntEntry{Mountpoint: proto.String("/volume"), ExtKey: proto.String("/volume"), Fstype: u32(0), RootDev: u32(266338304)})
	return dir
}

// tmpfs gives the container one at /tmp, with files.
func (f *forgery) tmpfs(headers ...*tar.Header) {
	f.t.Helper()
	f.archive("tmpfs-dev-999.tar.gz.img", headers...)
	f.spec.Mounts = append(f.spec.Mounts, specs.Mount{Destination: "/tmp", Type: "tmpfs", Source: "tmpfs"})
	f.addMount(&mnt.MntEntry{Mountpoint: proto.String("/tmp"), Fstype: u32(uint32(mnt.Fstype_TMPFS)), RootDev: u32(999), Root: proto.String("/")})
}

func (f *forgery) archive(name string, headers ...*tar.Header) {
	f.t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	w := tar.NewWriter(z)
	for _, h := range headers {
		must(f.t, w.WriteHeader(h))
	}
	must(f.t, w.Close())
	must(f.t, z.Close())
	f.raw(name, b.Bytes())
}

func TestPaths(t *testing.T) {
	const overLink = "goes over a link of procfs"
	open := func(name string, flags uint32) func(*forgery) {
		return func(f *forgery) { f.regular(name, flags) }
	}
	socket := func(sk *skunix.UnixSkEntry) func(*forgery) {
		return func(f *forgery) {
			sk.Id = u32(77)
			f.addFile(&fdinfo.FileEntry{Type: fdinfo.FdTypes_UNIXSK.Enum(), Id: u32(77), Usk: sk})
		}
	}
	watched := func(p string) func(*forgery) {
		return func(f *forgery) {
			f.addFile(&fdinfo.FileEntry{Type: fdinfo.FdTypes_INOTIFY.Enum(), Id: u32(77), Ify: &fsnotify.InotifyFileEntry{
				Wd: []*fsnotify.InotifyWdEntry{filled(&fsnotify.InotifyWdEntry{FHandle: &fh.FhEntry{Path: &p}})}}})
		}
	}
	for _, tc := range []struct {
		name string
		fn   func(*forgery)
		want string // "" if it passes
	}{
		{"CRIU's descriptors", open(descriptors+"/etc/shadow", 0), `open file 77: "/proc/self/fd/121/2/root/etc/shadow" ` + overLink},
		{"by number", open("/proc/1/root/etc/shadow", 0), overLink},
		{"of a thread", open("/proc/6/task/6/cwd/etc/shadow", 0), overLink},
		{"of this thread", open("/proc/thread-self/root/etc/shadow", 0), overLink},
		{"mapped file", open("/proc/6/map_files/400000-401000", 0), overLink},
		{"namespace", open("/proc/6/ns/mnt", 0), overLink},
		{"executable", open("/proc/6/exe", unix.O_RDWR), overLink},
		{"the link itself", open("/proc/6/root", unix.O_PATH|unix.O_NOFOLLOW), overLink},
		{"host's network", open("/proc/net/tcp", 0), overLink},
		{"over a link of the image", func(f *forgery) { f.link(descriptors, "x"); f.regular("/x/etc/shadow", 0) }, `"/x/etc/shadow" ` + overLink},
		{"over two", func(f *forgery) {
			f.link("/x", "a/y")
			f.link("../../../../proc/6/root", "x")
			f.regular("/a/y/etc/shadow", 0)
		}, overLink},
		{"a link at the end", func(f *forgery) { f.link(descriptors+"/etc/shadow", "x"); f.regular("/x", 0) }, overLink},
		{"not followed", func(f *forgery) {
			f.link(descriptors+"/etc/shadow", "x")
			f.regular("/x", unix.O_PATH|unix.O_NOFOLLOW)
		}, ""},
		{"not followed, but opened", func(f *forgery) { f.link(descriptors+"/etc/shadow", "x"); f.regular("/x", unix.O_NOFOLLOW) }, overLink},
		{"not followed, but mapped", func(f *forgery) {
			f.link(descriptors+"/etc/shadow", "x")
			f.regular("/x", unix.O_PATH|unix.O_NOFOLLOW)
			one(f, "mm-6.img", "MM", func(m *mm.MmEntry) { *m.Vmas[0].Shmid, m.Vmas[0].Fdflags = 77, u32(unix.O_RDWR) })
		}, overLink},
		{"links in a circle", func(f *forgery) { f.link("/x", "x"); f.regular("/x/a", 0) }, "goes over too many links"},
		{"a link within the container", func(f *forgery) { f.link("/etc", "x"); f.regular("/x/passwd", 0) }, ""},
		{"a link that climbs", func(f *forgery) { f.link("../../../../etc", "x"); f.regular("/x/passwd", 0) }, ""},
		{"over a link of a volume", func(f *forgery) {
			must(f.t, os.Symlink(descriptors, filepath.Join(f.volume(), "x")))
			f.regular("/volume/x/etc/shadow", 0)
		}, overLink},
		{"a volume below a folder that the runtime makes", func(f *forgery) {
			dir := f.t.TempDir()
			must(f.t, os.Symlink(descriptors, filepath.Join(dir, "x")))
			f.spec.Mounts = append(f.spec.Mounts, specs.Mount{Destination: "/none/yet/volume", Type: "bind", Source: dir, Options: []string{"rbind"}})
			f.addMount(&mnt.MntEntry{Mountpoint: proto.String("/none/yet/volume"), ExtKey: proto.String("/none/yet/volume"), Fstype: u32(0), RootDev: u32(266338304)})
			f.regular("/none/yet/volume/x/etc/shadow", 0)
		}, overLink},
		{"deeper than a path can tell", func(f *forgery) {
			dir := f.volume()
			root, err := os.OpenRoot(dir)
			must(f.t, err)
			defer root.Close()
			// Two halves of a way that is longer than a path, the second over a link.
			half := strings.Repeat(strings.Repeat("d", 200)+"/", 11)
			must(f.t, root.MkdirAll(half, 0o755))
			in, err := root.OpenRoot(half)
			must(f.t, err)
			defer in.Close()
			must(f.t, in.MkdirAll(half, 0o755))
			deep, err := in.OpenRoot(half)
			must(f.t, err)
			defer deep.Close()
			must(f.t, deep.Symlink(descriptors, "x"))
			must(f.t, in.Symlink(strings.TrimSuffix(half, "/"), "l"))
			f.regular("/volume/"+half+"l/x/etc/shadow", 0)
		}, "is too long"},
		{"links of two archives with one number", func(f *forgery) {
			f.tmpfs()
			f.archive("tmpfs-999.tar.gz.img", &tar.Header{Name: "./x", Typeflag: tar.TypeSymlink, Linkname: descriptors})
			f.regular("/tmp/x/etc/shadow", 0)
		}, overLink},
		{"a link of a volume to the host", func(f *forgery) {
			must(f.t, os.Symlink("/etc", filepath.Join(f.volume(), "x")))
			f.regular("/volume/x/shadow", 0)
		}, ""}, // it is the container's /etc
		{"over a link of a tmpfs", func(f *forgery) {
			f.tmpfs(&tar.Header{Name: "./x", Linkname: descriptors, Typeflag: tar.TypeSymlink})
			f.regular("/tmp/x/etc/shadow", 0)
		}, overLink},
		{"over its second name", func(f *forgery) {
			f.tmpfs(&tar.Header{Name: "./x", Linkname: descriptors, Typeflag: tar.TypeSymlink}, &tar.Header{Name: "./y", Linkname: "./x", Typeflag: tar.TypeLink})
			f.regular("/tmp/y/etc/shadow", 0)
		}, overLink},
		{"a link with two targets", func(f *forgery) {
			f.tmpfs(&tar.Header{Name: "./x", Linkname: "/a", Typeflag: tar.TypeSymlink}, &tar.Header{Name: "./x", Linkname: "/b", Typeflag: tar.TypeSymlink})
		}, `tmpfs-dev-999.tar.gz.img: "./x" is a link to two files`},
		{"a file of a tmpfs", func(f *forgery) { f.tmpfs(); f.regular("/tmp/x/etc/shadow", 0) }, ""},

		{"emptied", open("/etc/passwd", unix.O_WRONLY|unix.O_TRUNC), `"/etc/passwd" is opened with flags 0x201, which would create or empty it`},
		{"made", open("/etc/passwd", unix.O_WRONLY|unix.O_CREAT), "which would create or empty it"},
		{"without a name", open("/etc", unix.O_RDWR|unix.O_TMPFILE), "which would create or empty it"},
		{"made without a name", func(f *forgery) {
			f.ghost(unix.S_IFREG)
			f.regular("/tmp/#17", unix.O_RDWR|unix.O_TMPFILE)
			f.remap(remap.RemapType_GHOST, 77, 1)
		}, ""},
		{"unknown flags", open("/etc/passwd", 1<<30), "which no open file has"},
		{"appended to", open("/etc/passwd", unix.O_WRONLY|unix.O_APPEND|unix.O_NONBLOCK|unix.O_SYNC|unix.O_DIRECT|largeFile|unix.O_NOATIME), ""},
		{"terminal", func(f *forgery) {
			f.addFile(&fdinfo.FileEntry{Type: fdinfo.FdTypes_TTY.Enum(), Id: u32(77), Tty: &tty.TtyFileEntry{Flags: u32(unix.O_CREAT)}})
		}, "open file 77: terminal is opened with flags 0x40"},
		{"memory file", func(f *forgery) {
			f.addFile(&fdinfo.FileEntry{Type: fdinfo.FdTypes_MEMFD.Enum(), Id: u32(77), Memfd: &memfd.MemfdFileEntry{Flags: u32(unix.O_TRUNC)}})
		}, "memory file is opened with flags 0x200"},

		{"socket over CRIU's descriptors", socket(&skunix.UnixSkEntry{Name: []byte(descriptors + "/run/s\x00")}), `unix socket "/proc/self/fd/121/2/root/run/s" ` + overLink},
		{"socket in such a folder", socket(&skunix.UnixSkEntry{Name: []byte("s\x00"), NameDir: proto.String("/proc/1/cwd")}), overLink},
		{"socket over a link", func(f *forgery) {
			f.link("/proc/1/root", "x")
			socket(&skunix.UnixSkEntry{Name: []byte("/x/run/s\x00")})(f)
		}, overLink},
		{"socket over a link in the container", func(f *forgery) {
			f.link("/run", "var/run")
			socket(&skunix.UnixSkEntry{Name: []byte("/var/run/s\x00")})(f)
		}, ""},
		{"socket in place of a file", func(f *forgery) {
			must(f.t, os.WriteFile(filepath.Join(f.root, "s"), nil, 0o644))
			socket(&skunix.UnixSkEntry{Name: []byte("/s\x00")})(f)
		}, "is no socket, and a restore would delete it"},
		{"socket in place of a socket", func(f *forgery) {
			l, err := net.Listen("unix", filepath.Join(f.root, "s"))
			must(f.t, err)
			f.t.Cleanup(func() { l.Close() })
			socket(&skunix.UnixSkEntry{Name: []byte("/s\x00")})(f)
		}, ""},
		{"socket in procfs", socket(&skunix.UnixSkEntry{Name: []byte("/proc/sys/s\x00")}), "is in a file system of the kernel's"},
		{"peer over CRIU's descriptors", func(f *forgery) {
			must(f.t, os.Symlink("/proc/1/root/run", filepath.Join(f.volume(), "x")))
			socket(&skunix.UnixSkEntry{Uflags: u32(unixExternal), Name: []byte("/volume/x/docker.sock\x00")})(f)
		}, overLink},

		{"deleted file over a link", func(f *forgery) {
			f.link("/etc", "x")
			f.ghost(unix.S_IFREG)
			f.regular("/x/deep/file", 0)
			f.remap(remap.RemapType_GHOST, 77, 1)
		}, "was deleted, and goes over a link now"},
		{"deleted file in the place of a link", func(f *forgery) {
			f.link("/etc/passwd", "x")
			f.ghost(unix.S_IFREG)
			f.regular("/x", 0)
			f.remap(remap.RemapType_GHOST, 77, 1)
		}, "was deleted, and goes over a link now"},
		{"deleted file in procfs", func(f *forgery) {
			f.ghost(unix.S_IFREG)
			f.regular("/proc/sys/x", 0)
			f.remap(remap.RemapType_GHOST, 77, 1)
		}, "was deleted, and is in a file system of the kernel's"},
		{"deleted file", func(f *forgery) { f.ghost(unix.S_IFREG); f.regular("/a/b/c", 0); f.remap(remap.RemapType_GHOST, 77, 1) }, ""},
		{"deleted link", func(f *forgery) { f.ghost(unix.S_IFLNK); f.remap(remap.RemapType_GHOST, 77, 1) }, "open file 77: a deleted file that is a link"},
		{"second name that is a link", func(f *forgery) {
			f.link("/proc/1/root/etc/shadow", "link_remap.3")
			f.regular("/link_remap.3", 0)
			f.remap(remap.RemapType_LINKED, 1, 77)
		}, "was deleted, and goes over a link now"},

		{"watch over a link", func(f *forgery) { f.link("/proc/1/root", "x"); watched("x/etc")(f) }, `watches "x/etc", which ` + overLink},
		{"watch", watched("./etc"), ""},
		{"watch of a file of root's", watched("proc/kmsg"), "shows more to root"},
		{"fanotify over a link", func(f *forgery) {
			f.grantCap("CAP_SYS_ADMIN")
			mark := filled(&fsnotify.FanotifyMarkEntry{Type: fsnotify.MarkType_MOUNT.Enum(), Me: &fsnotify.FanotifyMountMarkEntry{Path: proto.String("/proc/1/root")}})
			f.addFile(&fdinfo.FileEntry{Type: fdinfo.FdTypes_FANOTIFY.Enum(), Id: u32(77), Ffy: &fsnotify.FanotifyFileEntry{Mark: []*fsnotify.FanotifyMarkEntry{mark}}})
		}, `watches "/proc/1/root", which ` + overLink},

		{"mount over a link", func(f *forgery) {
			must(f.t, os.Symlink(descriptors, filepath.Join(f.volume(), "x")))
			f.spec.Mounts = append(f.spec.Mounts, specs.Mount{Destination: "/volume/x/a", Type: "tmpfs", Source: "tmpfs"})
			f.addMount(&mnt.MntEntry{Mountpoint: proto.String("/volume/x/a"), Fstype: u32(uint32(mnt.Fstype_TMPFS)), Root: proto.String("/"), RootDev: u32(998)})
		}, `the way to the mount at "/volume/x/a" ` + overLink},
		{"mount on a link", func(f *forgery) {
			must(f.t, os.Symlink("/etc", filepath.Join(f.volume(), "x")))
			f.spec.Mounts = append(f.spec.Mounts, specs.Mount{Destination: "/volume/x", Type: "tmpfs", Source: "tmpfs"})
			f.addMount(&mnt.MntEntry{Mountpoint: proto.String("/volume/x"), Fstype: u32(uint32(mnt.Fstype_TMPFS)), Root: proto.String("/"), RootDev: u32(998)})
		}, `the way to the mount at "/volume/x" goes over a link`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newForgery(t)
			tc.fn(f)
			f.held(77)
			// Each refusal of a file names who has it open.
			who := "process 6: "
			if strings.Contains(tc.want, "mount at") || strings.Contains(tc.want, "tmpfs") {
				who = ""
			}
			f.judged(tc.want, who)
		})
	}
}

// TestKernelFiles opens what procfs and sysfs have.
func TestKernelFiles(t *testing.T) {
	const own = true
	for _, tc := range []struct {
		name  string
		flags uint32
		own   bool // the process has it open
		want  string
	}{
		{"/proc/meminfo", 0, false, ""},
		{"/proc/sys/kernel/ostype", 0, false, ""},
		{"/proc", 0, false, ""},
		{"/proc/kmsg", 0, own, `process 6: fd 77: open file 77: "/proc/kmsg" shows more to root than to others`},
		{"/proc/kmsg", unix.O_PATH, own, ""},
		{"/proc/kallsyms", 0, own, "shows more to root than to others"},
		{"/proc/iomem", 0, own, "shows more to root than to others"},
		{"/proc/slabinfo", 0, own, "needs privileges to be opened (mode 0400)"},
		{"/proc/sys/vm/drop_caches", unix.O_WRONLY, own, "needs privileges to be opened"},
		{"/proc/sys/kernel/core_pattern", unix.O_RDWR, own, "needs privileges to be opened (mode 0644)"},
		{"/proc/none", 0, own, "is not on this host, and cannot be checked"},
		{"/proc/6/stat", 0, own, ""},
		{"/proc/7/stat", 0, own, ""},
		{"/proc/6/fd", 0, own, ""},
		{"/proc/6/environ", 0, own, ""},
		{"/proc/6/mem", unix.O_RDWR, own, ""},
		{"/proc/6/oom_score_adj", unix.O_WRONLY, own, ""},
		{"/proc/6/task/6/comm", unix.O_RDWR, own, ""},
		{"/proc/6/maps", 0, false, ""}, // a child has it
		{"/proc/7/maps", 0, own, "is of no process of the checkpoint"},
		{"/proc/7/environ", 0, own, "is of no process of the checkpoint"},
		{"/proc/7/mem", unix.O_RDWR, own, "needs privileges to be written"},
		{"/proc/7/task/6/mem", unix.O_RDWR, false, "needs privileges to be written"},
		{"/proc/6/uid_map", unix.O_WRONLY, own, "needs privileges to be written"},
		{"/proc/6/attr/current", unix.O_WRONLY, own, "needs privileges to be written"},
		{"/sys/kernel/uevent_seqnum", 0, false, ""},
		{"/sys/kernel/uevent_helper", unix.O_WRONLY, own, "needs privileges"},
		{"/sys/fs/cgroup/memory/memory.stat", 0, false, ""},
		{"/sys/fs/cgroup/memory/cgroup.procs", unix.O_WRONLY, false, "is a control group's, which needs CAP_SYS_ADMIN"},
	} {
		t.Run(fmt.Sprintf("%s %#x %v", tc.name, tc.flags, tc.own), func(t *testing.T) {
			if _, err := os.Stat(tc.name); err != nil && tc.name == "/sys/kernel/uevent_helper" {
				t.Skip(err)
			}
			f := newForgery(t)
			f.regular(tc.name, tc.flags)
			if tc.own {
				f.held(77)
			}
			f.judged(tc.want)
		})
	}
	// What opens an entry besides its own flags.
	f := newForgery(t)
	f.regular("/proc/sys/kernel/hostname", 0)
	f.accepted()
	one(f, "mm-6.img", "MM", func(m *mm.MmEntry) { *m.Vmas[0].Shmid, m.Vmas[0].Fdflags = 77, u32(unix.O_RDWR) })
	f.refused(`process 6: mapping at 0x400000: open file 77: "/proc/sys/kernel/hostname" needs privileges`)
	f = newForgery(t)
	f.regular("/proc/sys/kernel/hostname", 0)
	f.addFile(&fdinfo.FileEntry{Type: fdinfo.FdTypes_TTY.Enum(), Id: u32(78), Tty: &tty.TtyFileEntry{RegfId: u32(77), Flags: u32(unix.O_RDWR)}})
	f.refused("needs privileges")
	f = newForgery(t)
	f.regular("/proc/sys/kernel/hostname", 0)
	f.addFile(&fdinfo.FileEntry{Type: fdinfo.FdTypes_FIFO.Enum(), Id: u32(78), Fifo: &fifo.FifoEntry{RegfId: u32(77)}})
	f.refused("is opened as a FIFO, and is none")
	// The same files, in a volume.
	for name, want := range map[string]string{"sys/kernel/core_pattern": "needs privileges", "self/root/etc/shadow": "goes over a link of procfs",
		"1/environ": "shows more to root than to others", "kallsyms": "shows more to root"} {
		f = newForgery(t)
		f.volume()
		f.spec.Mounts[len(f.spec.Mounts)-1].Source = "/proc"
		f.regular("/volume/"+name, unix.O_RDWR)
		f.refused(want)
	}
}

// A folder of the root filesystem that is mounted on itself, or elsewhere, has the
// same files.
func TestPartOfRoot(t *testing.T) {
	for _, root := range []string{"/", "/snapshots/7/fs"} {
		f := newForgery(t)
		f.grantCap("CAP_SYS_ADMIN")
		f.link("/proc/1/root", "a/b/x")
		f.mount("/", func(m *mnt.MntEntry) { m.Root = &root })
		f.addMount(&mnt.MntEntry{Mountpoint: proto.String("/c"), Fstype: u32(17), RootDev: u32(101), Root: proto.String(filepath.Join(root, "a"))})
		f.regular("/c/b/none", 0)
		f.accepted()
		f.regular("/c/b/x/etc/shadow", 0)
		f.refused(`"/c/b/x/etc/shadow" goes over a link of procfs`)
	}
	f := newForgery(t)
	f.grantCap("CAP_SYS_ADMIN")
	f.mount("/", func(m *mnt.MntEntry) { m.Root = proto.String("/snapshots/7/fs") })
	f.addMount(&mnt.MntEntry{Mountpoint: proto.String("/c"), Fstype: u32(17), RootDev: u32(101), Root: proto.String("/etc")})
	f.regular("/c/shadow", 0)
	f.refused("is in a mount whose files cannot be checked")
}

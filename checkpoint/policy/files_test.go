package policy

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	bpfmap "github.com/checkpoint-restore/go-criu/v8/crit/images/bpfmap-file"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fh"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fown"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fsnotify"
	ghost "github.com/checkpoint-restore/go-criu/v8/crit/images/ghost-file"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/memfd"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/mnt"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/ns"
	packet "github.com/checkpoint-restore/go-criu/v8/crit/images/packet-sock"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/regfile"
	remap "github.com/checkpoint-restore/go-criu/v8/crit/images/remap-file-path"
	inet "github.com/checkpoint-restore/go-criu/v8/crit/images/sk-inet"
	netlink "github.com/checkpoint-restore/go-criu/v8/crit/images/sk-netlink"
	skopts "github.com/checkpoint-restore/go-criu/v8/crit/images/sk-opts"
	skunix "github.com/checkpoint-restore/go-criu/v8/crit/images/sk-unix"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/tty"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/tun"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// filled sets the required fields of a message to zero.
func filled[M proto.Message](m M) M {
	fill(m.ProtoReflect())
	return m
}

func fill(m protoreflect.Message) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		fd := fields.Get(i)
		if fd.Cardinality() == protoreflect.Required && !m.Has(fd) {
			m.Set(fd, m.NewField(fd))
		}
		if fd.Message() != nil && !fd.IsList() && m.Has(fd) {
			fill(m.Mutable(fd).Message())
		}
	}
}

// addFile adds an open file, number 77 if it has none.
func (f *forgery) addFile(e *fdinfo.FileEntry) {
	f.t.Helper()
	if e.Id == nil {
		e.Id = u32(77)
	}
	alter(f, "files.img", "FILES", func(all []*fdinfo.FileEntry) []*fdinfo.FileEntry { return append(all, filled(e)) })
}

func u32(n uint32) *uint32 { return &n }

func TestFiles(t *testing.T) {
	file := func(e *fdinfo.FileEntry) func(*forgery) {
		return func(f *forgery) { f.addFile(e) }
	}
	reg := func(r *regfile.RegFileEntry) func(*forgery) {
		return file(&fdinfo.FileEntry{Type: fdinfo.FdTypes_REG.Enum(), Id: u32(77), Reg: r})
	}
	volume := func(f *forgery) {
		f.spec.Mounts = append(f.spec.Mounts, specs.Mount{Destination: "/volume", Type: "bind", Source: "/"})
	}
	peer := func(name string) *fdinfo.FileEntry {
		return &fdinfo.FileEntry{Type: fdinfo.FdTypes_UNIXSK.Enum(), Usk: &skunix.UnixSkEntry{
			Uflags: u32(unixExternal), Name: []byte(name)}}
	}
	for _, tc := range []struct {
		name string
		fn   func(*forgery)
		want string // "" if it passes
	}{
		{"climbing path", reg(&regfile.RegFileEntry{Name: proto.String("/../../etc/shadow")}), `open file 77: path "/../../etc/shadow" climbs with ..`},
		{"relative path", reg(&regfile.RegFileEntry{Name: proto.String("etc/shadow")}), `path "etc/shadow" is not absolute`},
		{"external file", reg(&regfile.RegFileEntry{Name: proto.String("/a"), Ext: proto.Bool(true)}), `"/a" is external`},
		{"disk", reg(&regfile.RegFileEntry{Name: proto.String("/dev/sda"), Mode: u32(unix.S_IFBLK)}), `"/dev/sda" is a device that the spec does not have`},
		{"terminal", reg(&regfile.RegFileEntry{Name: proto.String("/dev/pts/0"), Mode: u32(unix.S_IFCHR)}), ""},
		{"external", file(&fdinfo.FileEntry{Type: fdinfo.FdTypes_EXT.Enum()}), "is of kind EXT, which comes from outside"},
		{"signals of another", func(f *forgery) {
			f.addFile(&fdinfo.FileEntry{Type: fdinfo.FdTypes_REG.Enum(), Reg: &regfile.RegFileEntry{
				Name: proto.String("/a"), Fown: &fown.FownEntry{Pid: u32(1)}}})
		}, "sends signals as user 0/0"},
		{"raw socket", func(f *forgery) {
			f.addFile(&fdinfo.FileEntry{Type: fdinfo.FdTypes_INETSK.Enum(), Isk: &inet.InetSkEntry{Type: u32(unix.SOCK_RAW), Proto: u32(1)}})
		}, "raw socket of protocol 1 needs CAP_NET_RAW"},
		{"packet socket", func(f *forgery) {
			f.addFile(&fdinfo.FileEntry{Type: fdinfo.FdTypes_PACKETSK.Enum(), Psk: &packet.PacketSockEntry{}})
		}, "packet socket needs CAP_NET_RAW"},
		{"packet mark", func(f *forgery) {
			f.addFile(&fdinfo.FileEntry{Type: fdinfo.FdTypes_INETSK.Enum(), Isk: &inet.InetSkEntry{Opts: &skopts.SkOptsEntry{SoMark: u32(0x200)}}})
		}, "packet mark 0x200"},
		{"socket of another network", file(&fdinfo.FileEntry{Type: fdinfo.FdTypes_INETSK.Enum(), Isk: &inet.InetSkEntry{NsId: u32(2)}}), "is a socket of network namespace 2"},
		{"audit", file(&fdinfo.FileEntry{Type: fdinfo.FdTypes_NETLINKSK.Enum(), Nlsk: &netlink.NetlinkSkEntry{Protocol: u32(unix.NETLINK_AUDIT)}}), "netlink socket of protocol 9"},
		{"host's namespace", file(&fdinfo.FileEntry{Type: fdinfo.FdTypes_NS.Enum(), Nsf: &ns.NsFileEntry{NsId: u32(6)}}), "is the host's mount namespace"},
		{"tun", file(&fdinfo.FileEntry{Type: fdinfo.FdTypes_TUNF.Enum(), Tunf: &tun.TunfileEntry{}}), "tun device"},
		{"eBPF map", file(&fdinfo.FileEntry{Type: fdinfo.FdTypes_BPFMAP.Enum(), Bpf: &bpfmap.BpfmapFileEntry{}}), "eBPF map needs CAP_BPF"},
		{"fanotify", file(&fdinfo.FileEntry{Type: fdinfo.FdTypes_FANOTIFY.Enum(), Ffy: &fsnotify.FanotifyFileEntry{}}), "fanotify needs CAP_SYS_ADMIN"},
		{"peer in no mount", file(peer("/run/docker.sock\x00")), `is connected to unix socket "/run/docker.sock", which is in none of the spec's mounts`},
		{"peer in a mount", func(f *forgery) {
			volume(f)
			f.addFile(peer("/volume/socket\x00"))
			if err := f.check(); err == nil || !bytes.Contains([]byte(err.Error()), []byte("no mount at /volume")) {
				f.t.Errorf("%v", err)
			}
			f.spec.Mounts = f.spec.Mounts[:len(f.spec.Mounts)-1]
		}, "unix socket"},
		{"climbing peer", file(peer("/etc/hosts/../x\x00")), "climbs with .."},
		{"abstract peer in the pod", file(peer("\x00bus")), ""},
		{"socket of another user", func(f *forgery) {
			f.addFile(&fdinfo.FileEntry{Type: fdinfo.FdTypes_UNIXSK.Enum(), Usk: &skunix.UnixSkEntry{
				Name: []byte("/s\x00"), FilePerms: filled(&skunix.FilePermsEntry{})}})
		}, `unix socket "/s" belongs to 0:0`},
		{"watch on a climbing path", file(&fdinfo.FileEntry{Type: fdinfo.FdTypes_INOTIFY.Enum(), Ify: &fsnotify.InotifyFileEntry{
			Wd: []*fsnotify.InotifyWdEntry{filled(&fsnotify.InotifyWdEntry{FHandle: &fh.FhEntry{Path: proto.String("../x")}})}}}), "climbs with .."},
		{"watch by handle", file(&fdinfo.FileEntry{Type: fdinfo.FdTypes_INOTIFY.Enum(), Ify: &fsnotify.InotifyFileEntry{
			Wd: []*fsnotify.InotifyWdEntry{filled(&fsnotify.InotifyWdEntry{SDev: u32(266338304), IIno: proto.Uint64(4711),
				FHandle: &fh.FhEntry{Bytes: u32(8), Type: u32(1), Handle: []uint64{1}}})}}}), "by a handle (inode 4711) that is in none of the spec's mounts"},
		{"deletion", func(f *forgery) {
			f.addFile(&fdinfo.FileEntry{Type: fdinfo.FdTypes_REG.Enum(), Id: u32(78), Reg: &regfile.RegFileEntry{Id: u32(78), Name: proto.String("/data/precious")}})
			f.remap(remap.RemapType_LINKED, 77, 78)
		}, `a restore would delete "/data/precious"`},
		{"second name", func(f *forgery) {
			f.addFile(&fdinfo.FileEntry{Type: fdinfo.FdTypes_REG.Enum(), Id: u32(77), Reg: &regfile.RegFileEntry{Id: u32(77), Name: proto.String("/data/link_remap.3")}})
			f.write("remap-fpath.img", "REMAP_FPATH", &remap.RemapFilePathEntry{OrigId: u32(1), RemapId: u32(77), RemapType: remap.RemapType_LINKED.Enum()})
		}, ""},
		{"deleted device", func(f *forgery) {
			f.write("ghost-file-1.img", "GHOST_FILE", filled(&ghost.GhostFileEntry{Mode: u32(unix.S_IFBLK | 0o666)}))
			f.remap(remap.RemapType_GHOST, 77, 1)
		}, "a deleted file that is a device"},
		{"deleted file of root", func(f *forgery) {
			f.write("ghost-file-1.img", "GHOST_FILE", filled(&ghost.GhostFileEntry{Mode: u32(unix.S_IFREG | unix.S_ISUID | 0o755)}))
			f.remap(remap.RemapType_GHOST, 77, 1)
		}, "a deleted file of 0:0"},
		{"memory file of root", func(f *forgery) {
			f.write("memfd.img", "MEMFD_INODE", filled(&memfd.MemfdInodeEntry{Name: proto.String("m"), InodeId: proto.Uint64(5)}))
			f.addFile(&fdinfo.FileEntry{Type: fdinfo.FdTypes_MEMFD.Enum(), Memfd: &memfd.MemfdFileEntry{InodeId: u32(5)}})
		}, `memory file "m" belongs to 0:0`},
		{"virtual terminal", func(f *forgery) {
			f.write("tty-info.img", "TTY_INFO", filled(&tty.TtyInfoEntry{Id: u32(5), Type: tty.TtyType_VT.Enum()}))
			f.addFile(&fdinfo.FileEntry{Type: fdinfo.FdTypes_TTY.Enum(), Tty: &tty.TtyFileEntry{TtyInfoId: u32(5)}})
		}, "terminal 5 is of kind VT"},
		{"label", func(f *forgery) {
			one(f, "fdinfo-2.img", "FDINFO", func(e *fdinfo.FdinfoEntry) { e.XattrSecuritySelinux = proto.String("other") })
		}, `process 6: fd 0: open file 2: descriptor 0 in fdinfo-2.img has the label "other"`},
		{"unknown kind", func(f *forgery) {
			f.addFile(&fdinfo.FileEntry{Type: fdinfo.FdTypes_UND.Enum()})
		}, "is of kind UND"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := confined(t)
			tc.fn(f)
			f.held(77)
			// Each refusal names who has the file open.
			who := "process 6: fd 77: open file 77: "
			if strings.HasPrefix(tc.want, "process 6: ") {
				who = ""
			}
			f.judged(tc.want, who)
		})
	}
	// A file that no process has open.
	f := newForgery(t)
	f.addFile(&fdinfo.FileEntry{Type: fdinfo.FdTypes_EXT.Enum()})
	f.refused("grants: open file 77: is of kind EXT")
	f = confined(t)
	f.write("ghost-file-1.img", "GHOST_FILE", filled(&ghost.GhostFileEntry{Mode: u32(unix.S_IFREG)}))
	f.refused("grants: ghost-file-1.img: a deleted file of 0:0")
}

func TestTmpfs(t *testing.T) {
	archive := func(headers ...*tar.Header) []byte {
		var b bytes.Buffer
		z := gzip.NewWriter(&b)
		w := tar.NewWriter(z)
		for _, h := range headers {
			must(t, w.WriteHeader(h))
		}
		must(t, w.Close())
		must(t, z.Close())
		return b.Bytes()
	}
	disk := &tar.Header{Name: "./sda", Typeflag: tar.TypeBlock, Devmajor: 8}
	for _, tc := range []struct {
		name string
		data []byte
		want string
	}{
		{"plain", archive(&tar.Header{Name: "./a", Typeflag: tar.TypeDir}, &tar.Header{Name: "./null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3}), ""},
		{"disk", archive(disk), `"./sda" is device 8:0, which the spec does not have`},
		{"climbing", archive(&tar.Header{Name: "../a", Typeflag: tar.TypeDir}), `file "../a" is outside of its mount`},
		{"absolute", archive(&tar.Header{Name: "/a", Typeflag: tar.TypeDir}), `file "/a" is outside`},
		{"link", archive(&tar.Header{Name: "a", Linkname: "../../b", Typeflag: tar.TypeLink}), "is outside"},
		{"behind a link", archive(&tar.Header{Name: "./a", Linkname: "/etc", Typeflag: tar.TypeSymlink}, &tar.Header{Name: "./a/b/passwd", Typeflag: tar.TypeReg}),
			`"./a/b/passwd" is behind a link`},
		{"kind", archive(&tar.Header{Name: "a", Typeflag: 'V'}), "unknown kind ('V')"},
		{"no archive", []byte("x"), "no gzip"},
		{"cut", archive(disk)[:40], "no tar archive"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := confined(t)
			f.raw("tmpfs-dev-99.tar.gz.img", tc.data)
			f.judged(tc.want, "tmpfs-dev-99.tar.gz.img")
		})
	}
	// One that leads a mount astray. /dev is tmpfs-dev-N, and /dev/shm a mount.
	f := confined(t)
	dev, err := filepath.Glob(filepath.Join(f.dir, "tmpfs-dev-*"))
	must(t, err)
	alter(f, mountsImage, "MNTS", func(all []*mnt.MntEntry) []*mnt.MntEntry {
		for _, m := range all {
			if name := fmt.Sprintf("tmpfs-dev-%d.tar.gz.img", m.GetRootDev()); m.GetMountpoint() == "/dev" && slices.Contains(dev, filepath.Join(f.dir, name)) {
				f.raw(name, archive(&tar.Header{Name: "./shm", Linkname: "/etc", Typeflag: tar.TypeSymlink}))
			}
		}
		return nil
	})
	f.refused(`"shm" is a link on the way to the mount at "/dev/shm"`)
	// The container can make it too; it cannot open it.
	f = newForgery(t)
	f.raw("tmpfs-dev-99.tar.gz.img", archive(disk))
	f.accepted()
}

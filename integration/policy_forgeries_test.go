package integration

import (
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/crit"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/cgroup"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fh"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fown"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fs"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fsnotify"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/mnt"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/regfile"
	inet "github.com/checkpoint-restore/go-criu/v8/crit/images/sk-inet"
	skopts "github.com/checkpoint-restore/go-criu/v8/crit/images/sk-opts"
	skunix "github.com/checkpoint-restore/go-criu/v8/crit/images/sk-unix"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/vma"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// hostRoot is how a path gets at the host's files while CRIU restores: it has the
// host's /proc open as this descriptor.
const hostRoot = "/proc/self/fd/121/2/root"

// named lets a process have another file in place of the one whose path ends so.
func named(old, name string, flags uint32) forgery {
	return forgery{file: "files.img", kind: &fdinfo.FileEntry{}, late: true, do: func(all []*crit.CriuEntry) []*crit.CriuEntry {
		for _, e := range all {
			if reg := e.Message.(*fdinfo.FileEntry).GetReg(); strings.HasSuffix(reg.GetName(), old) && reg != nil {
				*reg.Name, *reg.Flags, reg.Mode, reg.Size, reg.BuildId = name, flags, nil, nil, nil
				break
			}
		}
		return all
	}}
}

// more adds an open file, which the process has as descriptor 77.
func more(e *fdinfo.FileEntry) forgery {
	return added(e).and(forgery{file: "fdinfo-*.img", kind: &fdinfo.FdinfoEntry{}, do: func(all []*crit.CriuEntry) []*crit.CriuEntry {
		return append(all, &crit.CriuEntry{Message: &fdinfo.FdinfoEntry{Id: proto.Uint32(777), Fd: proto.Uint32(77), Flags: proto.Uint32(0), Type: e.Type}})
	}}).says("process 1: fd 77: open file 777")
}

// added adds an entry of an open file, which nothing has open.
func added(e *fdinfo.FileEntry) forgery {
	return forgery{file: "files.img", kind: &fdinfo.FileEntry{}, do: func(all []*crit.CriuEntry) []*crit.CriuEntry {
		e.Id = proto.Uint32(777)
		return append(all, &crit.CriuEntry{Message: e})
	}}
}

// other adds a regular file of that name, number 777, and nothing that has it open.
func other(name string) forgery {
	return added(&fdinfo.FileEntry{Type: fdinfo.FdTypes_REG.Enum(), Reg: &regfile.RegFileEntry{Id: proto.Uint32(777), Flags: proto.Uint32(0),
		Pos: proto.Uint64(0), Fown: nobody(), Name: &name}}).inStart()
}

func (f forgery) inStart() forgery { f.late = true; return f }
func (f forgery) early() forgery   { f.late = false; return f }

func nobody() *fown.FownEntry {
	return &fown.FownEntry{Uid: proto.Uint32(0), Euid: proto.Uint32(0), Signum: proto.Uint32(0), PidType: proto.Uint32(0), Pid: proto.Uint32(0)}
}

func noOptions() *skopts.SkOptsEntry {
	return &skopts.SkOptsEntry{SoSndbuf: proto.Uint32(0), SoRcvbuf: proto.Uint32(0), SoSndTmoSec: proto.Uint64(0), SoSndTmoUsec: proto.Uint64(0),
		SoRcvTmoSec: proto.Uint64(0), SoRcvTmoUsec: proto.Uint64(0)}
}

// memory replaces the mappings of the process; fn has the first of them.
func memory(fn func(m *mm.MmEntry, first *vma.VmaEntry)) forgery {
	return forgery{file: "mm-1.img", kind: &mm.MmEntry{}, do: first(func(m *mm.MmEntry) { fn(m, m.Vmas[0]) }), want: []string{"process 1 (sleep): memory at address"}}
}

// at is a copy of a mapping elsewhere.
func at(v *vma.VmaEntry, start, end uint64, status uint32) *vma.VmaEntry {
	n := proto.Clone(v).(*vma.VmaEntry)
	*n.Start, *n.End, *n.Pgoff, *n.Status = start, end, 0, status
	return n
}

func groups(fn func(*cgroup.CgroupEntry)) forgery {
	return forgery{file: "cgroup.img", kind: &cgroup.CgroupEntry{}, do: first(fn), want: []string{"cgroup.img"}}
}

const onlyProcfsLink = "goes over a link of procfs"

// hostileForgeries are those with which a container has come to files of the host,
// to what the kernel has, or to run code as CRIU.
var hostileForgeries = map[string]forgery{
	"CRIU's descriptors":   named("/dev/null", hostRoot+"/etc/shadow", 0).says("process 1: fd 0", hostRoot+"/etc/shadow", onlyProcfsLink),
	"over a link":          named("/dev/null", "/x/etc/shadow", 0).says("process 1: fd 0", `"/x/etc/shadow"`, onlyProcfsLink),
	"over one of a volume": named("/dev/null", "/volume/x/etc/shadow", 0).says("process 1: fd 0", onlyProcfsLink),
	"over one of a tmpfs":  named("/dev/null", "/dev/shm/x/etc/shadow", 0).says("process 1: fd 0", onlyProcfsLink),
	"working folder":       named("/", hostRoot, 0).says("process 1: cwd", onlyProcfsLink),
	"executable":           named("/busybox", hostRoot+"/bin/sh", 0).says("process 1: exe", onlyProcfsLink),
	"root folder": other(hostRoot).and(forgery{file: "fs-1.img", kind: &fs.FsEntry{}, do: first(func(e *fs.FsEntry) { *e.RootId = 777 })}).
		says("process 1: root: open file 777", onlyProcfsLink),
	"mapped file": other(hostRoot+"/etc/passwd").and(forgery{file: "mm-1.img", kind: &mm.MmEntry{}, do: first(func(m *mm.MmEntry) {
		for _, v := range m.Vmas {
			if v.GetStatus()&(1<<6|1<<7) != 0 { // of a file: VMA_FILE_PRIVATE, VMA_FILE_SHARED
				*v.Shmid = 777
				return
			}
		}
	})}).says("process 1: mapping at 0x", "open file 777", onlyProcfsLink),
	"deleted file":             named("/deleted", hostRoot+"/etc/deleted", unix.O_WRONLY).says("process 1: fd 3", hostRoot+"/etc/deleted", onlyProcfsLink),
	"deleted file over a link": named("/deleted", "/volume/x/etc/deleted", unix.O_WRONLY).says("process 1: fd 3", onlyProcfsLink),
	"deleted file that climbs": named("/deleted", "/volume/../../deleted", unix.O_WRONLY).early().says("process 1: fd 3", "climbs with .."),
	"kernel messages":          named("/dev/null", "/proc/kmsg", 0).says("process 1: fd 0", "/proc/kmsg", "shows more to root"),
	"addresses":                named("/dev/null", "/proc/kallsyms", 0).says("process 1: fd 0", "/proc/kallsyms", "shows more to root"),
	"setting of the kernel":    named("/dev/null", "/proc/sys/kernel/core_pattern", unix.O_RDWR).says("process 1: fd 0", "needs privileges to be opened"),
	"made file":                openFile(func(f *fdinfo.FileEntry) { *f.Reg.Flags |= unix.O_CREAT }).says("would create or empty it"),
	"emptied file":             openFile(func(f *fdinfo.FileEntry) { *f.Reg.Flags |= unix.O_TRUNC }).says("would create or empty it"),
	"socket": more(&fdinfo.FileEntry{Type: fdinfo.FdTypes_UNIXSK.Enum(), Usk: &skunix.UnixSkEntry{Id: proto.Uint32(777), Ino: proto.Uint32(777),
		Type: proto.Uint32(unix.SOCK_STREAM), State: proto.Uint32(10), Flags: proto.Uint32(2), Uflags: proto.Uint32(0), Backlog: proto.Uint32(1),
		Peer: proto.Uint32(0), Fown: nobody(), Opts: noOptions(), Name: []byte("/x/run/s\x00")}}).inStart().says("unix socket", onlyProcfsLink),
	"watch": more(&fdinfo.FileEntry{Type: fdinfo.FdTypes_INOTIFY.Enum(), Ify: &fsnotify.InotifyFileEntry{Id: proto.Uint32(777), Flags: proto.Uint32(0),
		Fown: nobody(), Wd: []*fsnotify.InotifyWdEntry{{Id: proto.Uint32(777), IIno: proto.Uint64(1), Mask: proto.Uint32(1), IgnoredMask: proto.Uint32(0),
			SDev: proto.Uint32(1), Wd: proto.Uint32(1), FHandle: &fh.FhEntry{Bytes: proto.Uint32(0), Type: proto.Uint32(0), Path: proto.String("x/etc")}}}}}).
		inStart().says("watches", onlyProcfsLink),
	"port": more(&fdinfo.FileEntry{Type: fdinfo.FdTypes_INETSK.Enum(), Isk: &inet.InetSkEntry{Id: proto.Uint32(777), Ino: proto.Uint32(777),
		Family: proto.Uint32(unix.AF_INET), Type: proto.Uint32(unix.SOCK_STREAM), Proto: proto.Uint32(unix.IPPROTO_TCP), State: proto.Uint32(10),
		SrcPort: proto.Uint32(22), DstPort: proto.Uint32(0), Flags: proto.Uint32(2), Backlog: proto.Uint32(1), SrcAddr: []uint32{0}, DstAddr: []uint32{0},
		Fown: nobody(), Opts: noOptions()}}).says("src_port 22", "needs CAP_NET_BIND_SERVICE"),

	"mounted too early": {file: "mountpoints-*.img", kind: &mnt.MntEntry{}, late: true, do: func(all []*crit.CriuEntry) []*crit.CriuEntry {
		ids := map[string]*uint32{}
		for _, e := range all {
			m := e.Message.(*mnt.MntEntry)
			ids[m.GetMountpoint()] = m.MntId
			if m.GetMountpoint() == "/proc/sys" {
				ids["parent"] = m.ParentMntId
			}
		}
		*ids["parent"] = *ids["/"]
		return all
	}, want: []string{`mount at "/proc/sys" is below that at "/", not that at "/proc"`}},
	"one number": oneMount("/proc/keys", func(m *mnt.MntEntry) bool { *m.MntId = m.GetParentMntId(); return true }).says(`has the number`, "of another one"),

	"guard over the restorer": memory(func(m *mm.MmEntry, v *vma.VmaEntry) {
		m.Vmas = append([]*vma.VmaEntry{at(v, 0x10000, 0x11000, 65), at(v, 0x300000, 0x301000, 1<<16), at(v, 0x11000, 0x201000, 65)}, m.Vmas...)
	}).says("0x300000", "is a guard of no mapping"),
	"last mapping over the restorer": {file: "mm-1.img", kind: &mm.MmEntry{}, do: first(func(m *mm.MmEntry) {
		v := m.Vmas[0]
		m.Vmas = []*vma.VmaEntry{at(v, 0x10000, 0x20000, 65), at(v, 0x20000, 0x400000, 65)}
	}), want: []string{"process 1 (sleep): memory has no gap that is large enough for CRIU's own code"}},
	"overlap":            memory(func(m *mm.MmEntry, v *vma.VmaEntry) { m.Vmas = append([]*vma.VmaEntry{v}, m.Vmas...) }).says("is not above the one before it"),
	"CRIU's own file":    memory(func(_ *mm.MmEntry, v *vma.VmaEntry) { *v.Fd = 121 }).says("is of CRIU's own descriptor 121"),
	"mapped before":      memory(func(_ *mm.MmEntry, v *vma.VmaEntry) { *v.Status |= 1 << 30 }).says("has the status"),
	"emptied by mapping": memory(func(_ *mm.MmEntry, v *vma.VmaEntry) { v.Fdflags = proto.Uint32(unix.O_RDWR | unix.O_TRUNC) }).says("would create or empty it"),

	"devices": groups(func(e *cgroup.CgroupEntry) {
		p := e.Controllers[0].Dirs[0].Properties[0]
		*p.Name, *p.Value = "devices.allow", "a *:* rwm"
	}).says(`property "devices.allow"`),
	"devices with the checkpoint's limits": func() forgery {
		f := groups(func(e *cgroup.CgroupEntry) {
			p := e.Controllers[0].Dirs[0].Properties[0]
			*p.Name, *p.Value = "devices.allow", "a *:* rwm"
		}).says(`property "devices.allow"`)
		f.full = true
		return f
	}(),
	"limits for all to write": groups(func(e *cgroup.CgroupEntry) {
		*e.Controllers[0].Dirs[0].DirPerms.Mode |= 0o002
	}).says("has the mode 0757, at most 0755"),
	"hierarchy": groups(func(e *cgroup.CgroupEntry) {
		e.Controllers = append(e.Controllers, &cgroup.CgControllerEntry{Cnames: []string{"name=evil"}, Dirs: []*cgroup.CgroupDirEntry{{DirName: proto.String("x")}}})
		e.Sets[0].Ctls = append(e.Sets[0].Ctls, &cgroup.CgMemberEntry{Name: proto.String("name=evil"), Path: proto.String("/x"), CgnsPrefix: proto.Uint32(2)})
	}).says(`controller "name=evil" is none that this host has`),
	"release agent": groups(func(e *cgroup.CgroupEntry) {
		p := e.Controllers[0].Dirs[0].Properties[0]
		*p.Name, *p.Value = "notify_on_release", "1"
	}).says("release agent"),
}

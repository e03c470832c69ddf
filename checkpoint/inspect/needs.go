package inspect

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/mnt"
	inet "github.com/checkpoint-restore/go-criu/v8/crit/images/sk-inet"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/criu/img"
	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/layout"
)

// readMounts reads the mounts of every mount namespace.
func (r *reader) readMounts() error {
	for _, name := range slices.Sorted(maps.Keys(r.folder.files)) {
		if !layout.Mounts.Has(name) {
			continue
		}
		first := len(r.report.Mounts)
		err := r.folder.each(name, "MNTS", func(msg []byte) error {
			var e mnt.MntEntry
			if err := img.Decode(msg, &e); err != nil {
				return err
			}
			for _, s := range []string{e.GetMountpoint(), e.GetSource(), e.GetRoot(), e.GetExtKey()} {
				if len(s) > maxPath {
					return fault.Invalid("mount %d has a name of %d bytes", e.GetMntId(), len(s))
				}
			}
			m := Mount{
				Mountpoint: cleanMountpoint(text(e.GetMountpoint())), Source: text(e.GetSource()), Root: text(e.GetRoot()),
				Type: strings.ToLower(mnt.Fstype(e.GetFstype()).String()), External: text(e.GetExtKey()),
				Options:  text(e.GetOptions()[:min(len(e.GetOptions()), maxPath)]),
				ReadOnly: e.GetFlags()&unix.MS_RDONLY != 0,
			}
			if fs := mnt.Fstype(e.GetFstype()); fs == mnt.Fstype_AUTO || fs == mnt.Fstype_UNSUPPORTED {
				m.Type = text(e.GetFsname()[:min(len(e.GetFsname()), maxPath)])
			}
			if m.External == "" && e.GetExtMount() {
				m.External = m.Mountpoint
			}
			r.report.Mounts = append(r.report.Mounts, m)
			return r.take(1)
		})
		if err != nil {
			return err
		}
		slices.Reverse(r.report.Mounts[first:]) // CRIU begins with the last
	}
	return nil
}

// cleanMountpoint removes the dot with which CRIU writes paths in a namespace.
func cleanMountpoint(path string) string {
	if rest, ok := strings.CutPrefix(path, "."); ok && (rest == "" || rest[0] == '/') {
		path = rest
	}
	if path == "" {
		return "/"
	}
	return path
}

// needAddress notes the local address of a TCP connection.
func (r *reader) needAddress(sk *inet.InetSkEntry) {
	state := sk.GetState()
	if sk.GetProto() != unix.IPPROTO_TCP || state == stateClosed || state == stateListen || r.report.TCPClosed {
		return
	}
	addr, ok := address(sk.GetSrcAddr())
	if !ok || addr.IsLoopback() {
		return
	}
	r.addresses[addr.String()] = true
}

// optionFor are options of the kernel without which a kind of file cannot be
// restored.
var optionFor = map[fdinfo.FdTypes]string{
	fdinfo.FdTypes_EVENTFD: "EVENTFD", fdinfo.FdTypes_EVENTPOLL: "EPOLL", fdinfo.FdTypes_INOTIFY: "INOTIFY_USER",
	fdinfo.FdTypes_FANOTIFY: "FANOTIFY", fdinfo.FdTypes_SIGNALFD: "SIGNALFD", fdinfo.FdTypes_TIMERFD: "TIMERFD",
	fdinfo.FdTypes_MEMFD: "MEMFD_CREATE", fdinfo.FdTypes_PACKETSK: "PACKET", fdinfo.FdTypes_TUNF: "TUN",
	fdinfo.FdTypes_BPFMAP: "BPF_SYSCALL", fdinfo.FdTypes_UNIXSK: "UNIX", fdinfo.FdTypes_INETSK: "INET",
}

// needs tells what a host must have.
func (r *reader) needs() Needs {
	n := r.report.Needs
	n.Architecture = r.report.Architecture
	if m := r.report.Manifest; m != nil {
		n.CPUFeatures = m.CPUFeatures
	}
	options := map[string]bool{"CHECKPOINT_RESTORE": true}
	for kind := range r.files.kinds {
		if option := optionFor[kind]; option != "" {
			options[option] = true
		}
	}
	ns := r.namespace
	for option, used := range map[string]bool{
		"PID_NS": ns.GetPidNsId() != 0, "NET_NS": ns.GetNetNsId() != 0, "IPC_NS": ns.GetIpcNsId() != 0,
		"UTS_NS": ns.GetUtsNsId() != 0, "USER_NS": ns.GetUserNsId() != 0 && r.has("userns-"),
		"TIME_NS": ns.GetTimeNsId() != 0, "CGROUPS": ns.GetCgroupNsId() != 0,
	} {
		if used {
			options[option] = true
		}
	}
	files := map[string]bool{}
	for _, p := range r.report.Processes {
		if p.Credentials.Seccomp == "filter" {
			options["SECCOMP_FILTER"] = true
		}
		for _, m := range p.Memory.Mappings {
			switch m.Kind {
			case "aio":
				options["AIO"] = true
			case "sysv":
				options["SYSVIPC"] = true
			}
			if m.Kind == "file" && m.File != "" {
				files[m.File] = true
			}
		}
		for _, d := range p.Descriptors {
			if d.Kind == "file" && d.Path != "" && !d.Deleted && !d.External {
				files[d.Path] = true
			}
		}
	}
	for _, d := range r.files.open {
		if d.Deleted {
			delete(files, d.Path) // the checkpoint has it
		}
	}
	for _, m := range r.report.Mounts {
		if m.External != "" {
			n.Mounts = append(n.Mounts, fmt.Sprintf("%s (%s)", m.Mountpoint, m.External))
		}
	}
	n.KernelOptions = slices.Sorted(maps.Keys(options))
	n.Files = slices.Sorted(maps.Keys(files))
	n.Addresses = slices.Sorted(maps.Keys(r.addresses))
	return n
}

// has tells whether there is an image whose name starts so.
func (r *reader) has(prefix string) bool {
	for name := range r.folder.files {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	return false
}

package inspect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	remap "github.com/checkpoint-restore/go-criu/v8/crit/images/remap-file-path"
	inet "github.com/checkpoint-restore/go-criu/v8/crit/images/sk-inet"
	skunix "github.com/checkpoint-restore/go-criu/v8/crit/images/sk-unix"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/criu/img"
	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/layout"
)

// fileTable is files.img: what descriptors and mappings refer to by number.
type fileTable struct {
	// open has the open files. What a Descriptor says of the process is unset.
	open map[uint32]Descriptor
	// regular are the paths of regular files, which mappings refer to as well.
	regular map[uint32]string
	kinds   map[fdinfo.FdTypes]bool // that are there
}

func (t *fileTable) path(id uint32) string { return t.regular[id] }

// readFiles reads files.img.
func (r *reader) readFiles() error {
	t := &fileTable{map[uint32]Descriptor{}, map[uint32]string{}, map[fdinfo.FdTypes]bool{}}
	r.files = t
	// What refers to other files is resolved when all are known.
	type late struct{ id, regular uint32 }
	var refers []late
	var unixSockets []*skunix.UnixSkEntry
	err := r.folder.each(layout.Files, "FILES", func(msg []byte) error {
		var e fdinfo.FileEntry
		if err := img.Decode(msg, &e); err != nil {
			return err
		}
		if err := r.take(1); err != nil {
			return err
		}
		t.kinds[e.GetType()] = true
		d := Descriptor{Kind: kinds[e.GetType()]}
		if d.Kind == "" {
			d.Kind = strings.ToLower(e.GetType().String())
		}
		switch {
		case e.Reg != nil:
			if len(e.Reg.GetName()) > maxPath {
				return fault.Invalid("file %d has a name of %d bytes", e.GetId(), len(e.Reg.GetName()))
			}
			d.Path = text(e.Reg.GetName())
			t.regular[e.GetId()] = d.Path
			d.Flags = openFlags(e.Reg.GetFlags())
			d.Offset = int64(e.Reg.GetPos())
			d.External = e.Reg.GetExt()
			switch e.Reg.GetMode() & unix.S_IFMT {
			case unix.S_IFDIR:
				d.Kind = "folder"
			case unix.S_IFCHR, unix.S_IFBLK:
				d.Kind = "device"
			default:
				d.Size = int64(e.Reg.GetSize())
			}
		case e.Isk != nil:
			s := inetSocket(e.Isk)
			d.Kind, d.Path = s.Kind, join(s)
			d.Flags = openFlags(e.Isk.GetFlags())
			r.report.Sockets = append(r.report.Sockets, s)
			r.needAddress(e.Isk)
		case e.Usk != nil:
			if len(e.Usk.GetName()) > maxPath {
				return fault.Invalid("socket %d has a name of %d bytes", e.GetId(), len(e.Usk.GetName()))
			}
			unixSockets = append(unixSockets, &skunix.UnixSkEntry{
				Id: e.Usk.Id, Ino: e.Usk.Ino, Type: e.Usk.Type, State: e.Usk.State, Flags: e.Usk.Flags,
				Uflags: e.Usk.Uflags, Peer: e.Usk.Peer, Name: e.Usk.Name,
			})
		case e.Pipe != nil:
			d.Path = fmt.Sprintf("pipe:[%d]", e.Pipe.GetPipeId())
			d.Flags = openFlags(e.Pipe.GetFlags())
		case e.Fifo != nil:
			refers = append(refers, late{e.GetId(), e.Fifo.GetRegfId()})
		case e.Tty != nil:
			d.Flags = openFlags(e.Tty.GetFlags())
			refers = append(refers, late{e.GetId(), e.Tty.GetRegfId()})
		case e.Efd != nil:
			d.Flags = openFlags(e.Efd.GetFlags())
		case e.Epfd != nil:
			d.Flags = openFlags(e.Epfd.GetFlags())
			d.Path = fmt.Sprintf("%d watched", len(e.Epfd.GetTfd()))
		case e.Pidfd != nil:
			d.Path = fmt.Sprintf("process %d", e.Pidfd.GetNspid())
		case e.Memfd != nil:
			d.Flags, d.Offset = openFlags(e.Memfd.GetFlags()), int64(e.Memfd.GetPos())
		case e.Ext != nil:
			d.External = true
		}
		t.open[e.GetId()] = d
		return nil
	})
	if errors.Is(err, fs.ErrNotExist) {
		return fault.Invalid("files.img: missing; the checkpoint is incomplete, or was made by a CRIU older than 3.3")
	}
	if err != nil {
		return err
	}
	for _, l := range refers {
		d := t.open[l.id]
		d.Path = t.path(l.regular)
		t.open[l.id] = d
	}
	r.unixSockets(unixSockets)
	return r.readRemaps()
}

// readRemaps finds the files that had been deleted, and that CRIU keeps.
func (r *reader) readRemaps() error {
	err := r.folder.each(layout.RemapFilePaths, "REMAP_FPATH", func(msg []byte) error {
		var e remap.RemapFilePathEntry
		if err := img.Decode(msg, &e); err != nil {
			return err
		}
		if d, ok := r.files.open[e.GetOrigId()]; ok && e.GetRemapType() != remap.RemapType_PROCFS {
			d.Deleted = true
			r.files.open[e.GetOrigId()] = d
		}
		return r.take(1)
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// readDescriptors returns what a process has open.
func (r *reader) readDescriptors(filesID uint32) (list []Descriptor, err error) {
	err = r.folder.each(layout.DescriptorTable.Name(filesID), "FDINFO", func(msg []byte) error {
		var e fdinfo.FdinfoEntry
		if err := img.Decode(msg, &e); err != nil {
			return err
		}
		d, ok := r.files.open[e.GetId()]
		if !ok {
			d.Kind = "unknown"
		}
		d.FD = e.GetFd()
		if e.GetFlags()&unix.FD_CLOEXEC != 0 {
			d.Flags = strings.TrimPrefix(d.Flags+"|O_CLOEXEC", "|")
		}
		list = append(list, d)
		return r.take(1)
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // nothing is open
	}
	return list, err
}

// kinds are CRIU's kinds of open files in the words that people use.
var kinds = map[fdinfo.FdTypes]string{
	fdinfo.FdTypes_REG: "file", fdinfo.FdTypes_INETSK: "socket", fdinfo.FdTypes_UNIXSK: "unix",
	fdinfo.FdTypes_EVENTPOLL: "epoll", fdinfo.FdTypes_PACKETSK: "packet socket", fdinfo.FdTypes_NETLINKSK: "netlink socket",
	fdinfo.FdTypes_NS: "namespace", fdinfo.FdTypes_TUNF: "tun", fdinfo.FdTypes_EXT: "external", fdinfo.FdTypes_BPFMAP: "bpf map",
}

// flagNames are those of open(2), as x86 and arm64 number them alike.
var flagNames = []struct {
	bit  uint32
	name string
}{
	{unix.O_APPEND, "O_APPEND"}, {unix.O_NONBLOCK, "O_NONBLOCK"}, {unix.O_SYNC, "O_SYNC"},
	{unix.O_PATH, "O_PATH"}, {unix.O_TMPFILE &^ unix.O_DIRECTORY, "O_TMPFILE"},
}

func openFlags(flags uint32) string {
	s := [...]string{"O_RDONLY", "O_WRONLY", "O_RDWR", "O_ACCMODE"}[flags&unix.O_ACCMODE]
	for _, f := range flagNames {
		if flags&f.bit == f.bit {
			s += "|" + f.name
		}
	}
	return s
}

// tcpStates are Linux's, include/net/tcp_states.h. CRIU writes them for all
// kinds of sockets.
var tcpStates = [...]string{
	1: "established", "syn-sent", "syn-recv", "fin-wait-1", "fin-wait-2", "time-wait", "closed", "close-wait",
	"last-ack", "listen", "closing", "new-syn-recv",
}

const (
	stateEstablished = 1
	stateClosed      = 7
	stateListen      = 10
)

func stateName(state uint32) string {
	if int(state) < len(tcpStates) {
		return tcpStates[state]
	}
	return fmt.Sprint(state)
}

func inetSocket(sk *inet.InetSkEntry) Socket {
	protocols := map[uint32]string{unix.IPPROTO_TCP: "tcp", unix.IPPROTO_UDP: "udp", unix.IPPROTO_UDPLITE: "udplite",
		unix.IPPROTO_ICMP: "icmp", unix.IPPROTO_ICMPV6: "icmp"}
	s := Socket{Kind: protocols[sk.GetProto()], State: stateName(sk.GetState())}
	if s.Kind == "" {
		s.Kind = "raw"
	}
	if sk.GetFamily() == unix.AF_INET6 {
		s.Kind += "6"
	}
	s.Local = endpoint(sk.GetSrcAddr(), sk.GetSrcPort())
	if sk.GetDstPort() != 0 {
		s.Remote = endpoint(sk.GetDstAddr(), sk.GetDstPort())
	}
	if sk.GetProto() != unix.IPPROTO_TCP {
		s.State = "" // as is normal for these
		if sk.GetState() == stateEstablished {
			s.State = "connected"
		}
	}
	return s
}

// address makes an address of words as they were in memory. Only s390x among
// CRIU's architectures is big endian, and it is not among ours.
func address(words []uint32) (netip.Addr, bool) {
	var b []byte
	for _, word := range words[:min(len(words), 4)] {
		b = binary.LittleEndian.AppendUint32(b, word)
	}
	addr, ok := netip.AddrFromSlice(b)
	return addr.Unmap(), ok
}

func endpoint(words []uint32, port uint32) string {
	addr, ok := address(words)
	if !ok {
		return ""
	}
	return netip.AddrPortFrom(addr, uint16(port)).String()
}

// join says in one string between what a socket is.
func join(s Socket) string {
	if s.Remote == "" {
		return s.Local
	}
	return s.Local + " → " + s.Remote
}

// unixExternal marks a socket outside the container to which one inside is
// connected: USK_EXTERN, CRIU's sk-unix.c.
const unixExternal = 1 << 0

// unixSockets adds the unix sockets of files.img. They name their peers by
// inode, hence all at once.
func (r *reader) unixSockets(all []*skunix.UnixSkEntry) {
	byInode := make(map[uint32]*skunix.UnixSkEntry, len(all))
	for _, sk := range all {
		byInode[sk.GetIno()] = sk
	}
	types := map[uint32]string{unix.SOCK_STREAM: "unix stream", unix.SOCK_DGRAM: "unix datagram", unix.SOCK_SEQPACKET: "unix packet"}
	for _, sk := range all {
		s := Socket{Kind: types[sk.GetType()], Local: unixName(sk), State: stateName(sk.GetState())}
		if s.Kind == "" {
			s.Kind = "unix"
		}
		if sk.GetType() == unix.SOCK_DGRAM {
			s.State = ""
		}
		if sk.GetState() == stateListen {
			s.State = "listen"
		}
		if peer := byInode[sk.GetPeer()]; peer != nil && sk.GetPeer() != 0 {
			s.Remote = unixName(peer)
			s.External = peer.GetUflags()&unixExternal != 0
		}
		d := r.files.open[sk.GetId()]
		d.Path, d.Flags, d.External = join(s), openFlags(sk.GetFlags()), s.External
		r.files.open[sk.GetId()] = d
		if sk.GetUflags()&unixExternal != 0 {
			// It stands for one outside, and nobody in the container has it.
			r.report.Needs.Sockets = append(r.report.Needs.Sockets, unixName(sk))
			continue
		}
		r.report.Sockets = append(r.report.Sockets, s)
	}
}

// unixName is the path of a socket; one without has its inode.
func unixName(sk *skunix.UnixSkEntry) string {
	name := string(sk.GetName())
	switch {
	case name == "":
		return fmt.Sprintf("[%d]", sk.GetIno())
	case name[0] == 0:
		return "@" + text(name[1:])
	}
	return text(strings.TrimRight(name, "\x00"))
}

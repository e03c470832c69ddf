package img

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	core "github.com/checkpoint-restore/go-criu/v8/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/inventory"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pstree"
	inet "github.com/checkpoint-restore/go-criu/v8/crit/images/sk-inet"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/tty"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/layout"
)

// Facts is what CRIU images say of themselves.
type Facts struct {
	Arch string // a GOARCH

	OpenTCP             bool // there are TCP connections
	ExternalUnixSockets bool // unix datagram sockets have peers outside of the container
	FileLocks           bool // file locks were held
	Terminal            bool // a terminal belongs to a session whose leader is outside of the container

	// TCP are the distinct local addresses of the connections.
	TCP []netip.Addr
}

// Set is the CRIU images of one dump, with what else is in their folder.
type Set struct {
	Dir   string
	Sizes map[string]int64 // of all files in Dir, in bytes, by name
}

// rawImages are the images that are no sequence of messages but some other
// tool's bytes (CRIU's image-desc.c, RAW_IMAGE_MAGIC). They can be empty.
var rawImages = []layout.Series{
	layout.Pages, layout.Tmpfs, layout.Addresses, layout.Routes, layout.RoutesIPv6, layout.Rules,
	layout.IPTables, layout.IP6Tables, layout.NFTables, layout.Connections, layout.ConnectionExpectation,
}

// Derive checks that the images are complete, as far as they tell, and finds
// what a manifest would say.
func (im Set) Derive() (*Facts, error) {
	inv, err := ReadInventory(im.Dir)
	if err != nil {
		return nil, err
	}
	for _, name := range slices.Sorted(maps.Keys(im.Sizes)) {
		if err := im.checkComplete(name); err != nil {
			return nil, err
		}
	}
	arch, sessions, err := im.tasks()
	if err != nil {
		return nil, err
	}
	found := &Facts{Arch: arch}
	if err := descriptors(im.Dir, found); err != nil {
		return nil, err
	}
	if inv.GetTcpClose() {
		found.OpenTCP, found.TCP = false, nil
	}
	if err := im.memory(); err != nil {
		return nil, err
	}
	if found.FileLocks, err = im.anyMessage(layout.FileLocks, "FILE_LOCKS"); err != nil {
		return nil, err
	}
	found.Terminal, err = im.foreignTerminal(sessions)
	return found, err
}

// EstablishedTCP returns Facts.TCP alone, of the images in a folder.
func EstablishedTCP(dir string) ([]netip.Addr, error) {
	inv, err := ReadInventory(dir)
	if err != nil || inv.GetTcpClose() {
		return nil, err
	}
	var found Facts
	err = descriptors(dir, &found)
	return found.TCP, err
}

// checkComplete refuses an image whose last message is cut off. Images that are
// not made of messages only are left to CRIU.
func (im Set) checkComplete(name string) error {
	if !layout.IsImage(name) || slices.ContainsFunc(rawImages, func(s layout.Series) bool { return s.Begins(name) }) {
		return nil
	}
	f, err := capture.OpenPlain(filepath.Join(im.Dir, name))
	if err != nil {
		return err
	}
	defer f.Close()
	in, err := readerOf(f)
	if err == nil && in.kind != "" && !mixedImages[in.kind] {
		for err == nil {
			err = in.Skip()
		}
	}
	if err == nil || errors.Is(err, io.EOF) {
		return nil
	}
	return fmt.Errorf("%s: %w", name, err)
}

// anyMessage reports whether an image is there and has a message.
func (im Set) anyMessage(name, kind string) (some bool, err error) {
	err = EachIn(im.Dir, name, kind, func([]byte) error {
		some = true
		return io.EOF
	})
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return some, err
}

// ReadInventory reads and checks the image with which CRIU begins, of those in a folder.
func ReadInventory(dir string) (*inventory.InventoryEntry, error) {
	entry := &inventory.InventoryEntry{}
	n := 0
	err := EachIn(dir, layout.Inventory, "INVENTORY", func(msg []byte) error {
		n++
		return Decode(msg, entry)
	})
	if err != nil {
		return nil, err
	}
	// CRTOOLS_IMAGES_V1 and _V1_1, CRIU's magic.h.
	if v := entry.GetImgVersion(); n != 1 || v < 1 || v > 2 {
		return nil, fault.Invalid("%s: %d messages, image version %d; expected one, of version 1 or 2", layout.Inventory, n, v)
	}
	return entry, nil
}

// machines are CRIU's names of architectures, in Go's words.
var machines = map[core.CoreEntryMarch]string{
	core.CoreEntry_X86_64: "amd64", core.CoreEntry_AARCH64: "arm64", core.CoreEntry_ARM: "arm",
	core.CoreEntry_PPC64: "ppc64le", core.CoreEntry_S390: "s390x", core.CoreEntry_MIPS: "mips64le",
	core.CoreEntry_LOONGARCH64: "loong64", core.CoreEntry_RISCV64: "riscv64",
}

// Task states, CRIU's compel/include/uapi/task-state.h. In any other the task
// is dead, and has neither memory nor threads.
const (
	taskAlive   = 1
	taskStopped = 3
)

// tasks checks that every process is there with its threads and memory. It
// returns the architecture, and which pids are processes: each may lead a
// session.
func (im Set) tasks() (arch string, pids map[uint32]bool, err error) {
	pids = map[uint32]bool{}
	need := func(series layout.Series, id uint32) error {
		name := series.Name(id)
		if _, ok := im.Sizes[name]; !ok {
			return fault.Invalid("%s: missing; %s lists process or thread %d", name, layout.ProcessTree, id)
		}
		return nil
	}
	err = EachIn(im.Dir, layout.ProcessTree, "PSTREE", func(msg []byte) error {
		var p pstree.PstreeEntry
		if err := Decode(msg, &p); err != nil {
			return err
		}
		pids[p.GetPid()] = true
		if err := need(layout.Core, p.GetPid()); err != nil {
			return err
		}
		machine, state, err := im.core(p.GetPid())
		if err != nil {
			return err
		}
		if arch == "" {
			arch = machine
		}
		if state != taskAlive && state != taskStopped {
			return nil // its list of threads is rubbish
		}
		for _, tid := range p.GetThreads() {
			if err := need(layout.Core, tid); err != nil {
				return err
			}
		}
		if err := need(layout.Memory, p.GetPid()); err != nil {
			return err
		}
		return need(layout.Pagemap, p.GetPid())
	})
	if errors.Is(err, fs.ErrNotExist) {
		err = fault.Invalid("%s: missing", layout.ProcessTree)
	}
	if err == nil && len(pids) == 0 {
		err = fault.Invalid("%s: lists no process", layout.ProcessTree)
	}
	return arch, pids, err
}

func (im Set) core(pid uint32) (arch string, state uint32, err error) {
	var c core.CoreEntry
	err = EachIn(im.Dir, layout.Core.Name(pid), "CORE", func(msg []byte) error {
		return Decode(msg, &c)
	})
	arch = machines[c.GetMtype()]
	if err == nil && arch == "" {
		err = fault.Invalid("%s: unknown architecture", layout.Core.Name(pid))
	}
	return arch, c.GetTc().GetTaskState(), err
}

// Socket states, Linux's include/net/tcp_states.h.
const (
	tcpClose  = 7
	tcpListen = 10
)

// unixExternal marks a unix socket outside the container to which one inside is
// connected: USK_EXTERN, CRIU's sk-unix.c.
const unixExternal = 1 << 0

// descriptors finds the sockets that need options.
func descriptors(dir string, found *Facts) error {
	err := EachIn(dir, layout.Files, "FILES", func(msg []byte) error {
		var f fdinfo.FileEntry
		if err := Decode(msg, &f); err != nil {
			return err
		}
		if f.GetUsk().GetUflags()&unixExternal != 0 {
			found.ExternalUnixSockets = true
		}
		sk := f.GetIsk()
		if sk == nil || sk.GetProto() != unix.IPPROTO_TCP || sk.GetState() == tcpClose || sk.GetState() == tcpListen {
			return nil
		}
		found.OpenTCP = true
		addr, err := localAddress(sk)
		if err == nil && !slices.Contains(found.TCP, addr) {
			found.TCP = append(found.TCP, addr)
		}
		return err
	})
	if errors.Is(err, fs.ErrNotExist) {
		err = fault.Invalid("%s: missing; the checkpoint is incomplete, or was made by a CRIU older than 3.3", layout.Files)
	}
	return err
}

// localAddress returns what a socket is bound to. The image has the address as
// it is in memory, in words of this architecture.
func localAddress(sk *inet.InetSkEntry) (netip.Addr, error) {
	var b []byte
	for _, word := range sk.GetSrcAddr() {
		b = binary.NativeEndian.AppendUint32(b, word)
	}
	addr, ok := netip.AddrFromSlice(b)
	if !ok {
		return addr, fault.Invalid("socket %d has an address of %d bytes", sk.GetId(), len(b))
	}
	return addr.Unmap(), nil
}

// foreignTerminal reports whether a terminal belongs to a session whose leader
// is none of the processes: only then CRIU wants --shell-job (its tty.c,
// dump_verify_tty_sids). The terminal of a container is its own; that its other
// end is outside, runc and crun tell CRIU by themselves.
func (im Set) foreignTerminal(pids map[uint32]bool) (foreign bool, err error) {
	err = EachIn(im.Dir, layout.Terminals, "TTY_INFO", func(msg []byte) error {
		var t tty.TtyInfoEntry
		if err := Decode(msg, &t); err != nil {
			return err
		}
		if sid := t.GetSid(); sid != 0 && !pids[sid] {
			foreign = true
		}
		return nil
	})
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return foreign, err
}

// memory checks that the page images are as long as the lists say.
func (im Set) memory() error {
	for name := range im.Sizes {
		if !layout.Pagemap.Has(name) {
			continue
		}
		id, pages, err := im.pagemap(name)
		if err != nil {
			return err
		}
		if pages == 0 {
			continue
		}
		size, ok := im.Sizes[layout.Pages.Name(id)]
		if !ok {
			return fault.Invalid("%s: missing; %s refers to it", layout.Pages.Name(id), name)
		}
		if need := pages * int64(os.Getpagesize()); size < need {
			return fault.Invalid("%s: expected %d bytes, has %d (truncated)", layout.Pages.Name(id), need, size)
		}
	}
	return nil
}

// pagemap reads one list of memory pages: which image has them, and how many
// pages long that is; 0 if that cannot be told.
func (im Set) pagemap(name string) (id uint32, pages int64, err error) {
	untold := false
	err = EachIn(im.Dir, name, "PAGEMAP", Pagemap(&id, func(r PageRun) error {
		switch {
		case r.InParent():
			return fault.Invalid("some of the memory is in an older checkpoint that this one builds on; make one without pre-dump")
		case !r.Present() && r.flags&pagesLazy != 0:
			return fault.Invalid("some of the memory was left where the checkpoint was made; make one without lazy pages")
		case !r.Present():
			return nil
		case pages > maxPages:
			return fault.Invalid("lists more memory than there can be")
		}
		pages += int64(r.Pages)
		untold = untold || r.newer
		return nil
	}))
	if untold {
		pages = 0
	}
	return id, pages, err
}

// RootMode returns st_mode of the processes' root folder, by the images in a folder, or
// 0 if they do not have it.
func RootMode(dir string) (mode uint32, err error) {
	err = EachIn(dir, layout.Files, "FILES", func(msg []byte) error {
		var f fdinfo.FileEntry
		if err := Decode(msg, &f); err != nil {
			return err
		}
		if reg := f.GetReg(); reg.GetName() == "/" && reg.GetMode()&unix.S_IFMT == unix.S_IFDIR {
			mode = reg.GetMode()
			return io.EOF
		}
		return nil
	})
	if errors.Is(err, os.ErrNotExist) {
		err = nil // CRIU will say so
	}
	return mode, err
}

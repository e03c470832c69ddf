package inspect

import (
	"fmt"
	"strings"

	"github.com/stasis-run/stasis/checkpoint"
)

// Report is what is in a checkpoint. Strings are valid UTF-8, but hold whatever
// the processes put there. Sizes are in bytes.
type Report struct {
	// Manifest is stasis.json, unchecked; nil if other software made the
	// checkpoint.
	Manifest *checkpoint.Manifest `json:"manifest,omitempty"`
	// Architecture is a GOARCH; empty if unknown.
	Architecture string `json:"architecture"`
	Hostname     string `json:"hostname,omitempty"` // in the container
	// LSM is the security module in force: "selinux", "apparmor", or "".
	LSM string `json:"lsm,omitempty"`
	// TCPClosed: CRIU was told to leave connections out.
	TCPClosed bool `json:"tcp_closed,omitempty"`
	// Processes are in the order of the tree: a parent, then what is below it.
	Processes []Process `json:"processes"`
	Sockets   []Socket  `json:"sockets"`
	Mounts    []Mount   `json:"mounts"`
	Sizes     Sizes     `json:"sizes"`
	// Stats are CRIU's own; nil if there are none.
	Stats *Stats `json:"stats,omitempty"`
	Needs Needs  `json:"needs"`
}

// Process is a process in the container, with the IDs it has there.
type Process struct {
	PID  uint32 `json:"pid"`
	PPID uint32 `json:"ppid"` // 0: the first
	PGID uint32 `json:"pgid"`
	SID  uint32 `json:"sid"`
	// Depth in the tree; 0: the first.
	Depth int    `json:"depth"`
	Comm  string `json:"comm"`
	// State is "alive", "stopped", "zombie" or "dead". The last two have
	// nothing of what follows.
	State string `json:"state"`
	Exe   string `json:"exe,omitempty"`
	Cwd   string `json:"cwd,omitempty"`
	Root  string `json:"root,omitempty"`
	// Args is nil if the pages that hold them are not in the checkpoint.
	Args []string `json:"args,omitempty"`
	// Environment is there if Options ask for it.
	Environment []string     `json:"environment,omitempty"`
	Credentials Credentials  `json:"credentials"`
	Threads     []Thread     `json:"threads,omitempty"` // the first is the process's own
	Memory      Memory       `json:"memory"`
	Descriptors []Descriptor `json:"descriptors,omitempty"`
}

// Credentials are effective ones.
type Credentials struct {
	UID          uint32   `json:"uid"`
	GID          uint32   `json:"gid"`
	Groups       []uint32 `json:"groups,omitempty"`
	Capabilities []string `json:"capabilities,omitempty"`
	NoNewPrivs   bool     `json:"no_new_privs,omitempty"`
	// Seccomp is "", "strict" or "filter".
	Seccomp string `json:"seccomp,omitempty"`
	// LSMProfile is AppArmor's or SELinux's.
	LSMProfile string `json:"lsm_profile,omitempty"`
}

// Thread is a thread of a process.
type Thread struct {
	TID  uint32 `json:"tid"`
	Comm string `json:"comm,omitempty"`
}

// Memory is the address space of a process.
type Memory struct {
	Mapped int64 `json:"mapped"`
	// Dumped is what the checkpoint holds; shared memory counts in each
	// process that has it.
	Dumped   int64     `json:"dumped"`
	PageSize int64     `json:"page_size"`
	Mappings []Mapping `json:"mappings,omitempty"`
}

// Mapping is a range of addresses.
type Mapping struct {
	Start Address `json:"start"`
	Size  int64   `json:"size"`
	// Protection is as in /proc/PID/maps: "rw-p", "r-xs".
	Protection string `json:"protection"`
	// Kind is "anonymous", "heap", "stack", "file", "shared", "sysv", "memfd",
	// "vdso", "vvar", "vsyscall", "aio" or "socket".
	Kind string `json:"kind"`
	// File and Offset are where it is from.
	File   string `json:"file,omitempty"`
	Offset int64  `json:"offset,omitempty"`
	// Dumped is how much of it the checkpoint holds; the rest is unused, or
	// as in the file.
	Dumped int64 `json:"dumped"`
}

// Address is one of memory; in JSON a string in hex, as numbers there are only
// good for 53 bits.
type Address uint64

func (a Address) String() string { return fmt.Sprintf("%x", uint64(a)) }

// MarshalText implements encoding.TextMarshaler.
func (a Address) MarshalText() ([]byte, error) { return []byte(a.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (a *Address) UnmarshalText(b []byte) error {
	_, err := fmt.Sscanf(string(b), "%x", (*uint64)(a))
	return err
}

// Descriptor is a file descriptor of a process.
type Descriptor struct {
	FD uint32 `json:"fd"`
	// Kind is "file", "folder", "device", "pipe", "fifo", "tty", "tcp", "udp",
	// "unix", … or CRIU's name of it.
	Kind string `json:"kind"`
	// Path says what it is: a path, pipe:[ID], the addresses of a socket.
	Path string `json:"path,omitempty"`
	// Flags are those of open(2): "O_RDWR|O_APPEND".
	Flags   string `json:"flags,omitempty"`
	Offset  int64  `json:"offset,omitempty"`
	Size    int64  `json:"size,omitempty"` // of the file, when it was checkpointed
	Deleted bool   `json:"deleted,omitempty"`
	// External: it leads out of the container.
	External bool `json:"external,omitempty"`
}

// Socket is one of the internet or unix families.
type Socket struct {
	// Kind is "tcp", "udp", "udplite", "raw", "unix stream", "unix datagram"
	// or "unix packet"; with a 6 at the end for IPv6.
	Kind string `json:"kind"`
	// State is "established", "listen", …, for datagrams "" or "connected".
	State string `json:"state,omitempty"`
	// Local and Remote are addresses with ports, or the paths of unix sockets;
	// a path that starts with @ is abstract.
	Local  string `json:"local,omitempty"`
	Remote string `json:"remote,omitempty"`
	// External: the peer of a unix socket is outside of the container.
	External bool `json:"external,omitempty"`
}

// Mount is a mount in the container.
type Mount struct {
	Mountpoint string `json:"mountpoint"`
	Type       string `json:"type"`
	Source     string `json:"source,omitempty"`
	Root       string `json:"root,omitempty"` // of what is mounted, in its file system
	Options    string `json:"options,omitempty"`
	ReadOnly   bool   `json:"read_only,omitempty"`
	// External is the name by which a restore is told what to mount; empty for
	// mounts that CRIU makes itself.
	External string `json:"external,omitempty"`
}

// Sizes are of the files in the folder.
type Sizes struct {
	Total   int64 `json:"total"`
	Memory  int64 `json:"memory"`  // pages-*.img
	Content int64 `json:"content"` // of deleted files, and of tmpfs
	Files   int   `json:"files"`
}

// Stats are CRIU's statistics of the dump: µs, and numbers of pages.
type Stats struct {
	FreezingUS    uint32 `json:"freezing_us"`
	FrozenUS      uint32 `json:"frozen_us"`
	MemoryDumpUS  uint32 `json:"memory_dump_us"`
	MemoryWriteUS uint32 `json:"memory_write_us"`
	PagesScanned  uint64 `json:"pages_scanned"`
	PagesWritten  uint64 `json:"pages_written"`
	PagesParent   uint64 `json:"pages_parent"` // left out: as in an earlier dump
	PagesLazy     uint64 `json:"pages_lazy"`
}

// Needs is what a host must have to restore the checkpoint.
type Needs struct {
	Architecture string   `json:"architecture"`
	CPUFeatures  []string `json:"cpu_features,omitempty"` // empty if unknown
	// KernelOptions of the kernel's configuration, without CONFIG_.
	KernelOptions []string `json:"kernel_options"`
	// Addresses without which TCP connections have to be closed.
	Addresses []string `json:"addresses,omitempty"`
	// Files are paths that processes have open or mapped: the root filesystem
	// must have them, unchanged.
	Files []string `json:"files,omitempty"`
	// Mounts and Sockets are those from outside the container.
	Mounts  []string `json:"mounts,omitempty"`
	Sockets []string `json:"sockets,omitempty"`
}

// Command is how a process was started, else its name.
func (p Process) Command() string {
	if len(p.Args) == 0 {
		return "[" + p.Comm + "]"
	}
	return strings.Join(p.Args, " ")
}

// What says what a mapping is for.
func (m Mapping) What() string {
	if m.File != "" {
		return m.File
	}
	return m.Kind
}

// Package layout has the name of every file and folder of a checkpoint.
//
// It is a package of its own, and imports none of ours, so that all that knows of a
// checkpoint's files can use it: package checkpoint and what is built on it, and
// what that is built on (sign, capture, criu/img). What only one format has besides,
// such as the archive's config.dump, is in the package of that format.
//
// docs/checkpoint-format.md says what the files hold.
package layout

import (
	"strconv"
	"strings"
)

// Names of ours in the folder of a checkpoint.
const (
	// Manifest says what the checkpoint is and lists its files with their sums. A
	// checkpoint made by other software has none.
	Manifest = "stasis.json"
	// Signature is the DSSE envelope with the signatures of Manifest (package sign).
	Signature = "stasis.sig.json"
	// Partial is the subfolder that CRIU writes into. Its files move up when the
	// checkpoint is complete, so in a folder that has it a checkpoint is being
	// written, or the writing was interrupted.
	Partial = ".partial"
	// Reserve is a file in Partial that holds space on the disk which is needed after
	// the dump.
	Reserve = ".reserve"
	// ParentLink is a link in Partial to the checkpoint that the dump builds on.
	ParentLink = ".parent"
)

// PreDumps is a pattern of filepath.Match for the names that PreDump returns.
const PreDumps = ".pre-*"

// PreDump is the subfolder of Partial that holds the n-th pre-dump, from 1 on.
func PreDump(n int) string { return ".pre-" + strconv.Itoa(n) }

// Names of CRIU, and of the runtime that calls it, in the folder of a checkpoint
// (CRIU's criu/image-desc.c).
const (
	// Suffix ends the name of every CRIU image.
	Suffix = ".img"
	// Inventory is what CRIU reads first. Here it also comes last: a folder that has
	// it holds a complete checkpoint.
	Inventory = "inventory.img"
	// ProcessTree lists the processes and their threads.
	ProcessTree = "pstree.img"
	// Files lists all open files, sockets and other descriptors (since CRIU 3.3).
	Files = "files.img"
	// RemapFilePaths says of which files there is no name any more.
	RemapFilePaths = "remap-fpath.img"
	// FileLocks lists the file locks that are held.
	FileLocks = "filelocks.img"
	// Terminals lists the terminals and the sessions that they belong to.
	Terminals = "tty-info.img"
	// Memfds lists the files that memfd_create(2) has made.
	Memfds = "memfd.img"
	// Seccomp holds the seccomp filters of all processes.
	Seccomp = "seccomp.img"
	// Cgroups holds the control groups and their properties.
	Cgroups = "cgroup.img"

	// Parent is a link to the folder of the dump that this one builds on. CRIU makes it;
	// a complete checkpoint of ours has none.
	Parent = "parent"

	// Descriptors says what stdin, stdout and stderr were connected to: a JSON list of
	// three strings, which runc and crun write.
	Descriptors = "descriptors.json"
)

// Names of CRIU's files that no restore reads. CRIU writes them to its work folder,
// which can be the folder of the checkpoint.
const (
	// LogSuffix ends the name of every log.
	LogSuffix = ".log"
	// DumpLog is the log of a dump or a pre-dump. runc, crun and we give it this name.
	DumpLog = "dump.log"
	// RestoreLog is the log of a restore; named by the same.
	RestoreLog = "restore.log"
	// DumpStats are the figures of a dump: times, and numbers of pages.
	DumpStats = "stats-dump"
	// RestoreStats are the figures of a restore.
	RestoreStats = "stats-restore"
)

// LostFound is the folder that ext4 has at its root. It may be in the folder of a
// checkpoint, which may be where a file system is mounted.
const LostFound = "lost+found"

// Series is a kind of CRIU images of which there may be several, each with a number:
// the beginning of their names (CRIU's criu/image-desc.c).
type Series string

// Series of images that are made of messages.
const (
	// Core has the registers and the state of a thread, by its pid.
	Core Series = "core-"
	// IDs has the numbers of a process's namespaces and descriptor table, by its pid.
	IDs Series = "ids-"
	// Memory has the mappings of a process, by its pid.
	Memory Series = "mm-"
	// Pagemap lists the pages of a process's memory, by its pid.
	Pagemap Series = "pagemap-"
	// PagemapShared lists the pages of a shared memory, by its number. These names
	// also begin with Pagemap.
	PagemapShared Series = "pagemap-shmem-"
	// Root has the root and the working folder of a process, by its pid.
	Root Series = "fs-"
	// DescriptorTable lists the descriptors in a table, by its number in IDs.
	DescriptorTable Series = "fdinfo-"
	// Mounts lists the mounts of a mount namespace, by its number in IDs.
	Mounts Series = "mountpoints-"
	// PIDNamespace, UserNamespace, NetworkNamespace, UTSNamespace and IPCVariables have
	// the settings of a namespace, by its number in IDs.
	PIDNamespace     Series = "pidns-"
	UserNamespace    Series = "userns-"
	NetworkNamespace Series = "netns-"
	UTSNamespace     Series = "utsns-"
	IPCVariables     Series = "ipcns-var-"
)

// Series of images that hold content besides messages, or instead of them.
const (
	// Pages has pages of memory, one after the other; a pagemap says which.
	Pages Series = "pages-"
	// GhostFile has the content of a file without a name. The numbers are hexadecimal.
	GhostFile Series = "ghost-file-"
	// Tmpfs and TmpfsDev are archives of what was in a tmpfs, by the number of the
	// mount's root or of its device; their names end in TmpfsSuffix. The names
	// of TmpfsDev also begin with Tmpfs.
	Tmpfs    Series = "tmpfs-"
	TmpfsDev Series = "tmpfs-dev-"
	// TCPStream has what was under way in a TCP connection. The numbers are
	// hexadecimal.
	TCPStream Series = "tcp-stream-"
	// IPCSharedMemory and IPCMessages have the content of System V IPC.
	IPCSharedMemory Series = "ipcns-shm-"
	IPCMessages     Series = "ipcns-msg-"
	// The following have no numbers: there is one of each, whose name ends after this.
	PipesData    Series = "pipes-data" // what was in pipes
	FIFOData     Series = "fifo-data"  // what was in named pipes
	SocketQueues Series = "sk-queues"  // what was in the queues of unix sockets
	TerminalData Series = "tty-data"   // what was in terminals
	BPFMapData   Series = "bpfmap-data"
	// AMDGPU is what CRIU's plugin for these GPUs writes.
	AMDGPU Series = "amdgpu-"
	// The following are what ip(8), iptables(8), nft(8) and conntrack(8) print.
	Addresses             Series = "ifaddr-"
	Routes                Series = "route-"
	RoutesIPv6            Series = "route6-"
	Rules                 Series = "rule-"
	IPTables              Series = "iptables-"
	IP6Tables             Series = "ip6tables-"
	NFTables              Series = "nftables-"
	Connections           Series = "netns-ct-"
	ConnectionExpectation Series = "netns-exp-"
)

// TmpfsSuffix ends the names of Tmpfs.
const TmpfsSuffix = ".tar.gz" + Suffix

// Name is the image with a number.
func (s Series) Name(number uint32) string {
	return string(s) + strconv.FormatUint(uint64(number), 10) + Suffix
}

// Hex is the image with a number in a series whose numbers are hexadecimal.
func (s Series) Hex(number uint32) string {
	return string(s) + strconv.FormatUint(uint64(number), 16) + Suffix
}

// Begins tells whether a name begins like those of the series, whatever it ends in.
func (s Series) Begins(name string) bool { return strings.HasPrefix(name, string(s)) }

// Has tells whether a name is that of an image of the series, by how it begins and
// ends.
func (s Series) Has(name string) bool { return s.Begins(name) && IsImage(name) }

// Glob is a pattern of filepath.Match for the images of the series.
func (s Series) Glob() string { return string(s) + "*" + Suffix }

// IsImage tells whether a file is a CRIU image, by its name.
func IsImage(name string) bool { return strings.HasSuffix(name, Suffix) }

// IsIncidental tells whether a file is one that CRIU and runtimes leave beside the
// images and that no restore reads.
func IsIncidental(name string) bool {
	return strings.HasSuffix(name, LogSuffix) || name == DumpStats || name == RestoreStats
}

// Names of what a checkpoint consists of outside of containerd (package capture), in
// the folder that it is read into, and in the formats.
const (
	// Images is the folder of the checkpoint itself. Podman's archive has this name.
	Images = "checkpoint"
	// Layer is a tar of the writable layer.
	Layer = "layer.tar"
	// DevShm is a tar of what was in /dev/shm. Podman's archive has this name.
	DevShm = "devshm-checkpoint.tar"
)

// Embedded is the folder in which a runnable image holds its checkpoint, in a layer of
// its own, from the root of the container's filesystem. Other names are paths from
// there, too.
const (
	Embedded = ".stasis"
	// EmbeddedInfo says what the checkpoint is: capture.Info.
	EmbeddedInfo = Embedded + "/info.json"
	// EmbeddedSpec is the OCI runtime spec of the container.
	EmbeddedSpec = Embedded + "/spec.json"
	// EmbeddedImages and EmbeddedDevShm are Images and DevShm.
	EmbeddedImages = Embedded + "/" + Images
	EmbeddedDevShm = Embedded + "/" + DevShm
)

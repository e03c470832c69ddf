package checkpoint

import (
	"strings"
	"unicode/utf8"

	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/sign"
)

// Names with a meaning of their own.
const (
	manifestName    = "stasis.json"
	partialName     = ".partial"
	inventoryName   = "inventory.img"    // CRIU's; its presence makes a folder a checkpoint
	descriptorsName = "descriptors.json" // runc's and crun's: what stdio was connected to
)

// Limits on what is read from a checkpoint.
const (
	// maxFiles: a task takes about six images and a thread one more.
	maxFiles = 1 << 16
	// maxManifest is in bytes; an entry of a file takes about 150.
	maxManifest = 16 << 20
	// maxFrame is in bytes, of one protobuf message that is decoded. The
	// largest real ones list all descriptors of an epoll instance, at some
	// 30 bytes each. Decoding can take many times as much memory.
	maxFrame = 4 << 20
	// maxImage is in bytes, of an image that CRIU or we decode;
	// maxPagemap likewise, of one of the lists of memory pages, which
	// grow with the container's memory. Images that hold content (memory,
	// files, queues) are only ever copied and have no limit.
	maxImage   = 256 << 20
	maxPagemap = 1 << 30
	// recheckSize is in bytes: from here on, a file's inode and ctime are
	// recorded, so that a local restore need not read it twice.
	recheckSize = 4 << 20
)

// rawImages are the images that are no sequence of messages but some other
// tool's bytes, by the prefix of their names (CRIU's image-desc.c, RAW_IMAGE_MAGIC).
// They can be empty.
var rawImages = []string{
	"pages-", "tmpfs-", "ifaddr-", "route-", "route6-", "rule-",
	"iptables-", "ip6tables-", "nftables-", "netns-ct-", "netns-exp-",
}

// contentImages are the images that hold content besides messages: bytes of
// files, pipes, sockets and queues.
var contentImages = []string{
	"pages-", "tmpfs-", "ghost-file-", "pipes-data", "fifo-data", "sk-queues",
	"tcp-stream-", "tty-data", "bpfmap-data", "ipcns-shm-", "ipcns-msg-", "amdgpu-",
}

func hasPrefix(name string, prefixes []string) bool {
	for _, p := range prefixes {
		if strings.HasPrefix(name, p) {
			return true
		}
	}
	return false
}

func isImage(name string) bool { return strings.HasSuffix(name, ".img") }

func isPages(name string) bool { return strings.HasPrefix(name, "pages-") && isImage(name) }

func isPagemap(name string) bool { return strings.HasPrefix(name, "pagemap-") && isImage(name) }

// incidental names the files that CRIU and runtimes leave beside the images
// and that no restore reads.
func incidental(name string) bool {
	return strings.HasSuffix(name, ".log") || name == "stats-dump" || name == "stats-restore"
}

// checkSize refuses a file that is larger than the limits allow.
func checkSize(file entry) error {
	if limit := sizeLimit(file.name); limit >= 0 && file.size > limit {
		return fault.Invalid("%s: %d bytes, at most %d are allowed", file.name, file.size, limit)
	}
	return nil
}

// sizeLimit returns how many bytes a file of that name may have, or -1.
func sizeLimit(name string) int64 {
	switch {
	case name == manifestName:
		return maxManifest
	case name == sign.EnvelopeName:
		return sign.MaxEnvelope
	case isPagemap(name):
		return maxPagemap
	case isImage(name) && hasPrefix(name, contentImages), incidental(name):
		return -1
	}
	return maxImage
}

// validName reports whether a manifest may list name: a plain name in the
// folder, not hidden, and not the manifest's own or its envelope's.
func validName(name string) bool {
	if name == "" || len(name) > 255 || name[0] == '.' || name == manifestName || name == sign.EnvelopeName || !utf8.ValidString(name) {
		return false
	}
	return !strings.ContainsFunc(name, func(r rune) bool { return r == '/' || r < ' ' || r == 0x7f })
}

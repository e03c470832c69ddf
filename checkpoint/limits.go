package checkpoint

import (
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/checkpoint/sign"
)

// Limits on what is read from a checkpoint.
const (
	// maxFiles: a task takes about six images and a thread one more.
	maxFiles = 1 << 16
	// maxManifest is in bytes; an entry of a file takes about 150.
	maxManifest = 16 << 20
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

// contentImages are the images that hold content besides messages: bytes of
// files, pipes, sockets and queues.
var contentImages = []layout.Series{
	layout.Pages, layout.Tmpfs, layout.GhostFile, layout.PipesData, layout.FIFOData, layout.SocketQueues,
	layout.TCPStream, layout.TerminalData, layout.BPFMapData, layout.IPCSharedMemory, layout.IPCMessages, layout.AMDGPU,
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
	case name == layout.Manifest:
		return maxManifest
	case name == layout.Signature:
		return sign.MaxEnvelope
	case layout.Pagemap.Has(name):
		return maxPagemap
	case layout.IsImage(name) && slices.ContainsFunc(contentImages, func(s layout.Series) bool { return s.Begins(name) }), layout.IsIncidental(name):
		return -1
	}
	return maxImage
}

// validName reports whether a manifest may list name: a plain name in the
// folder, not hidden, and not the manifest's own or its envelope's.
func validName(name string) bool {
	if name == "" || len(name) > 255 || name[0] == '.' || name == layout.Manifest || name == layout.Signature || !utf8.ValidString(name) {
		return false
	}
	return !strings.ContainsFunc(name, func(r rune) bool { return r == '/' || r < ' ' || r == 0x7f })
}

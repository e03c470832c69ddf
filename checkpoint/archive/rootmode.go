package archive

import (
	"bufio"
	"encoding/binary"
	"io"
	"path/filepath"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/layout"
)

// maxFile is of a message in files.img, in bytes; one describes an open file.
const maxFile = 4 << 20

// rootMode returns the permissions that the container's root folder had, by
// what CRIU's files.img says of the root of its processes: CRIU will restore
// them in one that has the same. It is 0 if the image does not tell.
//
// An image is two magic numbers, then for each message its length and itself
// (CRIU's protobuf.c); numbers are 32 bits, little endian. go-criu's decoder
// would take as much memory as a length says.
func rootMode(images string) int64 {
	f, err := capture.OpenPlain(filepath.Join(images, layout.Files))
	if err != nil {
		return 0
	}
	defer f.Close()
	r := bufio.NewReader(f)
	if _, err := r.Discard(8); err != nil {
		return 0
	}
	var length [4]byte
	for {
		if _, err := io.ReadFull(r, length[:]); err != nil {
			return 0
		}
		n := binary.LittleEndian.Uint32(length[:])
		if n > maxFile {
			return 0
		}
		msg := make([]byte, n)
		if _, err := io.ReadFull(r, msg); err != nil {
			return 0
		}
		var file fdinfo.FileEntry
		// Kinds of files that go-criu does not know are none of ours.
		if err := (proto.UnmarshalOptions{AllowPartial: true}).Unmarshal(msg, &file); err != nil {
			return 0
		}
		if reg := file.GetReg(); reg.GetName() == "/" && reg.GetMode()&unix.S_IFMT == unix.S_IFDIR {
			return int64(reg.GetMode() &^ unix.S_IFMT)
		}
	}
}

package archive

import (
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/criu/img"
)

// rootMode returns the permissions that the container's root folder had, by
// what CRIU's files.img says of the root of its processes: CRIU will restore
// them in one that has the same. It is 0 if the image does not tell.
func rootMode(images string) int64 {
	mode, err := img.RootMode(images)
	if err != nil {
		return 0
	}
	return int64(mode &^ unix.S_IFMT)
}

package policy

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// openFlags are what F_GETFL tells of a file, which is what CRIU has in its images
// and gives to open(2) again. The kernel keeps O_DIRECTORY, O_NOFOLLOW and O_PATH of
// those that say how to open; never O_CREAT, O_EXCL, O_NOCTTY and O_TRUNC.
const openFlags = unix.O_ACCMODE | unix.O_APPEND | unix.O_NONBLOCK | unix.O_SYNC | unix.O_ASYNC | unix.O_DIRECT | largeFile |
	unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_NOATIME | unix.O_PATH | unix.O_CLOEXEC

// tempFlag is what the kernel keeps of O_TMPFILE, for as long as the file is open.
// CRIU brings such a file back as a deleted one, without the flag.
const tempFlag = unix.O_TMPFILE &^ unix.O_DIRECTORY

// badFlags returns what is wrong with the flags that CRIU opens a file with, or "".
func badFlags(flags uint32) string {
	if flags&(unix.O_CREAT|unix.O_TRUNC|unix.O_EXCL) != 0 || flags&unix.O_TMPFILE == unix.O_TMPFILE {
		return fmt.Sprintf("is opened with flags %#x, which would create or empty it", flags)
	}
	if bad := flags &^ openFlags; bad != 0 {
		return fmt.Sprintf("is opened with flags %#x, which no open file has (%#x)", flags, bad)
	}
	return ""
}

// opens are the accesses that flags ask for, as bits of a file's mode for others.
func opens(flags uint32) (mode uint32) {
	if flags&unix.O_PATH != 0 {
		return 0
	}
	switch flags & unix.O_ACCMODE {
	case unix.O_RDONLY:
		return 4
	case unix.O_WRONLY:
		return 2
	}
	return 6
}

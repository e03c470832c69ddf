package allow

import (
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/pkg/cap"
	"golang.org/x/sys/unix"
)

// Host is what the rules look at on the host.
type Host struct {
	// Exists tells whether there is a file.
	Exists func(path string) bool
	// Device returns what device a path is: "c" or "b", and its numbers.
	Device func(path string) (kind string, major, minor int64, ok bool)
	// Ulimit returns the caller's own hard limit: "nofile".
	Ulimit func(name string) (hard uint64, ok bool)
}

// ThisHost is the host and the process that this runs in.
func ThisHost() Host {
	return Host{
		Exists: func(path string) bool {
			_, err := os.Stat(path)
			return !errors.Is(err, fs.ErrNotExist)
		},
		Device: func(path string) (string, int64, int64, bool) {
			var st unix.Stat_t
			if unix.Stat(path, &st) != nil {
				return "", 0, 0, false
			}
			kind := map[uint32]string{unix.S_IFCHR: "c", unix.S_IFBLK: "b"}[st.Mode&unix.S_IFMT]
			return kind, int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev)), kind != ""
		},
		Ulimit: func(name string) (uint64, bool) {
			var l unix.Rlimit
			resource, known := ulimits[name]
			return l.Max, known && unix.Getrlimit(resource, &l) == nil
		},
	}
}

var ulimits = map[string]int{
	"as": unix.RLIMIT_AS, "core": unix.RLIMIT_CORE, "cpu": unix.RLIMIT_CPU, "data": unix.RLIMIT_DATA, "fsize": unix.RLIMIT_FSIZE,
	"locks": unix.RLIMIT_LOCKS, "memlock": unix.RLIMIT_MEMLOCK, "msgqueue": unix.RLIMIT_MSGQUEUE, "nice": unix.RLIMIT_NICE,
	"nofile": unix.RLIMIT_NOFILE, "nproc": unix.RLIMIT_NPROC, "rss": unix.RLIMIT_RSS, "rtprio": unix.RLIMIT_RTPRIO,
	"rttime": unix.RLIMIT_RTTIME, "sigpending": unix.RLIMIT_SIGPENDING, "stack": unix.RLIMIT_STACK,
}

// OfProcess tells whether a namespace is named by the number of a process in it,
// which is somebody else's by now, or will be.
func OfProcess(path string) bool {
	rest, ok := strings.CutPrefix(filepath.Clean(path), "/proc/")
	pid, _, _ := strings.Cut(rest, "/")
	_, err := strconv.Atoi(pid)
	return ok && err == nil && pid != "1"
}

// Words are what a grant takes besides what only a spec can name, by the field of
// Grants: for programs that propose them.
func Words(field string) []string {
	switch field {
	case "Namespaces":
		return []string{All, "ipc", "network", "pid", "uts"}
	case "Capabilities":
		return append([]string{All}, cap.Known()...)
	case "Priorities":
		return append([]string{All}, Priorities...)
	case "Ulimits":
		return append([]string{All}, slices.Sorted(maps.Keys(ulimits))...)
	case "Unmask":
		return slices.Concat([]string{All}, maskedEverywhere, guardedEverywhere)
	}
	return []string{All}
}

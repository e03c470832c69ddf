package node

import (
	"bufio"
	"os"
	"runtime"
	"strings"

	"github.com/containerd/cgroups/v3"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/capture"
)

func cgroupV2() bool { return cgroups.Mode() == cgroups.Unified }

// distribution is ID and VERSION_ID of os-release(5).
func distribution() (d capture.Program) {
	for _, path := range []string{"/etc/os-release", "/usr/lib/os-release"} {
		f, err := os.Open(path)
		if err != nil {
			continue
		}
		defer f.Close()
		for lines := bufio.NewScanner(f); lines.Scan(); {
			key, value, _ := strings.Cut(lines.Text(), "=")
			value = strings.Trim(value, "\"'")
			switch key {
			case "ID":
				d.Name = value
			case "VERSION_ID":
				d.Version = value
			}
		}
		return d
	}
	return d
}

// thisHost describes where we run.
func thisHost() capture.Host {
	h := capture.Host{Architecture: runtime.GOARCH, CgroupV2: cgroupV2(), Distribution: distribution()}
	var name unix.Utsname
	if unix.Uname(&name) == nil {
		h.Kernel = unix.ByteSliceToString(name.Release[:])
	}
	return h
}

package criu

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/process"
)

// bringLoopbackUp brings the loopback device of a process's network namespace up. In a
// cold start runc does that. In a restore it does not: it tells CRIU to leave the
// container's own network namespace empty.
func bringLoopbackUp(pid int) error {
	err := process.InNamespace(fmt.Sprintf("/proc/%d/ns/net", pid), unix.CLONE_NEWNET, loopbackUp)
	if err != nil {
		return fmt.Errorf("bring the container's loopback device up: %w", err)
	}
	return nil
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, req); err != nil {
		return err
	}
	req.SetUint16(req.Uint16() | unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req)
}

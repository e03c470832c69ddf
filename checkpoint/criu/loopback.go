package criu

import (
	"encoding/json"
	"fmt"
	"io"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/process"
)

// LoopbackHook is an OCI hook (it reads the container's state from stdin) that
// brings the loopback device of the container's network namespace up. In a cold
// start runc does that. In a restore nobody does: runc has CRIU leave a network
// namespace of the container's own empty, and calls the hooks when that is made,
// before there are sockets in it.
func LoopbackHook(stdin io.Reader) error {
	var state specs.State
	if err := json.NewDecoder(io.LimitReader(stdin, 1<<20)).Decode(&state); err != nil {
		return fmt.Errorf("read the container's state: %w", err)
	}
	if state.Pid <= 0 {
		return fmt.Errorf("container %s has no process", state.ID)
	}
	err := process.InNamespace(fmt.Sprintf("/proc/%d/ns/net", state.Pid), unix.CLONE_NEWNET, loopbackUp)
	if err != nil {
		return fmt.Errorf("bring the loopback device of container %s up: %w", state.ID, err)
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

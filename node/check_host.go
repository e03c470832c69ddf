package node

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/criu"
)

// shimName is the program that containerd starts for RuntimeName.
const shimName = "containerd-shim-stasis-v1"

func checkRoot() Finding {
	if os.Geteuid() != 0 {
		return missing("user", "not root", "CRIU needs root: run as root, by sudo for one")
	}
	return ok("user", "root")
}

// checkKernel looks whether the kernel is built for checkpoints, which shows in
// a file that only such a kernel has.
func checkKernel() Finding {
	release := checkpoint.KernelRelease()
	if _, err := os.Stat("/proc/sys/kernel/ns_last_pid"); err != nil {
		return missing("kernel", release+" is built without CONFIG_CHECKPOINT_RESTORE", "boot a kernel that has it, as those of distributions do")
	}
	return ok("kernel", "%s, %s", release, runtime.GOARCH)
}

// checkSoftDirty tries whether the kernel tells which pages were written to,
// which is what a pre-dump needs.
func checkSoftDirty() Finding {
	works, err := criu.SoftDirty()
	if err == nil && works {
		return ok("soft-dirty", "pre-dump is possible")
	}
	detail := "the kernel does not track changes of memory, so there is no pre-dump"
	if err != nil {
		detail += fmt.Sprintf(" (%v)", err)
	}
	return warn("soft-dirty", detail, "boot a kernel with CONFIG_MEM_SOFT_DIRTY")
}

// checkShim asks containerd to run our shim. One older than 2.0 cannot be asked;
// then we look where it would.
func checkShim(ctx context.Context, c *client.Client, address string) Finding {
	const fix = "install " + shimName + " into a folder of containerd's PATH, such as /usr/local/bin"
	_, err := c.RuntimeInfo(ctx, RuntimeName, nil)
	switch {
	case err == nil:
		return ok("shim", "containerd finds %s for the runtime %s", shimName, RuntimeName)
	case !errdefs.IsNotImplemented(err) && !errdefs.IsNotFound(err) && !errdefs.IsUnknown(err):
		return missing("shim", err.Error(), fix)
	}
	path, err := pathOf(address)
	if err != nil {
		return warn("shim", fmt.Sprintf("cannot tell whether containerd finds %s: %v", shimName, err), "")
	}
	for _, dir := range filepath.SplitList(path) {
		if info, err := os.Stat(filepath.Join(dir, shimName)); err == nil && info.Mode()&0o111 != 0 {
			return ok("shim", "%s", filepath.Join(dir, shimName))
		}
	}
	return missing("shim", shimName+" is not in containerd's PATH", fix)
}

// pathOf returns the PATH of the process behind a socket.
func pathOf(address string) (string, error) {
	conn, err := net.Dial("unix", strings.TrimPrefix(address, "unix://"))
	if err != nil {
		return "", err
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return "", err
	}
	var cred *unix.Ucred
	var cerr error
	if err := raw.Control(func(fd uintptr) {
		cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return "", err
	}
	if cerr != nil {
		return "", cerr
	}
	environ, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", cred.Pid))
	if err != nil {
		return "", err
	}
	for _, v := range strings.Split(string(environ), "\x00") {
		if path, ok := strings.CutPrefix(v, "PATH="); ok {
			return path, nil
		}
	}
	return "", fmt.Errorf("containerd (process %d) has no PATH", cred.Pid)
}

package stack

import (
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"

	"github.com/containerd/cgroups/v3"
	"golang.org/x/sys/unix"
)

// hidesUnified tells whether crun is kept from seeing the v2 half of hybrid
// cgroups.
func (o Options) hidesUnified() bool { return o.Crun && cgroups.Mode() == cgroups.Hybrid }

// heedHangup has SIGHUP end the programs that tests start, as in a shell. Tests that
// were started by nohup ignore it, and their children would, too.
var heedHangup = sync.OnceFunc(func() {
	if signal.Ignored(unix.SIGHUP) {
		signal.Notify(make(chan os.Signal, 1), unix.SIGHUP)
	}
})

// describe says what a stack runs on, for a test's log: what it has shown holds
// for that.
func describe(opts Options, bins binaries) string {
	group := "no cgroup"
	switch cgroups.Mode() {
	case cgroups.Unified:
		group = "cgroup v2"
	case cgroups.Hybrid:
		group = "cgroup v1 (hybrid)"
	case cgroups.Legacy:
		group = "cgroup v1"
	}
	if opts.SystemdCgroup {
		group += " by systemd"
	}
	parts := []string{kernel(), group}
	if enabled, err := os.ReadFile("/sys/module/apparmor/parameters/enabled"); err == nil && enabled[0] == 'Y' {
		parts = append(parts, "AppArmor")
	}
	shim := "Stasis"
	if opts.Upstream {
		shim = "its own shim"
	} else if opts.DropIn {
		shim = "Stasis as " + upstreamShim
	}
	return strings.Join(append(parts,
		"containerd "+versionOf(bins.containerd, 2)+" with "+shim,
		filepath.Base(bins.runtime)+" "+versionOf(bins.runtime, 2),
		"CRIU "+versionOf(filepath.Join(cacheDir(), "bin", "criu"), 1),
		opts.Snapshotter), ", ")
}

func kernel() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "an unknown kernel"
	}
	return "Linux " + unix.ByteSliceToString(u.Release[:])
}

var versions sync.Map // program to version

// versionOf returns a field of the first line that a program prints of itself.
func versionOf(program string, field int) string {
	if v, ok := versions.Load(program); ok {
		return v.(string)
	}
	out, err := exec.Command(program, "--version").Output()
	line, _, _ := strings.Cut(string(out), "\n")
	fields := strings.Fields(line)
	version := fmt.Sprintf("of an unknown version (%v)", err)
	if field < len(fields) {
		version = fields[field]
	}
	versions.Store(program, version)
	return version
}

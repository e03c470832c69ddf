package node

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"

	"github.com/containerd/cgroups/v3"
	"github.com/containerd/containerd/v2/client"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/process"
)

// Finding is what Check says of one thing that a host must or should have.
type Finding struct {
	Name string `json:"name"`
	// State is "ok"; "warn" if something does not work that one can do without;
	// "missing" if containers cannot be checkpointed or restored.
	State  string `json:"state"`
	Detail string `json:"detail"`
	// Fix says what a person can do about it.
	Fix string `json:"fix,omitempty"`
}

func ok(name, format string, args ...any) Finding {
	return Finding{name, "ok", fmt.Sprintf(format, args...), ""}
}

func warn(name, detail, fix string) Finding    { return Finding{name, "warn", detail, fix} }
func missing(name, detail, fix string) Finding { return Finding{name, "missing", detail, fix} }

// Check tells whether this host can checkpoint and restore containers, and what is
// missing.
func (n *Node) Check(ctx context.Context) []Finding {
	found := []Finding{checkRoot(), checkKernel(), checkSoftDirty()}
	found = append(found, checkCRIU(ctx)...)
	found = append(found, checkRuntimes(ctx)...)
	found = append(found, checkCgroups(), checkFirewall())
	return append(found, n.checkContainerd(ctx)...)
}

// checkCRIU runs CRIU's own check.
func checkCRIU(ctx context.Context) []Finding {
	path, err := exec.LookPath("criu")
	if err != nil {
		return []Finding{missing("criu", "not in PATH", "apt-get install criu, or https://criu.org/Installation")}
	}
	out, err := exec.CommandContext(ctx, path, "--version").CombinedOutput()
	if err != nil {
		return []Finding{missing("criu", fmt.Sprintf("%s does not start: %v", path, err), "install it anew")}
	}
	f := judgeCRIU(string(out), checkpoint.KernelRelease())
	if f.State == "missing" {
		return []Finding{f}
	}
	out, err = exec.CommandContext(ctx, path, "check").CombinedOutput()
	if err != nil {
		return []Finding{f, missing("criu check", lastLine(string(out)), "run `criu check` to see all")}
	}
	return []Finding{f, ok("criu check", "%s", lastLine(string(out)))}
}

var versionNumber = regexp.MustCompile(`(\d+)\.(\d+)`)

// version finds the first version in a text.
func versionIn(s string) (major, minor int, found bool) {
	m := versionNumber.FindStringSubmatch(s)
	if m == nil {
		return 0, 0, false
	}
	major, _ = strconv.Atoi(m[1])
	minor, _ = strconv.Atoi(m[2])
	return major, minor, true
}

// judgeCRIU judges the version that CRIU says it is of, on a kernel. CRIU 4.1
// passes its own check on Linux 6.16 and later, but cannot dump an inet socket
// there.
func judgeCRIU(says, kernel string) Finding {
	const get = "https://criu.org/Installation"
	major, minor, found := versionIn(says)
	if !found {
		return missing("criu", fmt.Sprintf("no version in %q", lastLine(says)), get)
	}
	km, kn, _ := versionIn(kernel)
	switch {
	case major < 4:
		return missing("criu", fmt.Sprintf("%d.%d is too old", major, minor), "install 4.1 or later: "+get)
	case (km > 6 || km == 6 && kn >= 16) && major == 4 && minor < 2:
		return missing("criu", fmt.Sprintf("%d.%d cannot dump sockets on Linux %s", major, minor, kernel), "install 4.2 or later: "+get)
	}
	return ok("criu", "%d.%d", major, minor)
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.TrimSpace(lines[len(lines)-1])
}

// checkRuntimes looks for an OCI runtime that works with CRIU; one is enough.
func checkRuntimes(ctx context.Context) []Finding {
	run := func(args ...string) (string, bool) {
		cmd := exec.CommandContext(ctx, args[0], args[1:]...)
		// crun makes itself a folder there even to tell its version.
		if dir, err := os.MkdirTemp("", "stasis-check-"); err == nil {
			defer os.RemoveAll(dir)
			cmd.Env = append(os.Environ(), "XDG_RUNTIME_DIR="+dir)
		}
		out, err := cmd.Output()
		return string(out), err == nil
	}
	runc := warn("runc", "not in PATH", "apt-get install runc")
	if out, done := run("runc", "features"); done {
		runc = judgeRunc(out)
	} else if out, done := run("runc", "--version"); done {
		runc = warn("runc", lastLine(strings.SplitN(out, "\n", 2)[0])+" is too old to tell what it can do", "install 1.1 or later")
	}
	crun := warn("crun", "not in PATH", "apt-get install crun libcriu2, if runc is not enough")
	if out, done := run("crun", "--version"); done {
		crun = judgeCrun(out)
	}
	for _, f := range []*Finding{&runc, &crun} {
		switch {
		case f.State != "ok":
		case !process.SupportsCheckpoint(ctx, f.Name):
			*f = warn(f.Name, "has no commands checkpoint and restore", "install another build of it")
		case !process.SupportsPodRestore(ctx, f.Name):
			f.Detail += "; cannot restore into pods on a host with SELinux"
		}
	}
	if runc.State != "ok" && crun.State != "ok" {
		runc.State = "missing"
	}
	if runc.State == "ok" && crun.State != "ok" {
		return []Finding{runc} // nobody misses the other
	}
	return []Finding{runc, crun}
}

func judgeRunc(features string) Finding {
	if !regexp.MustCompile(`"org\.opencontainers\.runc\.checkpoint\.enabled":\s*"true"`).MatchString(features) {
		return warn("runc", "finds no usable CRIU", "see criu")
	}
	m := regexp.MustCompile(`"org\.opencontainers\.runc\.version":\s*"([^"]+)"`).FindStringSubmatch(features)
	if m == nil {
		return ok("runc", "with CRIU")
	}
	return ok("runc", "%s, with CRIU", m[1])
}

func judgeCrun(says string) Finding {
	first, _, _ := strings.Cut(says, "\n")
	if !strings.Contains(says, "+CRIU") {
		return warn("crun", first+" is built without CRIU", "install one with +CRIU and libcriu2")
	}
	return ok("crun", "%s, with CRIU", first)
}

func checkCgroups() Finding {
	switch cgroups.Mode() {
	case cgroups.Unified:
		return ok("cgroup", "v2")
	case cgroups.Hybrid:
		return warn("cgroup", "v1 and v2 mixed, which crun refuses", "boot with systemd.unified_cgroup_hierarchy=1, or use runc")
	case cgroups.Legacy:
		return ok("cgroup", "v1")
	}
	return missing("cgroup", "none is mounted at /sys/fs/cgroup", "mount -t cgroup2 none /sys/fs/cgroup")
}

// checkFirewall looks for what CRIU keeps packets off with while it saves TCP
// connections; a build may have nftables instead.
func checkFirewall() Finding {
	for _, program := range []string{"iptables-restore", "nft"} {
		if _, err := exec.LookPath(program); err == nil {
			return ok("firewall", "%s", program)
		}
	}
	return warn("firewall", "neither iptables-restore nor nft in PATH, so TCP connections cannot be saved", "apt-get install iptables")
}

// checkContainerd looks at containerd, and whether it finds our shim.
func (n *Node) checkContainerd(ctx context.Context) []Finding {
	c, err := n.Client(ctx)
	if err != nil {
		return []Finding{missing("containerd", err.Error(), "")}
	}
	v, err := c.Version(ctx)
	if err != nil {
		return []Finding{missing("containerd", err.Error(), "")}
	}
	return append([]Finding{judgeContainerd(v.Version)}, checkShim(ctx, c, n.address), checkSnapshotter(ctx, c))
}

func judgeContainerd(version string) Finding {
	major, minor, found := versionIn(version)
	if found && (major < 1 || major == 1 && minor < 7) {
		return missing("containerd", version+" is too old", "install 1.7 or later")
	}
	return ok("containerd", "%s", version)
}

func checkSnapshotter(ctx context.Context, c *client.Client) Finding {
	plugins, err := c.IntrospectionService().Plugins(ctx, "type==io.containerd.snapshotter.v1")
	if err != nil {
		return warn("snapshotter", err.Error(), "")
	}
	var usable []string
	for _, p := range plugins.Plugins {
		if p.InitErr == nil {
			usable = append(usable, p.ID)
		}
	}
	for _, name := range usable {
		if name == "overlayfs" {
			return ok("snapshotter", "overlayfs")
		}
	}
	return warn("snapshotter", fmt.Sprintf("no overlayfs (%s): the container's whole root filesystem is copied while it stands still",
		strings.Join(usable, ", ")), "use a file system for containerd's root that overlayfs can be on, such as ext4")
}

package stack

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"
)

// writeConfig writes containerd's configuration, in the oldest format that the
// release reads.
func (s *Stack) writeConfig() error {
	var b strings.Builder
	old := s.opts.Version == "1.7"
	if old {
		fmt.Fprintln(&b, "version = 2")
	} else {
		fmt.Fprintln(&b, "version = 3")
	}
	// Nothing of this machine may serve us, nor may we get in its way: not
	// its plugins' sockets, and no snapshotter that wants a device.
	disabled := []string{
		"io.containerd.nri.v1.nri",
		"io.containerd.snapshotter.v1.blockfile", "io.containerd.snapshotter.v1.btrfs",
		"io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.erofs",
		"io.containerd.snapshotter.v1.zfs",
	}
	if !s.opts.CRI {
		disabled = append(disabled, "io.containerd.grpc.v1.cri",
			"io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime",
			"io.containerd.podsandbox.controller.v1.podsandbox")
	}
	disabled = slices.DeleteFunc(disabled, func(id string) bool { return id == "io.containerd.snapshotter.v1."+s.opts.Snapshotter })
	level := "info"
	if os.Getenv("STASIS_DEBUG") != "" {
		level = "debug"
	}
	if s.opts.Machine {
		// As in the file that containerd makes by itself.
		fmt.Fprintln(&b, `imports = ["/etc/containerd/conf.d/*.toml"]`)
	}
	root := s.path("root")
	if s.opts.Machine {
		root = "/var/lib/containerd"
	}
	fmt.Fprintf(&b, `root = %q
state = %q
disabled_plugins = ["%s"]

[grpc]
  address = %q

[debug]
  level = %q

[plugins."io.containerd.internal.v1.opt"]
  path = %q
`, root, s.StateDir(), strings.Join(disabled, `", "`), s.Address(), level, s.path("opt"))
	// Those that containerd itself has for shims. Its two seconds for State are too
	// short for fifty containers at once on a busy machine; that a shim keeps them
	// is for TestQueriesAnswerAtOnce.
	slow := Patience(time.Second)
	fmt.Fprintf(&b, `
[timeouts]
  "io.containerd.timeout.task.state" = %q
`, 10*slow)
	if slow > time.Second {
		fmt.Fprintf(&b, `  "io.containerd.timeout.metrics.shimstats" = %[1]q
  "io.containerd.timeout.shim.cleanup" = %[2]q
  "io.containerd.timeout.shim.load" = %[2]q
  "io.containerd.timeout.shim.shutdown" = %[2]q
`, 2*slow, 5*slow)
	}
	if !old {
		fmt.Fprintf(&b, `
[plugins."io.containerd.shim.v1.manager"]
  socket_dir = %q
`, s.path("s"))
	}
	if s.opts.CRI {
		if s.opts.NodeConfig != "" {
			if err := os.WriteFile(s.NodeConfig(), []byte(s.opts.NodeConfig), 0o600); err != nil {
				return err
			}
		}
		if err := s.criConfig(&b); err != nil {
			return err
		}
	}
	if err := s.snapshotterConfig(&b); err != nil {
		return err
	}
	b.WriteString("\n" + s.opts.ExtraConfig)
	return os.WriteFile(s.path("config.toml"), []byte(b.String()), 0o600)
}

// snapshotterConfig is what a snapshotter needs that does not work by itself.
func (s *Stack) snapshotterConfig(b *strings.Builder) error {
	switch s.opts.Snapshotter {
	case "erofs":
		fmt.Fprintf(b, `
[plugins."io.containerd.service.v1.diff-service"]
  default = ["erofs", "walking"]
`)
	case "blockfile":
		scratch := s.path("scratch.ext4")
		for _, command := range [][]string{{"truncate", "--size", "256M", scratch}, {"mkfs.ext4", "-q", scratch}} {
			if out, err := exec.Command(command[0], command[1:]...).CombinedOutput(); err != nil {
				return fmt.Errorf("%q: %w: %s (`make setup` installs it)", command, err, out)
			}
		}
		fmt.Fprintf(b, `
[plugins."io.containerd.snapshotter.v1.blockfile"]
  scratch_file = %q
  fs_type = "ext4"
`, scratch)
	}
	return nil
}

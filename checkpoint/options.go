package checkpoint

import (
	"fmt"
	"slices"
)

// Options are the options of CRIU's dump that a restore has to repeat.
type Options struct {
	// OpenTCP: there are TCP connections (--tcp-established).
	OpenTCP bool `json:"open_tcp,omitempty"`
	// ExternalUnixSockets: there are unix datagram sockets whose peer is
	// outside the container (--ext-unix-sk).
	ExternalUnixSockets bool `json:"external_unix_sockets,omitempty"`
	// Terminal is CRIU's --shell-job: a terminal belongs to a session whose
	// leader is outside the container. A container that merely has a terminal
	// of its own does not need it; Manifest.TerminalIO says that.
	Terminal bool `json:"terminal,omitempty"`
	// FileLocks: file locks were held (--file-locks).
	FileLocks bool `json:"file_locks,omitempty"`
	// EmptyNamespaces are kinds of namespaces, in OCI's words, that are
	// restored without their content (--empty-ns).
	EmptyNamespaces []string `json:"empty_namespaces,omitempty"`
	// CgroupsMode is "", "soft", "full", "strict" or "ignore"
	// (--manage-cgroups-mode); "" is the runtime's default.
	CgroupsMode string `json:"cgroups_mode,omitempty"`
}

// DumpOptions are options of CRIU's dump that a restore finds in the images.
type DumpOptions struct {
	TCPClose   bool   // --tcp-close: connections are dropped
	LinkRemap  bool   // --link-remap: deleted files that have other names are linked again
	GhostLimit uint64 // --ghost-limit, in bytes; 0: CRIU's own
}

// criuConfig is what of them no runtime has a flag for, as lines of a CRIU
// configuration file.
func (o DumpOptions) criuConfig() string {
	lines := ""
	if o.TCPClose {
		lines += "tcp-close\nskip-in-flight\n" // the latter are not accepted yet; see skipInFlight
	}
	if o.LinkRemap {
		lines += "link-remap\n"
	}
	if o.GhostLimit > 0 {
		lines += fmt.Sprintf("ghost-limit %d\n", o.GhostLimit)
	}
	return lines
}

// skipInFlight is the flag with which a runtime tells CRIU to skip connections that
// nobody has accepted yet. Since 1.3 runc tells CRIU not to without the flag,
// whatever the configuration says.
func skipInFlight(runtime, version string) []string {
	var major, minor int
	if n, _ := fmt.Sscanf(version, "%d.%d", &major, &minor); runtime == "runc" && n == 2 && (major > 1 || minor >= 3) {
		return []string{"--tcp-skip-in-flight"}
	}
	return nil
}

var (
	namespaceKind = lazyRegexp(`^[a-z]{1,16}$`)
	cgroupsModes  = []string{"", "soft", "full", "strict", "ignore"}
)

// check refuses values that could not have come from a dump: these strings end
// up on the command line of a runtime.
func (o *Options) check() error {
	for _, ns := range o.EmptyNamespaces {
		if !namespaceKind().MatchString(ns) {
			return fmt.Errorf("options.empty_namespaces: %.40q is no kind of namespace", ns)
		}
	}
	if !slices.Contains(cgroupsModes, o.CgroupsMode) {
		return fmt.Errorf("options.cgroups_mode: %.40q is none of soft, full, strict, ignore", o.CgroupsMode)
	}
	return nil
}

package checkpoint

import (
	"fmt"
	"slices"
	"strings"

	"github.com/stasis-run/stasis/checkpoint/fault"
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

var cgroupsModes = []string{"", "soft", "full", "strict", "ignore"}

// check refuses values that could not have come from a dump: these strings end
// up on the command line of a runtime.
func (o *Options) check() error {
	for _, ns := range o.EmptyNamespaces {
		if len(ns) < 1 || len(ns) > 16 || strings.Trim(ns, "abcdefghijklmnopqrstuvwxyz") != "" {
			return fmt.Errorf("options.empty_namespaces: %.40q is no kind of namespace", ns)
		}
	}
	if !slices.Contains(cgroupsModes, o.CgroupsMode) {
		return fmt.Errorf("options.cgroups_mode: %.40q is none of soft, full, strict, ignore", o.CgroupsMode)
	}
	return nil
}

// AnnotationTCP says what a restore does with established TCP connections:
// "keep" or "close". Without it they are kept if the container has all their
// local addresses, and closed if not.
const AnnotationTCP = "stasis.run/tcp"

// CheckTCP refuses a value that AnnotationTCP cannot have.
func CheckTCP(how string) error {
	if how != "keep" && how != "close" {
		return fault.Invalid("annotation %s=%q: it is keep or close", AnnotationTCP, how)
	}
	return nil
}

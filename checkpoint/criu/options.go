package criu

import "fmt"

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
// no process has accepted yet. Since 1.3, without the flag, runc tells CRIU not to skip
// them, whatever the configuration says.
func skipInFlight(runtime, version string) []string {
	var major, minor int
	if n, _ := fmt.Sscanf(version, "%d.%d", &major, &minor); runtime == "runc" && n == 2 && (major > 1 || minor >= 3) {
		return []string{"--tcp-skip-in-flight"}
	}
	return nil
}

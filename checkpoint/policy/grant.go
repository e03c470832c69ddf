package policy

import (
	"maps"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/pkg/cap"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// capset is a set of capabilities by their numbers.
type capset uint64

// allCaps are those that this version knows by name.
var allCaps = cap.Known()

func capsOf(lists ...[]string) (set capset) {
	for _, list := range lists {
		for _, name := range list {
			if i := slices.Index(allCaps, strings.ToUpper(name)); i >= 0 {
				set |= 1 << i
			}
		}
	}
	return set
}

// capsIn reads a set of an image, in words of 32 bits.
func capsIn(words []uint32) (set capset, ok bool) {
	for i, w := range words {
		switch {
		case i < 2:
			set |= capset(w) << (32 * i)
		case w != 0:
			return set, false
		}
	}
	return set, true
}

func (s capset) has(name string) bool { return s&capsOf([]string{name}) != 0 }

func (s capset) String() string {
	names, unknown := cap.FromBitmap(uint64(s))
	if len(unknown) > 0 {
		names = append(names, "unknown ones")
	}
	return strings.Join(names, " ")
}

// grant is what the processes of a container can come to have.
//
// Without no_new_privs, a program with set-user-ID or file capabilities, which
// the image may well contain, gives any ID, and capabilities up to the bounding
// set. With it there is only what the spec names.
type grant struct {
	bounding    capset
	caps        capset // in any of the other sets
	inheritable capset
	noNewPrivs  bool
	anyUID      bool
	anyGID      bool
	uids, gids  map[uint32]bool
	devices     map[string]bool // paths
	deviceNodes map[[2]int64]bool
}

// defaultDevices are what every container has (OCI runtime spec).
var defaultDevices = map[string][2]int64{
	"/dev/null": {1, 3}, "/dev/zero": {1, 5}, "/dev/full": {1, 7}, "/dev/random": {1, 8}, "/dev/urandom": {1, 9},
	"/dev/tty": {5, 0}, "/dev/console": {5, 1}, "/dev/ptmx": {5, 2},
}

func grantOf(spec *specs.Spec) grant {
	g := grant{uids: map[uint32]bool{}, gids: map[uint32]bool{}, devices: map[string]bool{}, deviceNodes: map[[2]int64]bool{}}
	if p := spec.Process; p != nil {
		g.noNewPrivs = p.NoNewPrivileges
		g.uids[p.User.UID] = true
		g.gids[p.User.GID] = true
		for _, gid := range p.User.AdditionalGids {
			g.gids[gid] = true
		}
		if caps := p.Capabilities; caps != nil {
			g.bounding = capsOf(caps.Bounding)
			g.caps = capsOf(caps.Permitted, caps.Effective, caps.Ambient)
			g.inheritable = capsOf(caps.Inheritable)
		}
	}
	if !g.noNewPrivs {
		g.caps |= g.bounding | g.inheritable
	}
	g.inheritable |= g.caps
	if g.caps.has("CAP_SETPCAP") {
		g.inheritable |= g.bounding
	}
	g.anyUID = !g.noNewPrivs || g.caps.has("CAP_SETUID")
	g.anyGID = !g.noNewPrivs || g.caps.has("CAP_SETGID")
	for path, node := range defaultDevices {
		g.devices[path], g.deviceNodes[node] = true, true
	}
	if spec.Linux != nil {
		for _, d := range spec.Linux.Devices {
			g.devices[d.Path], g.deviceNodes[[2]int64{d.Major, d.Minor}] = true, true
		}
	}
	return g
}

func (g *grant) uid(id uint32) bool { return g.anyUID || g.uids[id] }
func (g *grant) gid(id uint32) bool { return g.anyGID || g.gids[id] }

// any tells whether a process can come to have one of the capabilities.
func (g *grant) any(names ...string) bool { return g.caps&capsOf(names) != 0 }

func sortedIDs(set map[uint32]bool) []uint32 { return slices.Sorted(maps.Keys(set)) }

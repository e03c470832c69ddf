package policy

import (
	"io"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"

	core "github.com/checkpoint-restore/go-criu/v8/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/netdev"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pidns"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/userns"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/layout"
)

// namespaceKinds are the namespaces that a spec decides. That of time is not among
// them: CRIU always makes one, in which clocks go on where they were.
var namespaceKinds = []struct {
	kind specs.LinuxNamespaceType
	id   func(*core.TaskKobjIdsEntry) uint32
}{
	{specs.PIDNamespace, (*core.TaskKobjIdsEntry).GetPidNsId},
	{specs.NetworkNamespace, (*core.TaskKobjIdsEntry).GetNetNsId},
	{specs.IPCNamespace, (*core.TaskKobjIdsEntry).GetIpcNsId},
	{specs.UTSNamespace, (*core.TaskKobjIdsEntry).GetUtsNsId},
	{specs.MountNamespace, (*core.TaskKobjIdsEntry).GetMntNsId},
	{specs.UserNamespace, (*core.TaskKobjIdsEntry).GetUserNsId},
	{specs.CgroupNamespace, (*core.TaskKobjIdsEntry).GetCgroupNsId},
}

// namespace returns the spec's entry for a kind of namespaces, or nil.
func (c *checker) namespace(kind specs.LinuxNamespaceType) *specs.LinuxNamespace {
	if c.spec.Linux != nil {
		for i, ns := range c.spec.Linux.Namespaces {
			if ns.Type == kind {
				return &c.spec.Linux.Namespaces[i]
			}
		}
	}
	return nil
}

// sharesHosts tells whether a spec names the host's own namespace, by a path.
func (c *checker) sharesHosts(kind specs.LinuxNamespaceType) bool {
	ns := c.namespace(kind)
	if ns == nil || ns.Path == "" {
		return false
	}
	name := map[specs.LinuxNamespaceType]string{specs.NetworkNamespace: "net", specs.MountNamespace: "mnt"}[kind]
	if name == "" {
		name = string(kind)
	}
	own, err := os.Stat("/proc/self/ns/" + name)
	that, err2 := os.Stat(ns.Path)
	return err == nil && err2 == nil && os.SameFile(own, that)
}

// init returns the first process that has namespaces.
func (c *checker) init() *task {
	for i := range c.tasks {
		if c.tasks[i].alive {
			return &c.tasks[i]
		}
	}
	return nil
}

// checkNamespaces compares the namespaces of each process with the spec's. One that
// has the number of CRIU's own stays in the host's.
func (c *checker) checkNamespaces() error {
	init := c.init()
	if init == nil {
		return fault.Invalid("pstree.img: lists no process that lives")
	}
	for i := range c.tasks {
		t := &c.tasks[i]
		if !t.alive {
			continue
		}
		for _, ns := range namespaceKinds {
			id, host := ns.id(t.ids), ns.id(c.inventory.root)
			shared := id == host || id == 0
			switch {
			case c.sharesHosts(ns.kind):
			case shared && c.namespace(ns.kind) != nil:
				c.refuse("%s: is in the host's %s namespace, the spec has another", t, ns.kind)
			case !shared && c.namespace(ns.kind) == nil:
				c.refuse("%s: is in a %s namespace of its own, the spec has the host's", t, ns.kind)
			case id != ns.id(init.ids) && (ns.kind != specs.MountNamespace || !c.grant.any("CAP_SYS_ADMIN")):
				c.refuse("%s: is in another %s namespace than %s", t, ns.kind, init)
			}
		}
	}
	if err := c.checkUserNamespace(init.ids.GetUserNsId()); err != nil {
		return err
	}
	var pid pidns.PidnsEntry
	if _, err := c.one(layout.PIDNamespace.Name(init.ids.GetPidNsId()), "PIDNS", &pid); err != nil {
		return err
	}
	c.checkJoined(specs.PIDNamespace, pid.GetExtKey(), "extRootPidNS")
	return nil
}

// checkJoined compares how a namespace comes to be: the spec names one that is
// there, and the runtime gives it to CRIU by a certain name; or CRIU makes it.
func (c *checker) checkJoined(kind specs.LinuxNamespaceType, have, key string) {
	ns := c.namespace(kind)
	want := ""
	if ns != nil && ns.Path != "" {
		want = key
	}
	switch {
	case ns == nil || have == want || c.sharesHosts(kind):
	case want == "":
		c.refuse("the %s namespace is one from outside (%s), the spec has a new one", kind, quote(have))
	default:
		c.refuse("the %s namespace is a new one, the spec has %s", kind, ns.Path)
	}
}

func (c *checker) checkUserNamespace(id uint32) error {
	var e userns.UsernsEntry
	found, err := c.one(layout.UserNamespace.Name(id), "USERNS", &e)
	if err != nil || c.namespace(specs.UserNamespace) == nil || id == c.inventory.root.GetUserNsId() {
		return err
	}
	if !found {
		return fault.Invalid("userns-%d.img: missing", id)
	}
	for _, m := range []struct {
		name string
		have []*userns.UidGidExtent
		want []specs.LinuxIDMapping
	}{{"uid_map", e.GetUidMap(), c.spec.Linux.UIDMappings}, {"gid_map", e.GetGidMap(), c.spec.Linux.GIDMappings}} {
		have := make([]specs.LinuxIDMapping, len(m.have))
		for i, x := range m.have {
			have[i] = specs.LinuxIDMapping{ContainerID: x.GetFirst(), HostID: x.GetLowerFirst(), Size: x.GetCount()}
		}
		order := func(a, b specs.LinuxIDMapping) int { return int(int64(a.ContainerID) - int64(b.ContainerID)) }
		want := slices.Clone(m.want)
		slices.SortFunc(have, order)
		slices.SortFunc(want, order)
		// Without a path there is a namespace to be made; with one, these
		// mappings are those of the namespace, and the spec need not have them.
		if ns := c.namespace(specs.UserNamespace); !slices.Equal(have, want) && (ns.Path == "" || len(want) > 0) {
			c.refuse("the user namespace's %s is %v, the spec's %v", m.name, have, want)
		}
	}
	return nil
}

// checkNetwork looks at what CRIU does to the network namespace: it configures one
// that it has made, as root.
func (c *checker) checkNetwork() error {
	ns := c.namespace(specs.NetworkNamespace)
	id := c.init().ids.GetNetNsId()
	var e netdev.NetnsEntry
	found, err := c.one(layout.NetworkNamespace.Name(id), "NETNS", &e)
	if err != nil {
		return err
	}
	if found || ns != nil && ns.Path != "" {
		c.checkJoined(specs.NetworkNamespace, e.GetExtKey(), "extRootNetNS")
	}
	own := ns != nil && ns.Path == ""
	for _, name := range c.ckpt.Names() {
		prefix, _, _ := strings.Cut(name, "-")
		switch prefix {
		case "netdev":
			if err := c.checkDevicesOfNetwork(name); err != nil {
				return err
			}
		case "iptables", "ip6tables", "nftables":
			if !own || !c.grant.any("CAP_NET_ADMIN") {
				if err := c.checkRules(name); err != nil {
					return err
				}
			}
		}
		switch prefix {
		case "netdev", "ifaddr", "route", "route6", "rule":
			if !own {
				c.refuse("%s configures a network namespace that is not the container's own", name)
			}
		}
	}
	return nil
}

// checkDevicesOfNetwork refuses devices that the container could not have made. The
// names become parts of paths below /proc/sys.
func (c *checker) checkDevicesOfNetwork(name string) error {
	return c.each(name, "NETDEV", func(msg []byte) error {
		var e netdev.NetDeviceEntry
		if err := c.decode(msg, &e); err != nil {
			return err
		}
		if dev := e.GetName(); dev == "" || dev == "." || dev == ".." || len(dev) > 15 || strings.ContainsAny(dev, "/: \t\n") {
			c.refuse("%s: network device %s has no valid name", name, quote(dev))
		}
		switch e.GetType() {
		case netdev.NdType_LOOPBACK, netdev.NdType_VETH:
		default:
			if !c.grant.any("CAP_NET_ADMIN") {
				c.refuse("%s: network device %s of kind %s needs CAP_NET_ADMIN", name, quote(e.GetName()), e.GetType())
			}
		}
		return nil
	})
}

// Lines of a dump of iptables, and of nftables, that are no rules, or those by which
// CRIU itself keeps a network quiet during a dump.
var (
	emptyTable = sync.OnceValue(func() *regexp.Regexp {
		return regexp.MustCompile(`^([#*:].*|COMMIT|-A [A-Z]+ -j CRIU|-A CRIU -m mark --mark 0xc114 -j ACCEPT|-A CRIU -j DROP|)$`)
	})
	emptyNFTable = sync.OnceValue(func() *regexp.Regexp {
		return regexp.MustCompile(`^(table (ip|ip6|inet) [a-z]+ \{|chain [A-Z]+ \{|type [a-z]+ hook [a-z]+ priority [a-z0-9 +-]+; policy accept;|\}` +
			`|(meta mark 0x0*c114 )?counter packets \d+ bytes \d+ (accept|drop|jump CRIU)|)$`)
	})
)

// checkRules refuses firewall rules: CRIU gives the text to iptables-restore or nft.
// Tables, chains and policies without a rule are what a namespace has by itself.
func (c *checker) checkRules(name string) error {
	f, err := c.ckpt.OpenFile(name)
	if err != nil {
		return err
	}
	defer f.Close()
	const most = 64 << 10
	data, err := io.ReadAll(io.LimitReader(f, most+1))
	if err != nil {
		return err
	}
	if len(data) > most {
		c.refuse("%s: firewall rules of more than %d bytes", name, most)
		return nil
	}
	harmless := emptyTable()
	if strings.HasPrefix(name, "nftables") {
		harmless = emptyNFTable()
	}
	for line := range strings.Lines(string(data)) {
		line = strings.Trim(line, " \t\r\n\x00")
		if !harmless.MatchString(line) {
			c.refuse("%s: firewall rule %s needs CAP_NET_ADMIN and a network namespace of the container's own", name, quote(line))
			break
		}
	}
	return nil
}

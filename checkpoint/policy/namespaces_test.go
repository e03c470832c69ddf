package policy

import (
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/cgroup"
	core "github.com/checkpoint-restore/go-criu/v8/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/inventory"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/netdev"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pidns"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/userns"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
)

func TestNamespaces(t *testing.T) {
	ids := func(f *forgery, fn func(ids, host *core.TaskKobjIdsEntry)) {
		one(f, "inventory.img", "INVENTORY", func(inv *inventory.InventoryEntry) {
			one(f, "ids-6.img", "IDS", func(ids *core.TaskKobjIdsEntry) { fn(ids, inv.RootIds) })
		})
	}
	without := func(f *forgery, kind specs.LinuxNamespaceType) {
		var rest []specs.LinuxNamespace
		for _, ns := range f.spec.Linux.Namespaces {
			if ns.Type != kind {
				rest = append(rest, ns)
			}
		}
		f.spec.Linux.Namespaces = rest
	}
	for _, tc := range []struct {
		name string
		fn   func(*forgery)
		want string
	}{
		{"host's network", func(f *forgery) {
			ids(f, func(ids, host *core.TaskKobjIdsEntry) { ids.NetNsId = host.NetNsId })
		}, who + ": is in the host's network namespace, the spec has another"},
		{"host's pids", func(f *forgery) {
			ids(f, func(ids, host *core.TaskKobjIdsEntry) { ids.PidNsId = host.PidNsId })
		}, "host's pid namespace"},
		{"host's mounts", func(f *forgery) {
			ids(f, func(ids, host *core.TaskKobjIdsEntry) { ids.MntNsId = host.MntNsId })
		}, "host's mount namespace"},
		{"host's IPC", func(f *forgery) {
			ids(f, func(ids, host *core.TaskKobjIdsEntry) { ids.IpcNsId = host.IpcNsId })
		}, "host's ipc namespace"},
		{"host's UTS, not named", func(f *forgery) {
			ids(f, func(ids, _ *core.TaskKobjIdsEntry) { ids.UtsNsId = nil })
		}, "host's uts namespace"},
		{"user namespace", func(f *forgery) {
			ids(f, func(ids, _ *core.TaskKobjIdsEntry) { ids.UserNsId = proto.Uint32(99) })
		}, "in a user namespace of its own, the spec has the host's"},
		{"user namespace of the spec", func(f *forgery) {
			f.spec.Linux.Namespaces = append(f.spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
		}, "is in the host's user namespace"},
		{"mapping", func(f *forgery) {
			f.spec.Linux.Namespaces = append(f.spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
			f.spec.Linux.UIDMappings = []specs.LinuxIDMapping{{HostID: 100000, Size: 65536}}
			ids(f, func(ids, _ *core.TaskKobjIdsEntry) {
				ids.UserNsId = proto.Uint32(99)
				f.write("ids-6.img", "IDS", ids)
			})
			f.write("userns-99.img", "USERNS", &userns.UsernsEntry{UidMap: []*userns.UidGidExtent{
				{First: proto.Uint32(0), LowerFirst: proto.Uint32(0), Count: proto.Uint32(65536)}}})
		}, "user namespace's uid_map is [{0 0 65536}], the spec's [{0 100000 65536}]"},
		{"spec on the host's network", func(f *forgery) { without(f, specs.NetworkNamespace) }, "network namespace of its own, the spec has the host's"},
		{"new network", func(f *forgery) { f.write("netns-10.img", "NETNS", &netdev.NetnsEntry{}) }, "the network namespace is a new one, the spec has /proc/"},
		{"other network", func(f *forgery) {
			f.write("netns-10.img", "NETNS", &netdev.NetnsEntry{ExtKey: proto.String("other")})
		}, "the network namespace is a new one"},
		{"new pids", func(f *forgery) { f.write("pidns-9.img", "PIDNS", &pidns.PidnsEntry{}) }, "the pid namespace is a new one"},
		{"network to be made", func(f *forgery) {
			without(f, specs.NetworkNamespace)
			f.spec.Linux.Namespaces = append(f.spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.NetworkNamespace})
		}, `the network namespace is one from outside ("extRootNetNS")`},
		{"addresses", func(f *forgery) { f.raw("ifaddr-10.img", nil) }, "ifaddr-10.img configures a network namespace that is not"},
		{"device", func(f *forgery) {
			f.write("netdev-10.img", "NETDEV", &netdev.NetDeviceEntry{
				Type: netdev.NdType_MACVLAN.Enum(), Ifindex: proto.Uint32(2), Mtu: proto.Uint32(2), Flags: proto.Uint32(2), Name: proto.String("../../x")})
		}, `network device "../../x" has no valid name; netdev-10.img: network device "../../x" of kind MACVLAN needs CAP_NET_ADMIN`},
		{"nft", func(f *forgery) { f.raw("nftables-10.img", []byte("include \"/etc/shadow\"\n")) }, "nftables-10.img: firewall rule"},
		{"iptables", func(f *forgery) { f.raw("iptables-10.img", []byte("*filter\n-A INPUT -j ACCEPT\nCOMMIT\n")) }, "iptables-10.img: firewall rule"},
		{"run ID", func(f *forgery) {
			one(f, "inventory.img", "INVENTORY", func(e *inventory.InventoryEntry) { e.DumpCriuRunId = proto.String("x; flush ruleset") })
		}, "the run ID"},
		{"no host", func(f *forgery) {
			one(f, "inventory.img", "INVENTORY", func(e *inventory.InventoryEntry) { e.RootIds = nil })
		}, "inventory.img does not say"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newForgery(t)
			tc.fn(f)
			f.refused(tc.want)
		})
	}
	f := newForgery(t)
	f.raw("nftables-10.img", []byte("table ip filter {\n\tchain INPUT {\n\t\ttype filter hook input priority filter; policy accept;\n\t\tmeta mark 0x0000c114 counter packets 0 bytes 0 accept\n\t}\n}\n"))
	f.accepted()
}

func TestCgroups(t *testing.T) {
	member := func(suffix string) func(*cgroup.CgroupEntry) {
		return func(e *cgroup.CgroupEntry) {
			for _, m := range e.Sets[0].Ctls {
				if m.GetName() == "memory" {
					*m.Path += suffix
				}
			}
		}
	}
	memory := func(e *cgroup.CgroupEntry) *cgroup.CgControllerEntry {
		for _, c := range e.Controllers {
			if c.Cnames[0] == "memory" {
				return c
			}
		}
		return nil
	}
	property := func(name, value string) func(*cgroup.CgroupEntry) {
		return func(e *cgroup.CgroupEntry) {
			p := memory(e).Dirs[0].Properties[0]
			p.Name, p.Value = &name, &value
		}
	}
	child := func(name, value string) func(*cgroup.CgroupEntry) {
		return func(e *cgroup.CgroupEntry) {
			memory(e).Dirs[0].Children = []*cgroup.CgroupDirEntry{{DirName: proto.String("a"), Properties: []*cgroup.CgroupPropEntry{
				{Name: &name, Value: &value}}}}
		}
	}
	for _, tc := range []struct {
		name string
		fn   func(*cgroup.CgroupEntry)
		want string
	}{
		{"below", member("/child"), ""},
		{"root", func(e *cgroup.CgroupEntry) { e.Sets[0].Ctls[7].Path = proto.String("/") }, `group "/" of controller "memory" is outside of the container's`},
		{"sibling", member("x"), "is outside of the container's"},
		{"climbing", member("/../other"), "is outside of the container's"},
		{"in no list", func(e *cgroup.CgroupEntry) { e.Sets[0].Ctls[7].Name = proto.String("memory/../pids") }, "which the image does not list"},
		{"namespace", func(e *cgroup.CgroupEntry) { e.Sets[0].Ctls[7].CgnsPrefix = proto.Uint32(9999) }, "ends in the middle of a name"},
		{"controller", func(e *cgroup.CgroupEntry) { memory(e).Cnames[0] = "../x" }, `controller "../x" is none that this host has`},
		{"two", func(e *cgroup.CgroupEntry) { memory(e).Dirs = append(memory(e).Dirs, memory(e).Dirs[0]) }, "in several groups"},
		{"folder", func(e *cgroup.CgroupEntry) { memory(e).Dirs[0].DirName = proto.String("a/../..") }, "climbs out of"},
		{"child", func(e *cgroup.CgroupEntry) {
			memory(e).Dirs[0].Children = []*cgroup.CgroupDirEntry{{DirName: proto.String("a/../../b")}}
		}, "climbs out of"},
		{"hierarchy that the host lacks", func(e *cgroup.CgroupEntry) {
			e.Controllers = append(e.Controllers, &cgroup.CgControllerEntry{Cnames: []string{"name=evil"}, Dirs: []*cgroup.CgroupDirEntry{{DirName: proto.String("x")}}})
			e.Sets[0].Ctls = append(e.Sets[0].Ctls, &cgroup.CgMemberEntry{Name: proto.String("name=evil"), Path: proto.String("/x"), CgnsPrefix: proto.Uint32(2)})
		}, `controller "name=evil" is none that this host has`},
		{"two controllers in one", func(e *cgroup.CgroupEntry) { memory(e).Cnames = []string{"memory", "hugetlb"} }, `controller "hugetlb,memory" is none that this host has`},
		{"no controller", func(e *cgroup.CgroupEntry) { e.Controllers = append(e.Controllers, &cgroup.CgControllerEntry{}) }, `controller "" is none`},
		{"access to devices", property("devices.allow", "a *:* rwm"), `property "devices.allow" is no property that a restore may set`},
		{"no access", property("devices.deny", "a"), `property "devices.deny" is no property`},
		{"moved", property("cgroup.procs", "1"), `property "cgroup.procs" would move processes`},
		{"moved thread", property("tasks", "0"), `property "tasks" would move processes`},
		{"release", property("notify_on_release", "1"), "would have the host run its release agent"},
		{"ended", property("cgroup.kill", "1"), `property "cgroup.kill" is no property`},
		{"event", property("cgroup.event_control", "1 2"), "is no property"},
		{"controllers", property("cgroup.subtree_control", "+memory"), "lists no controllers"},
		{"list of controllers", property("cgroup.subtree_control", "cpu memory\n"), ""},
		{"large", property("memory.limit_in_bytes", strings.Repeat("0", 5000)), "is of 5000 bytes"},
		{"of a child", func(e *cgroup.CgroupEntry) {
			memory(e).Dirs[0].Children = []*cgroup.CgroupDirEntry{{DirName: proto.String("a"), Properties: []*cgroup.CgroupPropEntry{
				{Name: proto.String("devices.allow"), Value: proto.String("a")}}}}
		}, `property "devices.allow" is no property`},
		{"packets of the spec's class", child("net_cls.classid", "1048577\n"), ""},
		{"packets of no class", child("net_cls.classid", "0\n"), ""},
		{"packets of another class", child("net_cls.classid", "1048578\n"), `net_cls.classid of "1048578" is not the spec's`},
		{"packets of the spec's priority", child("net_prio.ifpriomap", "lo 0\neth0 5\n"), ""},
		{"packets of another priority", child("net_prio.ifpriomap", "lo 0\neth1 5\n"), `net_prio.ifpriomap of "eth1 5" is not the spec's`},
		{"packets in the container's own group, which is not set", property("net_cls.classid", "1048578\n"), ""},
		{"release_agent", func(e *cgroup.CgroupEntry) { memory(e).Dirs[0].Properties[0].Name = proto.String("release_agent") }, `property "release_agent" is no property that a restore may set`},
		{"property", func(e *cgroup.CgroupEntry) { memory(e).Dirs[0].Properties[0].Name = proto.String("../../x") }, `property "../../x" is no property`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newForgery(t)
			one(f, "cgroup.img", "CGROUP", tc.fn)
			f.spec.Linux.Resources.Network = &specs.LinuxNetwork{ClassID: u32(1048577), Priorities: []specs.LinuxInterfacePriority{{Name: "eth0", Priority: 5}}}
			f.judged(tc.want, "cgroup.img")
		})
	}
}

// The owner and mode of a group and of its files. CRIU gives them to the container's
// own group too, whatever the mode of the restore. A container of root's has no more
// than others.
func TestCgroupPerms(t *testing.T) {
	type perms = cgroup.CgroupPerms
	modes := func(m uint32) *perms { return &perms{Mode: &m, Uid: u32(0), Gid: u32(0)} }
	top := func(controller string) func(*cgroup.CgroupEntry) *cgroup.CgroupDirEntry {
		return func(e *cgroup.CgroupEntry) *cgroup.CgroupDirEntry {
			for _, c := range e.Controllers {
				if c.Cnames[0] == controller {
					return c.Dirs[0]
				}
			}
			return nil
		}
	}
	folder := func(p *perms) func(*cgroup.CgroupEntry) {
		return func(e *cgroup.CgroupEntry) { top("memory")(e).DirPerms = p }
	}
	file := func(name string, p *perms) func(*cgroup.CgroupEntry) {
		return func(e *cgroup.CgroupEntry) {
			prop := top("memory")(e).Properties[0]
			prop.Name, prop.Value, prop.Perms = &name, proto.String("0"), p
		}
	}
	child := func(dir *perms, name string, p *perms) func(*cgroup.CgroupEntry) {
		return func(e *cgroup.CgroupEntry) {
			d := top("freezer")(e)
			d.Children = append(d.Children, &cgroup.CgroupDirEntry{DirName: proto.String("a"), DirPerms: dir, Properties: []*cgroup.CgroupPropEntry{
				{Name: &name, Value: proto.String("0"), Perms: p}}})
		}
	}
	for _, tc := range []struct {
		name string
		fn   func(*cgroup.CgroupEntry)
		want string
	}{
		{"file for all to write", file("pids.max", modes(0o100666)), `"pids.max" has the mode 0666, at most 0644`},
		{"for others alone", file("pids.max", modes(0o100002)), `"pids.max" has the mode 0002, at most 0644`},
		{"for a group to write", file("pids.max", modes(0o100664)), `"pids.max" has the mode 0664, at most 0644`},
		{"set-user-ID", file("pids.max", modes(0o104644)), `"pids.max" has the mode 4644, at most 0644`},
		{"program", file("pids.max", modes(0o100755)), `"pids.max" has the mode 0755, at most 0644`},
		{"as the kernel has it", file("pids.max", modes(0o100644)), ""},
		{"read-only", file("devices.list", modes(0o100444)), ""},
		{"none", file("pids.max", nil), ""},
		{"folder for all to write", folder(modes(0o40777)), "has the mode 0777, at most 0755"},
		{"for a group", folder(modes(0o40775)), "has the mode 0775, at most 0755"},
		{"set-group-ID", folder(modes(0o42755)), "has the mode 2755, at most 0755"},
		{"sticky", folder(modes(0o41755)), "has the mode 1755, at most 0755"},
		{"as the kernel has a folder", folder(modes(0o40755)), ""},
		{"closed folder", folder(modes(0o40700)), ""},
		{"child for all to write", child(modes(0o40777), "pids.max", nil), `"a" has the mode 0777, at most 0755`},
		{"file of a child", child(nil, "pids.max", modes(0o666)), `"pids.max" has the mode 0666, at most 0644`},
		// CRIU leaves the mode of this one to chance, but writes none for a child.
		{"state of a child", child(nil, "freezer.state", modes(0o666)), `"freezer.state" has the mode 0666, at most 0644`},
		{"state", func(e *cgroup.CgroupEntry) {
			for _, p := range top("freezer")(e).Properties {
				if p.GetName() == "freezer.state" {
					p.Perms = modes(0o666)
				}
			}
		}, ""},
	} {
		for user, f := range map[string]*forgery{"root": newForgery(t), "user": confined(t)} {
			t.Run(tc.name+"/"+user, func(t *testing.T) {
				f.t = t
				one(f, "cgroup.img", "CGROUP", tc.fn)
				f.judged(tc.want, "cgroup.img")
			})
		}
	}
	f := confined(t)
	one(f, "cgroup.img", "CGROUP", file("pids.max", &perms{Mode: u32(0o644), Uid: u32(7), Gid: u32(0)}))
	f.refused(`"pids.max" belongs to 7:0`)
}

// Processes in several groups that the container has made below its own, each way
// of which CRIU would leave one outside of the new container's.
func TestCommonGroup(t *testing.T) {
	type m struct {
		path   string
		prefix uint32
	}
	for _, tc := range []struct {
		name    string
		dirs    []string
		members []m
		want    string
	}{
		{"as CRIU has it", []string{"x/c/main", "x/c/service"}, []m{{"/x/c/main", 4}, {"/x/c/service", 4}, {"/x/c/service/deep", 4}}, "/x/c"},
		{"one that climbs out", []string{"x/c/a", "x/c/b"}, []m{{"/x/c/a", 4}, {"/x/c/b/../../d", 4}}, ""},
		{"no namespace", []string{"x/c/a", "x/c/b"}, []m{{"/x/c/a", 0}, {"/x/c/b", 0}}, ""},
		{"the host's root", []string{"a", "b"}, []m{{"/a", 1}, {"/b", 1}}, ""},
		{"two namespaces", []string{"x/c/a", "x/d/b"}, []m{{"/x/c/a", 4}, {"/x/d/b", 4}}, ""},
		{"a namespace within a name", []string{"x/c/a", "x/c/b"}, []m{{"/x/c/a", 3}, {"/x/c/b", 3}}, ""},
		{"a namespace that ends in a slash", []string{"x/c/a", "x/c/b"}, []m{{"/x/c/a", 5}, {"/x/c/b", 5}}, ""},
		{"a namespace beyond the path", []string{"x/c/a", "x/c/b"}, []m{{"/x/c/a", 4}, {"/x/c", 9}}, ""},
		{"a group of nobody's", []string{"x/c/a", "x/c/b"}, []m{{"/x/c/a", 4}}, ""},
		{"a process in no group", []string{"x/c/a", "x/c/b"}, []m{{"/x/c/a", 4}, {"/x/c/b", 4}, {"/x/c/c", 4}}, ""},
		{"a group elsewhere", []string{"x/c/a", "etc"}, []m{{"/x/c/a", 4}, {"/etc", 4}}, ""},
		{"a group whose process another takes", []string{"x/c/a", "x/c/ab"}, []m{{"/x/c/a", 4}, {"/x/c/ab", 4}}, ""},
		{"the other way round", []string{"x/c/ab", "x/c/a"}, []m{{"/x/c/a", 4}, {"/x/c/ab", 4}}, "/x/c"},
		{"no process", []string{"x/c/a", "x/c/b"}, nil, ""},
	} {
		var dirs []*cgroup.CgroupDirEntry
		for _, d := range tc.dirs {
			dirs = append(dirs, &cgroup.CgroupDirEntry{DirName: proto.String(d)})
		}
		set := &cgroup.CgSetEntry{Ctls: []*cgroup.CgMemberEntry{{Name: proto.String("memory"), Path: proto.String("/other")}}}
		for _, m := range tc.members {
			set.Ctls = append(set.Ctls, &cgroup.CgMemberEntry{Name: proto.String(""), Path: proto.String(m.path), CgnsPrefix: proto.Uint32(m.prefix)})
		}
		c := &checker{budget: newBudget(t.Context())}
		if got, err := c.commonGroup("", dirs, []*cgroup.CgSetEntry{set}); got != tc.want || err != nil {
			t.Errorf("%s: %q, want %q", tc.name, got, tc.want)
		}
	}
}

// With cgroups_mode full, CRIU sets what the image says. That mode is in the manifest.
func TestCgroupsMode(t *testing.T) {
	property := func(name, value string) *cgroup.CgroupPropEntry {
		return &cgroup.CgroupPropEntry{Name: &name, Value: &value}
	}
	list := func(lines string) *cgroup.CgroupPropEntry { return property("devices.list", lines) }
	writable := func(p *cgroup.CgroupPropEntry) *cgroup.CgroupPropEntry {
		p.Perms = &cgroup.CgroupPerms{Mode: u32(0o100666), Uid: u32(0), Gid: u32(0)}
		return p
	}
	const allow = `property "devices.allow" is no property that a restore may set`
	for _, tc := range []struct {
		name     string
		property *cgroup.CgroupPropEntry // in place of devices.list
		child    bool                    // of a group below the container's own
		pod      bool
		want     string
	}{
		{"pod", list("c 1:3 rwm"), false, true, "limits (cgroups_mode full) in place of the pod's"},
		{"devices of all containers", list("c 1:3 rwm\nb *:* m"), false, false, ""},
		{"device of the spec", list("c 10:229 rw"), false, false, ""},
		{"more of it", list("c 10:229 rwm"), false, false, `access to devices "c 10:229 rwm"`},
		{"all", list("a *:* rwm"), false, false, `access to devices "a *:* rwm"`},
		{"disk", list("b 8:0 rwm"), false, false, `access to devices "b 8:0 rwm"`},
		{"disk among others", list("c 1:3 rwm\nb 8:0 rwm\nc 1:5 rwm"), false, false, `access to devices "b 8:0 rwm"`},
		// The kernel gives a group no more than the one above it has.
		{"all, for a child", list("a *:* rwm"), true, false, ""},
		{"allowed", property("devices.allow", "a *:* rwm"), false, false, allow},
		{"allowed to a child", property("devices.allow", "a *:* rwm"), true, false, allow},
		{"allowed what the spec has", property("devices.allow", "c 10:229 rw"), false, false, allow},
		{"list for all to write", writable(list("c 1:3 rwm")), false, false, `"devices.list" has the mode 0666, at most 0644`},
		{"child's for all to write", writable(list("c 1:3 rwm")), true, false, `"devices.list" has the mode 0666, at most 0644`},
		{"packets of another class", property("net_cls.classid", "7"), false, false, `net_cls.classid of "7" is not the spec's`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newForgery(t)
			one(f, "cgroup.img", "CGROUP", func(e *cgroup.CgroupEntry) {
				for _, ctl := range e.Controllers {
					if ctl.Cnames[0] != "devices" {
						continue
					}
					if tc.child {
						ctl.Dirs[0].Children = []*cgroup.CgroupDirEntry{{DirName: proto.String("a"), Properties: []*cgroup.CgroupPropEntry{tc.property}}}
						continue
					}
					for i, p := range ctl.Dirs[0].Properties {
						if p.GetName() == "devices.list" {
							ctl.Dirs[0].Properties[i] = tc.property
						}
					}
				}
			})
			major, minor := int64(10), int64(229)
			f.spec.Linux.Resources.Devices = append(f.spec.Linux.Resources.Devices,
				specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: &major, Minor: &minor, Access: "rw"})
			if !tc.pod {
				delete(f.spec.Annotations, annotationSandboxID)
			}
			f.seal("full")
			f.judged(tc.want)
		})
	}
}

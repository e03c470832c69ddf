package policy

import (
	"fmt"
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/creds"
	core "github.com/checkpoint-restore/go-criu/v8/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/inventory"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pstree"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/rlimit"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
)

const who = "process 6 (sleep)"

func (f *forgery) core(fn func(*core.CoreEntry)) { f.t.Helper(); one(f, "core-6.img", "CORE", fn) }

func (f *forgery) creds(fn func(*creds.CredsEntry)) {
	f.t.Helper()
	f.core(func(e *core.CoreEntry) { fn(e.ThreadCore.Creds) })
}

// confined makes both spec and checkpoint those of a container without privileges.
func confined(t testing.TB) *forgery {
	f := newForgery(t)
	f.confine()
	f.creds(func(c *creds.CredsEntry) {
		for _, id := range []*uint32{c.Uid, c.Euid, c.Suid, c.Fsuid, c.Gid, c.Egid, c.Sgid, c.Fsgid} {
			*id = 1000
		}
		c.Groups = []uint32{1000, 2000}
		none := []uint32{0, 0}
		c.CapBnd, c.CapPrm, c.CapEff, c.CapInh, c.CapAmb = none, none, none, none, none
		c.NoNewPrivs = proto.Uint32(1)
	})
	return f
}

func TestCredentials(t *testing.T) {
	confined(t).accepted()
	for _, tc := range []struct {
		name string
		fn   func(*creds.CredsEntry)
		want string
	}{
		{"uid", func(c *creds.CredsEntry) { *c.Uid = 0 }, "uid 0, the spec grants [1000]"},
		{"euid", func(c *creds.CredsEntry) { *c.Euid = 0 }, "euid 0"},
		{"suid", func(c *creds.CredsEntry) { *c.Suid = 0 }, "suid 0"},
		{"fsuid", func(c *creds.CredsEntry) { *c.Fsuid = 0 }, "fsuid 0"},
		{"gid", func(c *creds.CredsEntry) { *c.Gid = 0 }, "gid 0, the spec grants [1000 2000]"},
		{"egid", func(c *creds.CredsEntry) { *c.Egid = 0 }, "egid 0"},
		{"sgid", func(c *creds.CredsEntry) { *c.Sgid = 0 }, "sgid 0"},
		{"fsgid", func(c *creds.CredsEntry) { *c.Fsgid = 0 }, "fsgid 0"},
		{"group", func(c *creds.CredsEntry) { c.Groups = append(c.Groups, 42) }, "group 42"},
		{"bounding", func(c *creds.CredsEntry) { c.CapBnd = []uint32{1 << 21} }, "bounding capabilities beyond the spec's: CAP_SYS_ADMIN"},
		{"permitted", func(c *creds.CredsEntry) { c.CapPrm = []uint32{1 << 21} }, "permitted capabilities beyond the spec's: CAP_SYS_ADMIN"},
		{"effective", func(c *creds.CredsEntry) { c.CapEff = []uint32{0, 1 << 7} }, "effective capabilities beyond the spec's: CAP_BPF"},
		{"inheritable", func(c *creds.CredsEntry) { c.CapInh = []uint32{1} }, "inheritable capabilities beyond the spec's: CAP_CHOWN"},
		{"ambient", func(c *creds.CredsEntry) { c.CapAmb = []uint32{1} }, "ambient capabilities beyond"},
		{"future capability", func(c *creds.CredsEntry) { c.CapEff = []uint32{0, 1 << 30} }, "unknown ones"},
		{"further words", func(c *creds.CredsEntry) { c.CapEff = []uint32{0, 0, 1} }, "effective capabilities"},
		{"securebits", func(c *creds.CredsEntry) { *c.Secbits = 1 << 2 }, "securebits 0x4 need CAP_SETPCAP"},
		{"no_new_privs", func(c *creds.CredsEntry) { *c.NoNewPrivs = 0 }, "no_new_privs is not set, and the spec sets it"},
		{"no_new_privs of an old CRIU", func(c *creds.CredsEntry) { c.NoNewPrivs = nil }, "no_new_privs"},
		{"AppArmor", func(c *creds.CredsEntry) { c.LsmProfile = proto.String("other") }, `LSM profile "other", the spec has ""`},
		{"socket label", func(c *creds.CredsEntry) { c.LsmSockcreate = proto.String("other") }, `label for new sockets "other"`},
		{"AppArmor policies", func(c *creds.CredsEntry) { c.ApparmorData = []byte("policy") }, "brings AppArmor policies"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := confined(t)
			f.creds(tc.fn)
			f.refused(who, tc.want)
		})
	}
}

// What a process can come to by itself passes: root's by CAP_SETUID, another's by
// a set-user-ID program, if the spec does not exclude that.
func TestGrants(t *testing.T) {
	other := func(c *creds.CredsEntry) { *c.Uid, *c.Euid, *c.Gid, c.Groups = 999, 999, 999, []uint32{999} }
	f := newForgery(t)
	f.creds(other)
	f.accepted()
	f.spec.Process.NoNewPrivileges = true
	f.creds(func(c *creds.CredsEntry) { c.NoNewPrivs = proto.Uint32(1) })
	f.accepted()
	f.spec.Process.Capabilities.Permitted, f.spec.Process.Capabilities.Effective = nil, nil
	f.refused("uid 999, the spec grants [0]", "group 999", "permitted capabilities")
	f = newForgery(t)
	f.creds(func(c *creds.CredsEntry) { *c.Secbits = 1 << 4 })
	f.accepted()
	f.spec.Process.ApparmorProfile = "cri-containerd.apparmor.d"
	f.refused(`LSM profile "", the spec has "cri-containerd.apparmor.d"`)
	f.creds(func(c *creds.CredsEntry) { c.LsmProfile = proto.String("cri-containerd.apparmor.d") })
	f.accepted()
	// Another is replaced by the spec's; none is not.
	f.creds(func(c *creds.CredsEntry) { c.LsmProfile = proto.String("docker-default") })
	f.refused(`LSM profile "docker-default", the spec has "cri-containerd.apparmor.d"`)
	one(f, "inventory.img", "INVENTORY", func(i *inventory.InventoryEntry) { i.Lsmtype = inventory.Lsmtype_APPARMOR.Enum() })
	f.accepted()
	f.creds(func(c *creds.CredsEntry) { c.LsmProfile = proto.String("unconfined") })
	f.refused(`LSM profile "unconfined"`)
	f.spec.Process.ApparmorProfile, f.spec.Process.SelinuxLabel = "", "system_u:system_r:container_t:s0:c1,c2"
	f.refused("LSM profile")
}

func TestThreads(t *testing.T) {
	for _, tc := range []struct {
		name string
		fn   func(leader, thread *core.CoreEntry)
		want string
	}{
		{"like its leader", func(_, _ *core.CoreEntry) {}, ""},
		{"uid", func(_, th *core.CoreEntry) { *th.ThreadCore.Creds.Uid = 0 }, "thread 7: uid 0"},
		{"no credentials", func(_, th *core.CoreEntry) { th.ThreadCore.Creds = nil }, "thread 7: has no credentials"},
		{"no thread core", func(_, th *core.CoreEntry) { th.ThreadCore = nil }, "thread 7: has no credentials"},
		{"leader without credentials", func(l, _ *core.CoreEntry) { l.ThreadCore.Creds = nil }, who + ": has no credentials"},
		{"real-time", func(_, th *core.CoreEntry) { th.ThreadCore.SchedPolicy = proto.Uint32(1) }, "real-time scheduling policy 1 needs CAP_SYS_NICE"},
		{"nice", func(_, th *core.CoreEntry) { th.ThreadCore.SchedNice = proto.Int32(-20) }, "nice value -20"},
		{"leader's filter", func(_, th *core.CoreEntry) { th.ThreadCore.SeccompFilter, th.ThreadCore.SeccompMode = nil, nil }, ""},
		{"unknown filter", func(_, th *core.CoreEntry) { th.ThreadCore.SeccompFilter = proto.Uint32(9) }, "thread 7: its seccomp filters"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := confined(t)
			f.core(func(leader *core.CoreEntry) {
				thread := proto.Clone(leader).(*core.CoreEntry)
				tc.fn(leader, thread)
				f.write("core-7.img", "CORE", thread)
			})
			one(f, "pstree.img", "PSTREE", func(e *pstree.PstreeEntry) { e.Threads = []uint32{6, 7} })
			f.judged(tc.want)
		})
	}
}

func TestTasks(t *testing.T) {
	for _, tc := range []struct {
		name string
		fn   func(*forgery)
		want string
	}{
		{"old creds image", func(f *forgery) { f.write("creds-6.img", "CREDS", &creds.CredsEntry{}) }, `image "creds-6.img"`},
		{"AppArmor image", func(f *forgery) { f.write("apparmor.img", "APPARMOR") }, `image "apparmor.img"`},
		{"binfmt_misc image", func(f *forgery) { f.write("binfmt-misc-13.img", "BINFMT_MISC") }, `image "binfmt-misc-13.img"`},
		{"old file image", func(f *forgery) { f.write("reg-files.img", "REG_FILES") }, `image "reg-files.img"`},
		{"listed twice", func(f *forgery) {
			alter(f, "pstree.img", "PSTREE", func(all []*pstree.PstreeEntry) []*pstree.PstreeEntry { return append(all, all[0]) })
		}, "listed twice"},
		{"state", func(f *forgery) { f.core(func(e *core.CoreEntry) { *e.Tc.TaskState = 7 }) }, "unknown state 7"},
		{"comm", func(f *forgery) {
			f.core(func(e *core.CoreEntry) { *e.Tc.Comm, e.ThreadCore.SchedNice = "a\nb\x1b", proto.Int32(-1) })
		}, `process 6 (a\nb\x1b): nice`},
		{"zero byte", func(f *forgery) {
			f.creds(func(c *creds.CredsEntry) { c.LsmProfile = proto.String("a\x00b") })
		}, "zero byte"},
		{"unknown field", func(f *forgery) {
			f.core(func(e *core.CoreEntry) { e.ThreadCore.ProtoReflect().SetUnknown([]byte{0xf8, 0x07, 1}) })
		}, "thread_core_entry has a field or value that this version of Stasis does not know"},
		{"loginuid", func(f *forgery) { f.core(func(e *core.CoreEntry) { e.Tc.Loginuid = proto.Uint32(4711) }) }, "loginuid 4711"},
		{"OOM score", func(f *forgery) {
			f.core(func(e *core.CoreEntry) { e.Tc.OomScoreAdj = proto.Int32(-999) })
			score := 500
			f.spec.Process.OOMScoreAdj = &score
		}, who + ": OOM score -999, the spec has 0"},
		{"old seccomp mode", func(f *forgery) {
			f.core(func(e *core.CoreEntry) { e.Tc.OldSeccompMode = core.SeccompMode_disabled.Enum() })
		}, "seccomp mode of a CRIU older"},
		{"rlimit", func(f *forgery) {
			f.spec.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NPROC", Hard: 10, Soft: 10}}
		}, "resource limit RLIMIT_NPROC"},
		{"rlimit of another", func(f *forgery) {
			f.core(func(e *core.CoreEntry) {
				e.Tc.Rlimits.Rlimits[14] = &rlimit.RlimitEntry{Cur: proto.Uint64(99), Max: proto.Uint64(99)}
			})
		}, "resource limit RLIMIT_RTPRIO 99"},
		{"null page", func(f *forgery) {
			one(f, "mm-6.img", "MM", func(e *mm.MmEntry) { *e.Vmas[0].Start = 0 })
		}, "memory at address 0x0"},
		{"second ids", func(f *forgery) { f.core(func(e *core.CoreEntry) { e.Ids = filled(&core.TaskKobjIdsEntry{}) }) }, "core-6.img: has the namespaces"},
		{"no ids", func(f *forgery) { f.write("ids-6.img", "IDS") }, "ids-6.img"},
		{"descriptors", func(f *forgery) {
			f.raw("descriptors.json", []byte(`["/dev/null","pipe:[1]","pipe:[2]","pipe:[3]"]`))
		}, "descriptors.json lists 4"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newForgery(t)
			tc.fn(f)
			f.refused(tc.want)
		})
	}
}

func TestTooMuch(t *testing.T) {
	f := newForgery(t)
	limit, tasks := int64(1<<20), int64(1)
	f.spec.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &limit, Swap: &limit}
	f.spec.Linux.Resources.Pids = &specs.LinuxPids{Limit: &tasks}
	f.accepted()
	limit = 4096
	f.refused("MiB of memory, the container may have 0 MiB")
	limit = 1 << 20
	f.core(func(e *core.CoreEntry) { f.write("core-7.img", "CORE", e) })
	one(f, "pstree.img", "PSTREE", func(e *pstree.PstreeEntry) { e.Threads = []uint32{6, 7} })
	f.refused("2 processes and threads, the container may have 1")
	// An error is one line of a few findings.
	f = confined(t)
	f.creds(func(c *creds.CredsEntry) { c.Groups = make([]uint32, 1000) })
	f.refused("group 0", fmt.Sprintf("and %d more", 1000-maxFindings))
}

package allow

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/contrib/seccomp"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/cap"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// fakeHost has /dev/fuse and namespaces below /run, and limits of 5000.
var fakeHost = Host{
	Exists: func(path string) bool { return strings.HasPrefix(path, "/run/") || path == "/proc/1/ns/pid" },
	Device: func(path string) (string, int64, int64, bool) { return "c", 10, 229, path == "/dev/fuse" },
	Ulimit: func(name string) (uint64, bool) { _, known := ulimits[name]; return 5000, known },
}

func options(g Grants) Options {
	return Options{Grants: g, ID: "new", Namespace: "ns", OldNamespace: "old", Host: fakeHost}
}

// ordinary is containerd's own default.
func ordinary(t testing.TB) *specs.Spec {
	t.Helper()
	ctx := namespaces.WithNamespace(t.Context(), "ns")
	spec, err := oci.GenerateSpec(ctx, nil, &containers.Container{ID: "c"}, oci.WithDefaultUnixDevices, seccomp.WithDefaultProfile())
	if err != nil {
		t.Fatal(err)
	}
	spec.Process.Args = []string{"sleep", "1"}
	return spec
}

// An ordinary container is restored as it was, without a grant.
func TestOrdinary(t *testing.T) {
	asked := ordinary(t)
	got, asks, err := New(asked, nil, options(Grants{}))
	if err != nil || len(asks) > 0 {
		t.Fatalf("%v, %v", asks, err)
	}
	want := clone(asked)
	want.Linux.CgroupsPath = "/ns/new"
	if !reflect.DeepEqual(clone(got), want) {
		t.Errorf("it becomes\n%s\nwant\n%s", dump(got), dump(want))
	}
	if caps := asked.Process.Capabilities.Bounding; !slices.Equal(caps, ordinaryCaps) {
		t.Errorf("containerd's default capabilities are %v", caps)
	}
	if l := asked.Process.Rlimits; len(l) != 1 || l[0].Hard != ordinaryNofile {
		t.Errorf("containerd's default limits are %v", l)
	}
	if asks := (&builder{asked: asked}); !asks.asked.Process.NoNewPrivileges {
		t.Error("containerd's default is without no_new_privs")
	}
}

func dump(v any) string {
	data, _ := json.MarshalIndent(v, "", " ")
	return string(data)
}

// refusal is what New says without grants: the flags, and the error.
func refusal(t testing.TB, asked *specs.Spec) (flags []string, never, left []Ask, err error) {
	t.Helper()
	_, asks, err := New(asked, nil, options(Grants{}))
	for _, a := range asks {
		switch a.Verdict {
		case NeedsFlag:
			flags = append(flags, a.Flag)
		case Never:
			never = append(never, a)
		case LeftOut:
			left = append(left, a)
		default:
			t.Errorf("without a grant %+v", a)
		}
	}
	if (err != nil) != (len(flags)+len(never) > 0) || err != nil && !errdefs.IsPermissionDenied(err) {
		t.Errorf("%v, and the error is %v", asks, err)
	}
	for _, flag := range flags {
		if len(never) == 0 && !strings.Contains(err.Error(), flag) {
			t.Errorf("no %s in %v", flag, err)
		}
	}
	return flags, never, left, err
}

type change = func(*specs.Spec)

func addMount(destination, kind, source string, options ...string) change {
	return func(s *specs.Spec) {
		s.Mounts = append(s.Mounts, specs.Mount{Destination: destination, Type: kind, Source: source, Options: options})
	}
}

func addRule(rules ...specs.LinuxDeviceCgroup) change {
	return func(s *specs.Spec) { s.Linux.Resources.Devices = append(s.Linux.Resources.Devices, rules...) }
}

func namespace(kind specs.LinuxNamespaceType, path string) change {
	return func(s *specs.Spec) {
		s.Linux.Namespaces = slices.DeleteFunc(s.Linux.Namespaces, func(ns specs.LinuxNamespace) bool { return ns.Type == kind })
		if path != "-" {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: kind, Path: path})
		}
	}
}

func capability(names ...string) change {
	return func(s *specs.Spec) { s.Process.Capabilities.Ambient = names }
}

func rule(kind string, major, minor int64, access string) specs.LinuxDeviceCgroup {
	return specs.LinuxDeviceCgroup{Allow: true, Type: kind, Major: &major, Minor: &minor, Access: access}
}

// TestGrants has each grant: what asks for it, the flag that the refusal names, the
// grant, and others that do not do.
func TestGrants(t *testing.T) {
	minus := -5
	for name, tc := range map[string]struct {
		change change
		flags  string
		grant  Grants
		not    []Grants
	}{
		"mount":           {addMount("/host", "bind", "/", "rbind", "rw"), "--allow-mount /:/host", Grants{Mounts: []string{"/"}}, []Grants{{Mounts: []string{"/host", "/:/other"}}}},
		"mount by both":   {addMount("/host", "", "/data", "bind"), "--allow-mount /data:/host", Grants{Mounts: []string{"/data:/host"}}, []Grants{{Mounts: []string{"/data/"}}}},
		"all mounts":      {addMount("/host", "none", "/data", "bind"), "--allow-mount /data:/host", Grants{Mounts: []string{All}}, nil},
		"colon":           {addMount("/x", "bind", "/a:/b"), "--allow-mount /a:/b:/x", Grants{Mounts: []string{"/a:/b:/x"}}, []Grants{{Mounts: []string{"/a:/b"}}, {Mounts: []string{"/a"}}}},
		"engine's file":   {addMount("/etc/shadow", "bind", "/etc/shadow"), "--allow-mount /etc/shadow:/etc/shadow", Grants{Mounts: []string{"/etc/shadow"}}, nil},
		"proc elsewhere":  {addMount("/p", "proc", "proc"), "--allow-mount proc:/p", Grants{Mounts: []string{"proc:/p"}}, []Grants{{Mounts: []string{"/p"}}}},
		"writable sysfs":  {addMount("/sys", "sysfs", "sysfs", "ro", "rw"), "--allow-mount sysfs:/sys", Grants{Mounts: []string{"sysfs"}}, nil},
		"writable cgroup": {addMount("/sys/fs/cgroup", "cgroup", "cgroup"), "--allow-mount cgroup:/sys/fs/cgroup", Grants{Mounts: []string{"cgroup:/sys/fs/cgroup"}}, nil},
		"overlay":         {addMount("/o", "overlay", "overlay", "lowerdir=/:/etc"), "--allow-mount all", Grants{Mounts: []string{All}}, []Grants{{Mounts: []string{"overlay", "overlay:/o"}}}},
		"disk":            {addMount("/o", "ext4", "/dev/sda1"), "--allow-mount all", Grants{Mounts: []string{All}}, []Grants{{Mounts: []string{"/dev/sda1"}}}},
		"device": {func(s *specs.Spec) {
			s.Linux.Devices = append(s.Linux.Devices, specs.LinuxDevice{Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229})
			addRule(rule("c", 10, 229, "rwm"))(s)
		}, "--allow-device /dev/fuse", Grants{Devices: []string{"/dev/fuse"}}, []Grants{{Devices: []string{"/dev/other", "c 10:228 rwm"}}, {Devices: []string{"c 10:229 r"}}}},
		"device of another name": {func(s *specs.Spec) {
			s.Linux.Devices = append(s.Linux.Devices, specs.LinuxDevice{Path: "/dev/fuse", Type: "b", Major: 8, Minor: 0})
		}, "--allow-device 'b 8:0 rwm'", Grants{Devices: []string{"b 8:0 rwm"}}, []Grants{{Devices: []string{"/dev/fuse"}}}},
		"disk as an ordinary device": {func(s *specs.Spec) {
			s.Linux.Devices = append(s.Linux.Devices, specs.LinuxDevice{Path: "/dev/null", Type: "c", Major: 1, Minor: 1})
		}, "--allow-device 'c 1:1 rwm'", Grants{Devices: []string{"c 1:1 rwm"}}, []Grants{{Devices: []string{"/dev/null"}}}},
		"device rule":      {addRule(rule("c", 10, 200, "rw")), "--allow-device 'c 10:200 rw'", Grants{Devices: []string{"c 10:200 rwm"}}, []Grants{{Devices: []string{"c 10:200 r"}}}},
		"all of a kind":    {addRule(rule("b", -1, -1, "rm")), "--allow-device 'b *:* rm'", Grants{Devices: []string{"b *:* rwm"}}, nil},
		"all devices":      {addRule(specs.LinuxDeviceCgroup{Allow: true, Access: "rwm"}), "--allow-device all", Grants{Devices: []string{All}}, []Grants{{Devices: []string{"a *:* rwm"}}}},
		"all with numbers": {addRule(rule("a", 1, 3, "m")), "--allow-device all", Grants{Devices: []string{All}}, nil},
		"host's pid":       {namespace(specs.PIDNamespace, "-"), "--allow-host pid", Grants{Namespaces: []string{"pid"}}, []Grants{{Namespaces: []string{"ipc"}}}},
		"host's ipc":       {namespace(specs.IPCNamespace, "-"), "--allow-host ipc", Grants{Namespaces: []string{"ipc"}}, nil},
		"host's uts":       {namespace(specs.UTSNamespace, "-"), "--allow-host uts", Grants{Namespaces: []string{All}}, nil},
		"host's network":   {namespace(specs.NetworkNamespace, "-"), "--allow-host network", Grants{Namespaces: []string{"network"}}, []Grants{{Network: "none"}}},
		"--network host":   {namespace(specs.NetworkNamespace, "-"), "--allow-host network", Grants{Network: "host"}, nil},
		"pid by path":      {namespace(specs.PIDNamespace, "/proc/1/ns/pid"), "--allow-host /proc/1/ns/pid", Grants{Namespaces: []string{"/proc/1/ns/pid"}}, []Grants{{Namespaces: []string{"pid"}}}},
		"time by path":     {namespace(specs.TimeNamespace, "/run/t"), "--allow-host /run/t", Grants{Namespaces: []string{"/run/t"}}, nil},
		"network by path":  {namespace(specs.NetworkNamespace, "/run/netns/x"), "--network join=/run/netns/x", Grants{Network: "join=/run/netns/x"}, []Grants{{Namespaces: []string{"network"}}}},
		"network gone":     {namespace(specs.NetworkNamespace, "/proc/77/ns/net"), "--network join=ID", Grants{Network: "join=other"}, nil},
		"capability":       {capability("CAP_SYS_ADMIN"), "--allow-capability CAP_SYS_ADMIN", Grants{Capabilities: []string{"CAP_SYS_ADMIN"}}, []Grants{{Capabilities: []string{"CAP_SYS_PTRACE"}}}},
		"as Docker has it": {capability("CAP_SYS_ADMIN"), "--allow-capability CAP_SYS_ADMIN", Grants{Capabilities: []string{"SYS_ADMIN"}}, nil},
		"in small letters": {capability("cap_sys_admin"), "--allow-capability cap_sys_admin", Grants{Capabilities: []string{All}}, nil},
		"no seccomp":       {func(s *specs.Spec) { s.Linux.Seccomp = nil }, "--allow-seccomp unconfined", Grants{Seccomp: "unconfined"}, []Grants{{Seccomp: "profile"}}},
		"seccomp": {func(s *specs.Spec) {
			s.Linux.Seccomp.Syscalls = append(s.Linux.Seccomp.Syscalls, specs.LinuxSyscall{Names: []string{"bpf"}, Action: specs.ActAllow})
		}, "--allow-seccomp profile", Grants{Seccomp: "profile"}, nil},
		"seccomp, looser condition": {func(s *specs.Spec) {
			s.Linux.Seccomp.Syscalls = append(s.Linux.Seccomp.Syscalls, specs.LinuxSyscall{Names: []string{"personality"}, Action: specs.ActLog})
		}, "--allow-seccomp profile", Grants{Seccomp: "unconfined"}, nil},
		"seccomp by default": {func(s *specs.Spec) { s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActTrace} }, "--allow-seccomp profile", Grants{Seccomp: "profile"}, nil},
		"seccomp flag": {func(s *specs.Spec) { s.Linux.Seccomp.Flags = []specs.LinuxSeccompFlag{specs.LinuxSeccompFlagSpecAllow} },
			"--allow-seccomp profile", Grants{Seccomp: "profile"}, nil},
		"seccomp architecture": {func(s *specs.Spec) {
			s.Linux.Seccomp.Architectures = append(s.Linux.Seccomp.Architectures, "SCMP_ARCH_Z")
		},
			"--allow-seccomp profile", Grants{Seccomp: "profile"}, nil},
		"new privileges": {func(s *specs.Spec) { s.Process.NoNewPrivileges = false }, "--allow-new-privs", Grants{NewPrivileges: true}, nil},
		"no masks": {func(s *specs.Spec) { s.Linux.MaskedPaths, s.Linux.ReadonlyPaths = nil, nil }, "--allow-unmask all",
			Grants{Unmask: []string{All}}, []Grants{{Unmask: slices.Concat(maskedEverywhere, guardedEverywhere)}}},
		"a mask": {func(s *specs.Spec) {
			s.Linux.MaskedPaths = slices.DeleteFunc(s.Linux.MaskedPaths, func(p string) bool { return p == "/proc/kcore" })
		}, "--allow-unmask /proc/kcore", Grants{Unmask: []string{"/proc/kcore"}}, []Grants{{Unmask: []string{"/proc"}}}},
		"writable /proc/sys": {func(s *specs.Spec) {
			s.Linux.ReadonlyPaths = slices.DeleteFunc(s.Linux.ReadonlyPaths, func(p string) bool { return p == "/proc/sys" })
		}, "--allow-unmask /proc/sys", Grants{Unmask: []string{"/proc/sys"}}, nil},
		"sysctl": {func(s *specs.Spec) { s.Linux.Sysctl = map[string]string{"kernel.core_pattern": "|/x"} },
			"--allow-sysctl kernel.core_pattern", Grants{Sysctls: []string{"kernel.core_pattern"}}, []Grants{{Sysctls: []string{"kernel.*"}}}},
		"sysctl of another network": {func(s *specs.Spec) {
			namespace(specs.NetworkNamespace, "/run/n")(s)
			s.Linux.Sysctl = map[string]string{"net.ipv4.ip_forward": "1"}
		}, "--network join=/run/n --allow-sysctl net.ipv4.ip_forward", Grants{Network: "join=x", Sysctls: []string{All}}, []Grants{{Network: "join=x"}}},
		"ulimit": {func(s *specs.Spec) { s.Process.Rlimits[0].Hard = 5001 }, "--allow-ulimit nofile", Grants{Ulimits: []string{"nofile"}}, []Grants{{Ulimits: []string{"core"}}}},
		"soft limit": {func(s *specs.Spec) { s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_CORE", Soft: 6000}} },
			"--allow-ulimit core", Grants{Ulimits: []string{All}}, nil},
		"oom":      {func(s *specs.Spec) { s.Process.OOMScoreAdj = &minus }, "--allow-priority oom", Grants{Priorities: []string{"oom"}}, []Grants{{Priorities: []string{"cpu"}}}},
		"apparmor": {func(s *specs.Spec) { s.Process.ApparmorProfile = "mine" }, "--allow-label mine", Grants{Labels: []string{"mine"}}, nil},
		"selinux": {func(s *specs.Spec) { s.Process.SelinuxLabel = "system_u:system_r:spc_t:s0" }, "--allow-label system_u:system_r:spc_t:s0",
			Grants{Labels: []string{"system_u:system_r:spc_t:s0"}}, nil},
		"cgroup": {func(s *specs.Spec) { s.Linux.CgroupsPath = "/apps/db/c" }, "--cgroup-parent /apps/db", Grants{CgroupParent: "/apps/db"}, []Grants{{Mounts: []string{All}}}},
		"another cgroup": {func(s *specs.Spec) { s.Linux.CgroupsPath = "/apps/c" }, "--cgroup-parent /apps",
			Grants{CgroupParent: "/elsewhere"}, nil}, // where it goes is the caller's to say
	} {
		t.Run(name, func(t *testing.T) {
			asked := ordinary(t)
			tc.change(asked)
			flags, never, _, err := refusal(t, asked)
			if got := strings.Join(slices.Compact(flags), " "); got != tc.flags || len(never) > 0 {
				t.Fatalf("needs %s, want %s; %v", got, tc.flags, err)
			}
			for _, g := range tc.not {
				if _, _, err := New(asked, nil, options(g)); err == nil {
					t.Errorf("%+v grants it", g)
				}
			}
			for which, o := range map[string]Options{"grant": options(tc.grant), "privileged": options(Grants{Privileged: true, Network: tc.grant.Network}), "own": {Own: true, ID: "new", Namespace: "ns", Host: fakeHost}} {
				spec, asks, err := New(asked, nil, o)
				if err != nil {
					t.Errorf("%s: %v", which, err)
				}
				if which != "own" && !strings.Contains(name, "cgroup") && !slices.ContainsFunc(asks, func(a Ask) bool { return a.Verdict == Granted }) {
					t.Errorf("%s: %+v", which, asks)
				}
				want := clone(asked)
				want.Linux.CgroupsPath = spec.Linux.CgroupsPath
				if !reflect.DeepEqual(clone(spec), want) {
					t.Errorf("%s: it becomes\n%s\nwant\n%s", which, dump(spec), dump(want))
				}
			}
		})
	}
}

// TestOrdinaryNofile: 1024 open files are what any process gets, also from a caller
// with fewer.
func TestOrdinaryNofile(t *testing.T) {
	o := options(Grants{})
	o.Host.Ulimit = func(name string) (uint64, bool) { _, known := ulimits[name]; return 256, known }
	for limit, refused := range map[uint64]bool{256: false, 1024: false, 1025: true} {
		asked := ordinary(t)
		asked.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: limit, Soft: limit}}
		if _, _, err := New(asked, nil, o); (err != nil) != refused {
			t.Errorf("nofile of %d: %v", limit, err)
		}
	}
}

// What no checkpoint gets: the restore is refused, or goes on without.
func TestNever(t *testing.T) {
	for name, tc := range map[string]struct {
		change change
		left   bool
		says   string
	}{
		"hook":            {func(s *specs.Spec) { s.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/bin/evil"}}} }, true, "/bin/evil"},
		"CRIU's options":  {func(s *specs.Spec) { s.Annotations = map[string]string{"org.criu.config": "/x"} }, true, "org.criu.config"},
		"crun's options":  {func(s *specs.Spec) { s.Annotations = map[string]string{"run.oci.hooks.stdout": "/x"} }, true, "run.oci"},
		"devices of CDI":  {func(s *specs.Spec) { s.Annotations = map[string]string{"cdi.k8s.io/x": "y"} }, true, "cdi.k8s.io"},
		"restore, nested": {func(s *specs.Spec) { s.Annotations = map[string]string{"stasis.run/restore-from": "y"} }, true, "stasis.run/restore-from"},
		"bad tcp":         {func(s *specs.Spec) { s.Annotations = map[string]string{"stasis.run/tcp": "y"} }, true, "stasis.run/tcp"},
		"shared mount":    {addMount("/x", "bind", "/data", "rshared"), false, "/x"},
		"shared root":     {func(s *specs.Spec) { s.Linux.RootfsPropagation = "rshared" }, false, "share"},
		"root":            {addMount("/", "tmpfs", ""), false, "a mount at"},
		"dots":            {addMount("/a/../proc", "tmpfs", ""), false, "a mount at"},
		"relative source": {addMount("/a", "bind", "../../x"), false, "../../x"},
		"dots in source":  {addMount("/a", "bind", "/data/../etc"), false, "/data/../etc"},
		"odd option":      {addMount("/a", "tmpfs", "", "size=1,lowerdir=/"), false, "lowerdir"},
		"unknown option":  {addMount("/a", "bind", "/a", "idmap"), false, "idmap"},
		"bind of proc":    {addMount("/proc", "proc", "/x", "bind"), false, "/proc"},
		"control":         {addMount("/a", "bind", "/a\nb"), false, `/a\nb`},
		"other owners":    {func(s *specs.Spec) { s.Mounts[1].UIDMappings = []specs.LinuxIDMapping{{Size: 1}} }, false, "owners"},
		"host's mounts":   {namespace(specs.MountNamespace, "-"), false, "mount namespace"},
		"mounts by path":  {namespace(specs.MountNamespace, "/run/m"), false, "mount namespace"},
		"twice":           {func(s *specs.Spec) { s.Linux.Namespaces = append(s.Linux.Namespaces, s.Linux.Namespaces[0]) }, false, "twice"},
		"unknown":         {namespace("magic", ""), false, "magic"},
		"pids of a pod":   {namespace(specs.PIDNamespace, "/proc/77/ns/pid"), false, "process IDs"},
		"shared ipc":      {namespace(specs.IPCNamespace, "/run/ipc"), true, "one of its own"},
		"sysctl with /":   {func(s *specs.Spec) { s.Linux.Sysctl = map[string]string{"net./../kernel/core_pattern": "|/x"} }, false, "core_pattern"},
		"listener":        {func(s *specs.Spec) { s.Linux.Seccomp.ListenerPath = "/run/x" }, false, "/run/x"},
		"cgroup file":     {func(s *specs.Spec) { s.Linux.Resources.Unified = map[string]string{"../cgroup.procs": "1"} }, false, "cgroup.procs"},
		"page size":       {func(s *specs.Spec) { s.Linux.Resources.HugepageLimits = []specs.LinuxHugepageLimit{{Pagesize: "../x"}} }, false, "../x"},
		"limit":           {func(s *specs.Spec) { s.Process.Rlimits[0].Type = "RLIMIT_X" }, false, "RLIMIT_X"},
		"device type":     {func(s *specs.Spec) { s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/x", Type: "s"}} }, false, "/dev/x"},
		"device path":     {func(s *specs.Spec) { s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/../x", Type: "c"}} }, false, "/dev/../x"},
		"access":          {addRule(rule("c", 1, 3, "x")), false, "access"},
		"mask with dots":  {func(s *specs.Spec) { s.Linux.MaskedPaths = append(s.Linux.MaskedPaths, "/proc/../x") }, false, "/proc/../x"},
		"odd label":       {func(s *specs.Spec) { s.Linux.MountLabel = "x,y" }, false, "x,y"},
		"personality": {func(s *specs.Spec) {
			s.Linux.Personality = &specs.LinuxPersonality{Domain: "LINUX", Flags: []specs.LinuxPersonalityFlag{"x"}}
		}, false, "personality"},
		"network device":   {func(s *specs.Spec) { s.Linux.NetDevices = map[string]specs.LinuxNetDevice{"eth0": {}} }, true, "eth0"},
		"another platform": {func(s *specs.Spec) { s.VM = &specs.VM{} }, false, "Linux"},
	} {
		t.Run(name, func(t *testing.T) {
			asked := ordinary(t)
			tc.change(asked)
			for _, g := range []Grants{{}, {Privileged: true}} {
				if tc.left && name == "shared ipc" && g.Privileged {
					continue // which takes it over
				}
				spec, asks, err := New(asked, nil, options(g))
				i := slices.IndexFunc(asks, func(a Ask) bool {
					return strings.Contains(a.What, tc.says) && (a.Verdict == LeftOut) == tc.left && a.Verdict != NeedsFlag && a.Verdict != Granted
				})
				if i < 0 || (err == nil) != tc.left || err != nil && !errdefs.IsPermissionDenied(err) {
					t.Errorf("privileged %v: %v, %v", g.Privileged, asks, err)
				}
				if tc.left && strings.Contains(dump(spec), tc.says) {
					t.Errorf("it is in\n%s", dump(spec))
				}
			}
			// Of these not even the node's own gets more.
			if spec, _, err := New(asked, nil, Options{Own: true, Host: fakeHost}); tc.left && (err != nil || spec.Hooks != nil || len(spec.Annotations) > 0 || spec.Linux.NetDevices != nil) {
				t.Errorf("its own becomes %s, %v", dump(spec), err)
			}
		})
	}
}

// TestAllCapabilities: a container with all capabilities asks for all of them in one word,
// each time that it is looked at; the names that the process has for capabilities stay.
func TestAllCapabilities(t *testing.T) {
	known := slices.Clone(cap.Known())
	b := &builder{}
	for i := range 2 {
		b.asks = nil
		b.capabilities(&specs.LinuxCapabilities{Bounding: known})
		if len(b.asks) != 1 || b.asks[0].What != "all capabilities" {
			t.Errorf("%d: %+v", i, b.asks)
		}
		if !slices.Equal(cap.Known(), known) {
			t.Fatalf("%d: the names are %q", i, cap.Known())
		}
	}
}

// What is ordinary in other ways than containerd's default.
func TestStillOrdinary(t *testing.T) {
	plus, realtime := 500, int64(0)
	for name, change := range map[string]change{
		"no capabilities":       func(s *specs.Spec) { s.Process.Capabilities = nil },
		"file of the engine":    addMount("/etc/hosts", "bind", "/etc/shadow", "rbind", "rw"),
		"/dev/shm of an engine": addMount("/dev/shm", "bind", "/"),
		"tmpfs":                 addMount("/cache", "tmpfs", "tmpfs", "size=1g", "nosuid", "mode=0700"),
		"cgroup":                addMount("/sys/fs/cgroup", "cgroup", "cgroup", "nosuid", "ro"),
		"ipc of a sandbox":      namespace(specs.IPCNamespace, "/proc/77/ns/ipc"),
		"cgroup namespace":      namespace(specs.CgroupNamespace, ""),
		"user namespace": func(s *specs.Spec) {
			namespace(specs.UserNamespace, "")(s)
			s.Linux.UIDMappings = []specs.LinuxIDMapping{{HostID: 100000, Size: 65536}}
		},
		"time namespace": func(s *specs.Spec) {
			namespace(specs.TimeNamespace, "")(s)
			s.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"monotonic": {Secs: 5}}
		},
		"own settings": func(s *specs.Spec) {
			s.Linux.Sysctl = map[string]string{"net.core.somaxconn": "10", "kernel.sem": "1\t2\t3\t4", "fs.mqueue.msg_max": "5"}
		},
		"killed earlier": func(s *specs.Spec) { s.Process.OOMScoreAdj = &plus },
		"idle":           func(s *specs.Spec) { s.Process.Scheduler = &specs.Scheduler{Policy: specs.SchedIdle, Nice: 5} },
		"no realtime": func(s *specs.Spec) {
			s.Linux.Resources.CPU = &specs.LinuxCPU{RealtimeRuntime: &realtime, Cpus: "0-3,5"}
		},
		"rule for a device":  addRule(rule("c", 1, 5, "rw"), rule("c", 136, -1, "rwm"), rule("b", -1, -1, "m")),
		"denied":             addRule(specs.LinuxDeviceCgroup{Type: "c", Access: "rwm"}),
		"kubelet's group":    func(s *specs.Spec) { s.Linux.CgroupsPath = "/kubepods/besteffort/pod1/c" },
		"group in namespace": func(s *specs.Spec) { s.Linux.CgroupsPath = "/old/c" },
		"another's group":    func(s *specs.Spec) { s.Linux.CgroupsPath = "/ns/victim" },
		"dots":               func(s *specs.Spec) { s.Linux.CgroupsPath = "/ns/../../victim" },
		"masked by a parent": func(s *specs.Spec) {
			s.Linux.MaskedPaths = append(s.Linux.MaskedPaths, "/proc/sys")
			s.Linux.ReadonlyPaths = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sysrq-trigger"}
		},
		"stricter seccomp": func(s *specs.Spec) { s.Linux.Seccomp.Syscalls = s.Linux.Seccomp.Syscalls[:1] },
		"label": func(s *specs.Spec) {
			s.Process.SelinuxLabel, s.Linux.MountLabel = "system_u:system_r:container_t:s0:c1,c2", "system_u:object_r:container_file_t:s0:c1,c2"
		},
	} {
		t.Run(name, func(t *testing.T) {
			asked := ordinary(t)
			change(asked)
			spec, asks, err := New(asked, nil, options(Grants{}))
			if err != nil || len(asks) > 0 {
				t.Fatalf("%v, %v", asks, err)
			}
			if spec.Linux.CgroupsPath != "/ns/new" {
				t.Errorf("cgroup %s", spec.Linux.CgroupsPath)
			}
			for _, m := range spec.Mounts {
				if IsBind(m) && m.Source != "" {
					t.Errorf("the host's %s is bound at %s", m.Source, m.Destination)
				}
			}
		})
	}
}

// TestPodman has the spec of a container of Podman 5.4.2, `podman create --network
// none`, on Debian: the flags that docs/interoperability.md names, and files made anew.
func TestPodman(t *testing.T) {
	data, err := os.ReadFile("testdata/podman.json")
	if err != nil {
		t.Fatal(err)
	}
	asked, unknown, err := Parse(data)
	if err != nil || len(unknown) > 0 {
		t.Fatalf("%q, %v", unknown, err)
	}
	o := options(Grants{})
	o.Host.Ulimit = func(string) (uint64, bool) { return 1 << 20, true }
	if _, _, err := New(asked, nil, o); err == nil || !strings.HasSuffix(err.Error(), "add: --allow-new-privs --allow-seccomp profile") {
		t.Error(err)
	}
	o.Grants = Grants{NewPrivileges: true, Seccomp: "profile"}
	spec, _, err := New(asked, nil, o)
	if err != nil || len(spec.Mounts) != len(asked.Mounts) || spec.Linux.CgroupsPath != "/ns/new" {
		t.Fatalf("%s, %v", dump(spec), err)
	}
	for _, m := range spec.Mounts {
		if IsBind(m) && (m.Source != "" || !EngineFile(m.Destination)) {
			t.Errorf("%+v", m)
		}
	}
}

// A spec without rules for devices would leave them to the runtime.
func TestDevicesAreForbiddenFirst(t *testing.T) {
	asked := ordinary(t)
	asked.Linux.Resources = nil
	spec, _, err := New(asked, nil, options(Grants{}))
	if err != nil || len(spec.Linux.Resources.Devices) != 1 || spec.Linux.Resources.Devices[0].Allow {
		t.Errorf("%s, %v", dump(spec.Linux.Resources), err)
	}
}

func TestCgroup(t *testing.T) {
	for old, want := range map[string][2]string{ // without systemd, and with it
		"":                              {"/ns/new", "/ns/new"},
		"/ns/old":                       {"/ns/new", "/ns/new"},
		"/apps/db/old":                  {"/apps/db/new", "/apps/db/new"},
		"/kubepods/besteffort/pod1/old": {"/ns/new", "/ns/new"},
		"/libpod_parent/libpod-old":     {"/ns/new", "/ns/new"},
		"db.slice:ctr:old":              {"/ns/new", "db.slice:ctr:new"},
		"machine.slice:libpod:old":      {"/ns/new", "system.slice:stasis-ns:new"},
		"system.slice:cri-containerd:a": {"/ns/new", "system.slice:stasis-ns:new"},
		"kubepods-pod1.slice:x:a":       {"/ns/new", "system.slice:stasis-ns:new"},
	} {
		for i, systemd := range []bool{false, true} {
			b := &builder{asked: &specs.Spec{Linux: &specs.Linux{CgroupsPath: old}}, o: Options{Own: true, ID: "new", Namespace: "ns", Systemd: systemd}}
			if got := b.cgroup(); got != want[i] {
				t.Errorf("%q, systemd %v: %q, want %q", old, systemd, got, want[i])
			}
		}
	}
	for parent, want := range map[string]string{"/a/b": "/a/b/new", "a": "/a/new", "x.slice": "x.slice:stasis-ns:new"} {
		b := &builder{asked: &specs.Spec{Linux: &specs.Linux{}}, o: Options{ID: "new", Namespace: "ns", Systemd: true}, g: Grants{CgroupParent: parent}}
		if got := b.cgroup(); got != want {
			t.Errorf("%s: %q, want %q", parent, got, want)
		}
	}
}

func TestOfProcess(t *testing.T) {
	for path, want := range map[string]bool{
		"/proc/123/ns/net":      true,
		"/run/../proc/7/ns/ipc": true,
		"/proc/1/ns/net":        false,
		"/proc/self/ns/net":     false,
		"/run/netns/123":        false,
		"/proc":                 false,
	} {
		if got := OfProcess(path); got != want {
			t.Errorf("%q: %v", path, got)
		}
	}
}

// What is pasted is what the spec has, and nothing for the shell.
func TestFlagsCanBePasted(t *testing.T) {
	for _, source := range []string{"/a b", "/$(touch x)", "/a;b", "/it's", "/`x`", "/a*", "/~", "/é", "/-x", "/a\\b"} {
		asked := ordinary(t)
		addMount("/m", "bind", source)(asked)
		flags, _, _, _ := refusal(t, asked)
		out, err := exec.Command("sh", "-c", "printf '%s|' "+strings.Join(flags, " ")).Output()
		if want := "--allow-mount|" + source + ":/m|"; err != nil || string(out) != want {
			t.Errorf("%s pastes %q, want %q; %v", flags, out, want, err)
		}
	}
}

func TestRefusalIsBounded(t *testing.T) {
	asked := ordinary(t)
	for i := range 1000 {
		addMount(fmt.Sprintf("/m/%d", i), "bind", "/"+strings.Repeat("x", 10000), "shared")(asked)
	}
	if _, _, _, err := refusal(t, asked); len(err.Error()) > 100<<10 {
		t.Errorf("an error of %d bytes", len(err.Error()))
	}
}

func TestParse(t *testing.T) {
	good := dump(ordinary(t))
	spec, unknown, err := Parse([]byte(good))
	if err != nil || len(unknown) > 0 || !reflect.DeepEqual(spec, clone(ordinary(t))) {
		t.Errorf("%v, %v", unknown, err)
	}
	for text, want := range map[string]string{
		`{"process":{"cwd":"/"},"root":{"path":"r"},"linux":{},"magic":{"x":1}}`:                                                                         "magic",
		`{"process":{"cwd":"/"},"root":{"path":"r"},"LINUX":{"namespaces":[{"type":"pid","to":"x"}]}}`:                                                   "LINUX.namespaces[].to",
		`{"process":{"cwd":"/"},"root":{"path":"r"},"linux":{"resources":{"blockIO":{"throttleReadBpsDevice":[{"major":1,"minor":2,"rate":3,"x":4}]}}}}`: "linux.resources.blockIO.throttleReadBpsDevice[].x",
	} {
		spec, unknown, err := Parse([]byte(text))
		if err != nil || !slices.Equal(unknown, []string{want}) {
			t.Errorf("%s: unknown %q, %v", text, unknown, err)
			continue
		}
		if _, _, err := New(spec, unknown, options(Grants{Privileged: true})); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", text, err)
		}
		if _, _, err := New(spec, unknown, Options{Own: true, Host: fakeHost}); err != nil {
			t.Errorf("its own %s: %v", text, err)
		}
	}
	left := `{"process":{"cwd":"/"},"root":{"path":"r"},"linux":{"namespaces":[{"type":"mount"}],"intelRdt":{"enableCMT":true}},"hooks":{"new":[]}}`
	if spec, unknown, err := Parse([]byte(left)); err != nil || len(unknown) != 2 {
		t.Errorf("%q, %v", unknown, err)
	} else if _, _, err := New(spec, unknown, options(Grants{Privileged: true})); err != nil {
		t.Errorf("fields of what is left out: %v", err)
	}
	for _, text := range []string{"", "null", "[]", "{}", `{"process":{},"root":{},"linux":{}} x`, `{"process":{},"root":{},"linux":1}`} {
		if _, _, err := Parse([]byte(text)); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

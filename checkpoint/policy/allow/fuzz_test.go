package allow

import (
	"encoding/json"
	"path"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/contrib/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// beyond says what a spec has that gives its container something of the host, or "".
// It looks for what the OCI runtimes act on, and does not know the rules.
func beyond(s *specs.Spec, usual *specs.LinuxSeccomp) string {
	p, l := s.Process, s.Linux
	for _, list := range [][]string{p.Capabilities.Bounding, p.Capabilities.Permitted, p.Capabilities.Effective, p.Capabilities.Inheritable, p.Capabilities.Ambient} {
		for _, name := range list {
			if !slices.Contains(ordinaryCaps, name) {
				return name
			}
		}
	}
	for _, m := range s.Mounts {
		to := path.Join("/", m.Destination)
		switch {
		case (m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind")) && m.Source != "":
			return "bind of " + m.Source
		case m.Type == "proc" && to != "/proc", m.Type == "sysfs" && to != "/sys", strings.HasPrefix(m.Type, "cgroup") && to != "/sys/fs/cgroup":
			return m.Type + " at " + to
		case (m.Type == "sysfs" || strings.HasPrefix(m.Type, "cgroup")) && !slices.Contains(m.Options, "ro"):
			return "writable " + m.Type
		case !slices.Contains([]string{"bind", "none", "", "proc", "sysfs", "cgroup", "cgroup2", "tmpfs", "mqueue", "devpts"}, m.Type):
			return m.Type
		}
	}
	for _, kind := range ordinaryNamespaces {
		if !slices.Contains(l.Namespaces, specs.LinuxNamespace{Type: kind}) {
			return "the host's " + string(kind)
		}
	}
	for _, ns := range l.Namespaces {
		if ns.Path != "" {
			return ns.Path
		}
	}
	if rules := l.Resources.Devices; len(rules) == 0 || rules[0].Allow || rules[0].Type != "" || rules[0].Major != nil || rules[0].Access != "rwm" {
		return "devices are allowed"
	}
	for _, r := range l.Resources.Devices {
		if r.Allow && (r.Type != "c" && r.Type != "b" || r.Access != "m" && (r.Type != "c" || r.Major == nil || *r.Major != 1 && *r.Major != 5 && *r.Major != 136)) {
			return dump(r)
		}
	}
	for name := range l.Sysctl {
		if !strings.HasPrefix(name, "net.") && !strings.HasPrefix(name, "fs.mqueue.") && !strings.HasPrefix(name, "kernel.") || strings.Contains(name, "/") {
			return name
		}
	}
	switch {
	case s.Hooks != nil:
		return "hooks"
	case l.Seccomp == nil || permitsMore(l.Seccomp, usual) != "":
		return "seccomp"
	case !p.NoNewPrivileges:
		return "privileges"
	case p.OOMScoreAdj != nil && *p.OOMScoreAdj < 0:
		return "OOM score"
	case !slices.Contains(l.MaskedPaths, "/proc/kcore") && !slices.Contains(l.MaskedPaths, "/proc") && !slices.Contains(l.MaskedPaths, "/proc/kcore/"):
		return "/proc/kcore"
	case l.CgroupsPath != "/ns/new":
		return l.CgroupsPath
	case s.Root.Path != "rootfs" || s.VM != nil || l.IntelRdt != nil || l.NetDevices != nil:
		return "a section"
	}
	for key := range s.Annotations {
		if !strings.HasPrefix(key, "org.opencontainers.image.") && key != "stasis.run/tcp" {
			return key
		}
	}
	return ""
}

// FuzzNew gives two fields of an ordinary spec other values, which are JSON: what is
// then accepted without a grant has nothing of the host.
func FuzzNew(f *testing.F) {
	good := ordinary(f)
	good.Linux.Seccomp.Syscalls = nil
	usual := seccomp.DefaultProfile(&specs.Spec{Process: &specs.Process{Capabilities: &specs.LinuxCapabilities{Bounding: ordinaryCaps}}})
	all := leaves("", reflect.TypeFor[specs.Spec](), func(s *specs.Spec) reflect.Value { return reflect.ValueOf(s).Elem() })
	names := map[string]uint8{}
	for i, l := range all {
		names[l.path] = uint8(i)
	}
	if len(all) > 255 {
		f.Fatalf("%d fields", len(all))
	}
	for _, seed := range [][4]string{
		{"mounts[].type", `"bind"`, "mounts[].source", `"/etc"`},
		{"mounts[].options", `["rbind","ro"]`, "mounts[].destination", `"/etc/hosts"`},
		{"mounts[].type", `"cgroup2"`, "mounts[].destination", `"/sys/fs/cgroup/"`},
		{"mounts[].type", `"proc"`, "mounts[].destination", `"/proc"`},
		{"linux.resources.devices[].major", `136`, "linux.resources.devices[].type", `"a"`},
		{"linux.namespaces[].type", `"ipc"`, "linux.namespaces[].path", `"/proc/77/ns/ipc"`},
		{"linux.sysctl", `{"net.ipv4.ip_forward":"1"}`, "linux.cgroupsPath", `"/kubepods/x"`},
		{"hooks.poststop[].path", `"/x"`, "annotations", `{"org.criu.config":"/x"}`},
		{"linux.maskedPaths", `["/proc","/sys/firmware/"]`, "linux.readonlyPaths", `["/proc/sys"]`},
	} {
		f.Add(names[seed[0]], seed[1], names[seed[2]], seed[3])
	}
	f.Fuzz(func(t *testing.T, a uint8, av string, b uint8, bv string) {
		asked := clone(good)
		for _, set := range []struct {
			at    uint8
			value string
		}{{a, av}, {b, bv}} {
			if !json.Valid([]byte(set.value)) || all[int(set.at)%len(all)].set(asked, set.value) != nil {
				return
			}
		}
		if asked.Process == nil || asked.Linux == nil || asked.Root == nil {
			return // which Parse refuses
		}
		before := dump(asked)
		spec, asks, err := New(asked, nil, options(Grants{}))
		if dump(asked) != before {
			t.Error("what was asked for is changed")
		}
		if err == nil {
			if what := beyond(spec, usual); what != "" {
				t.Errorf("%s is accepted in\n%s\nasks %v", what, dump(spec), asks)
			}
		}
		for _, o := range []Options{options(Grants{Privileged: true}), {Own: true, Host: fakeHost}} {
			if spec, _, err := New(asked, nil, o); err == nil && (spec.Hooks != nil || spec.Linux.IntelRdt != nil) {
				t.Error("hooks are granted")
			}
		}
	})
}

// FuzzParse reads what need not be JSON.
func FuzzParse(f *testing.F) {
	for _, text := range []string{"", "{}", `{"process":{"cwd":"/"},"root":{"path":"r"},"linux":{"resources":{"devices":[{"allow":true}]}},"magic":[{}]}`} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		spec, unknown, err := Parse(data)
		if err != nil {
			return
		}
		if _, _, err := New(spec, unknown, options(Grants{})); err == nil {
			t.Errorf("accepted without namespaces and seccomp: %s", data)
		}
	})
}

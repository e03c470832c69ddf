package policy

import (
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	inet "github.com/checkpoint-restore/go-criu/v8/crit/images/sk-inet"
	skopts "github.com/checkpoint-restore/go-criu/v8/crit/images/sk-opts"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func TestPorts(t *testing.T) {
	const needs = "which needs CAP_NET_BIND_SERVICE"
	network := func(f *forgery, path string) {
		for i, ns := range f.spec.Linux.Namespaces {
			if ns.Type == specs.NetworkNamespace {
				f.spec.Linux.Namespaces[i].Path = path
			}
		}
	}
	start := func(n string) func(*forgery) {
		return func(f *forgery) { f.spec.Linux.Sysctl = map[string]string{portStart: n} }
	}
	for _, tc := range []struct {
		name        string
		port, proto uint32
		fn          func(*forgery)
		want        string
	}{
		{"ssh", 22, unix.IPPROTO_TCP, nil, "open file 77: src_port 22 is below net.ipv4.ip_unprivileged_port_start (1024), " + needs},
		{"dns", 53, unix.IPPROTO_UDP, nil, needs},
		{"the last one", 1023, unix.IPPROTO_TCP, nil, needs},
		{"the first one", 1024, unix.IPPROTO_TCP, nil, ""},
		{"none", 0, unix.IPPROTO_TCP, nil, ""},
		{"no port", 1 << 16, unix.IPPROTO_TCP, nil, "src_port 65536 is no port"},
		{"ping", 22, unix.IPPROTO_ICMP, nil, ""},
		{"granted", 22, unix.IPPROTO_TCP, func(f *forgery) { f.grantCap("CAP_NET_BIND_SERVICE") }, ""},
		{"all allowed", 22, unix.IPPROTO_TCP, start("0"), ""},
		{"more than by default", 8080, unix.IPPROTO_TCP, start("10000"), needs},
		{"allowed from there", 80, unix.IPPROTO_TCP, start("80"), ""},
		{"below that", 79, unix.IPPROTO_TCP, start("80"), needs},
		{"one that is to be made", 22, unix.IPPROTO_TCP, func(f *forgery) { network(f, "") }, needs},
		{"this process's", 1, unix.IPPROTO_TCP, func(f *forgery) { network(f, "/proc/thread-self/ns/net") }, "own"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := confined(t)
			if tc.fn != nil {
				tc.fn(f)
			}
			if tc.want == "own" {
				n, err := readNumber("/proc/sys/net/ipv4/ip_unprivileged_port_start")
				must(t, err)
				if tc.want = needs; n <= 1 {
					tc.want = ""
				}
			}
			f.addFile(&fdinfo.FileEntry{Type: fdinfo.FdTypes_INETSK.Enum(), Id: u32(77), Isk: &inet.InetSkEntry{
				Family: u32(unix.AF_INET), State: u32(10), Type: u32(unix.SOCK_STREAM), Proto: &tc.proto, SrcPort: &tc.port, SrcAddr: []uint32{0}}})
			err := f.check()
			// What else is wrong with such a network namespace is not asked here.
			c := &checker{spec: f.spec, grant: grantOf(f.spec), portStart: -1}
			c.checkPort(opened{c, 77}, &inet.InetSkEntry{Proto: &tc.proto, SrcPort: &tc.port})
			if got := len(c.found) > 0; got != (tc.want != "") || err == nil && got {
				t.Errorf("%q; %v", c.found, err)
			}
			if tc.name != "one that is to be made" && tc.name != "this process's" {
				f.judged(tc.want)
			}
		})
	}
	f := confined(t)
	f.addFile(&fdinfo.FileEntry{Type: fdinfo.FdTypes_INETSK.Enum(), Isk: &inet.InetSkEntry{Opts: &skopts.SkOptsEntry{SoPriority: u32(7)}}})
	f.held(77)
	f.refused("process 6: fd 77: open file 77: has the priority 7, which needs CAP_NET_ADMIN")
}

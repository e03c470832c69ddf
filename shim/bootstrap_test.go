package shim

import (
	"strings"
	"testing"

	bootstrapapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/api/types/runc/options"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

func marshal(t testing.TB, m proto.Message) []byte {
	t.Helper()
	data, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// runtimeAny is options as containerd hands them: without a type URL's prefix.
func runtimeAny(t testing.TB, m proto.Message) *anypb.Any {
	t.Helper()
	a, err := typeurl.MarshalAnyToProto(m)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestParseBootstrap(t *testing.T) {
	runc := runtimeAny(t, &options.Options{BinaryName: "crun", ShimCgroup: "/shims"})
	cri := runtimeAny(t, &runtimeoptions.Options{ConfigPath: "/etc/stasis.toml"})
	other := runtimeAny(t, &types.Platform{OS: "linux"})
	prefixed, err := anypb.New(&options.Options{ShimCgroup: "/shims"})
	if err != nil {
		t.Fatal(err)
	}
	params := func(edit func(*bootstrapapi.BootstrapParams)) []byte {
		p := &bootstrapapi.BootstrapParams{
			InstanceID:             "c1",
			Namespace:              "ns",
			ContainerdVersion:      "v2.4.2",
			ContainerdGrpcAddress:  "/run/p.sock",
			ContainerdTtrpcAddress: "/run/p.ttrpc",
			ContainerdBinary:       "/usr/bin/containerd",
		}
		if edit != nil {
			edit(p)
		}
		return marshal(t, p)
	}
	dir := func(d string) func(*bootstrapapi.BootstrapParams) {
		return func(p *bootstrapapi.BootstrapParams) { p.SocketDir = &d }
	}
	legacyEnv := map[string]string{"TTRPC_ADDRESS": "/run/e.ttrpc"}

	for _, tt := range []struct {
		name  string
		stdin []byte
		env   map[string]string
		edit  func(*flags)
		want  bootstrap
		err   string
	}{
		{
			name: "containerd 1.6 without options",
			env:  legacyEnv,
			want: bootstrap{address: "/run/f.sock", ttrpcAddress: "/run/e.ttrpc", socketDir: defaultSocketDir},
		},
		{
			name:  "containerd 1.7 with runc's options",
			stdin: marshal(t, runc),
			env:   legacyEnv,
			want:  bootstrap{address: "/run/f.sock", ttrpcAddress: "/run/e.ttrpc", socketDir: defaultSocketDir, options: runc},
		},
		{
			name:  "containerd 2.2 with CRI's options",
			stdin: marshal(t, cri),
			env:   legacyEnv,
			want:  bootstrap{address: "/run/f.sock", ttrpcAddress: "/run/e.ttrpc", socketDir: defaultSocketDir, options: cri},
		},
		{
			name:  "legacy with options for another runtime",
			stdin: marshal(t, other),
			env:   legacyEnv,
			want:  bootstrap{address: "/run/f.sock", ttrpcAddress: "/run/e.ttrpc", socketDir: defaultSocketDir},
		},
		{
			name: "legacy without addresses in the environment",
			edit: func(f *flags) { f.debug = true },
			want: bootstrap{address: "/run/f.sock", ttrpcAddress: "/run/f.sock.ttrpc", socketDir: defaultSocketDir, debug: true},
		},
		{
			name: "legacy with the address only in the environment",
			env:  map[string]string{"GRPC_ADDRESS": "/run/g.sock"},
			edit: func(f *flags) { f.address = "" },
			want: bootstrap{address: "/run/g.sock", ttrpcAddress: "/run/g.sock.ttrpc", socketDir: defaultSocketDir},
		},
		{
			name:  "containerd 2.3",
			stdin: params(nil),
			env:   legacyEnv,
			want:  bootstrap{protobuf: true, address: "/run/p.sock", ttrpcAddress: "/run/p.ttrpc", socketDir: defaultSocketDir},
		},
		{
			name: "containerd 2.4 with everything",
			stdin: params(func(p *bootstrapapi.BootstrapParams) {
				dir("/run/s")(p)
				p.LogLevel = bootstrapapi.LogLevel_LOG_LEVEL_TRACE
				p.AddExtension(other)
				p.AddExtension(prefixed)
				p.Extensions = append(p.Extensions, nil, &bootstrapapi.Extension{})
			}),
			want: bootstrap{protobuf: true, address: "/run/p.sock", ttrpcAddress: "/run/p.ttrpc", socketDir: "/run/s", debug: true, options: prefixed},
		},
		{
			name:  "parameters for another container",
			stdin: params(func(p *bootstrapapi.BootstrapParams) { p.InstanceID = "c2" }),
			err:   "-id and -namespace",
		},
		{
			name:  "parameters for another namespace",
			stdin: params(func(p *bootstrapapi.BootstrapParams) { p.Namespace = "ns2" }),
			err:   "-id and -namespace",
		},
		{
			name:  "relative socket directory",
			stdin: params(dir("s")),
			err:   "absolute",
		},
		{
			name:  "not protobuf",
			stdin: []byte(`{"version":2}`),
			err:   "neither",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := flags{namespace: "ns", id: "c1", address: "/run/f.sock"}
			if tt.edit != nil {
				tt.edit(&f)
			}
			got, err := parseBootstrap(f, tt.stdin, func(k string) string { return tt.env[k] })
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Fatalf("error %v, want one with %q", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if !proto.Equal(got.options, tt.want.options) {
				t.Errorf("options %v, want %v", got.options, tt.want.options)
			}
			got.options, tt.want.options = nil, nil
			if got != tt.want {
				t.Errorf("got  %+v\nwant %+v", got, tt.want)
			}
		})
	}
}

func TestAnswer(t *testing.T) {
	const address = "unix:///run/containerd/s/1"
	got, err := bootstrap{}.answer(address)
	if err != nil || string(got) != address {
		t.Errorf("legacy answer %q, %v", got, err)
	}
	got, err = bootstrap{protobuf: true}.answer(address)
	if err != nil {
		t.Fatal(err)
	}
	r := &bootstrapapi.BootstrapResult{}
	if err := proto.Unmarshal(got, r); err != nil {
		t.Fatal(err)
	}
	if r.Version != 3 || r.Address != address || r.Protocol != "ttrpc" {
		t.Errorf("answer %v", r)
	}
}

func FuzzBootstrap(f *testing.F) {
	f.Add([]byte(nil), "c1", "ns")
	f.Add(marshal(f, runtimeAny(f, &options.Options{ShimCgroup: "/x"})), "c1", "ns")
	f.Add(marshal(f, &bootstrapapi.BootstrapParams{InstanceID: "c1", Namespace: "ns"}), "c1", "ns")
	f.Add(marshal(f, &bootstrapapi.BootstrapParams{InstanceID: "c2", Namespace: "ns"}), "c1", "ns")
	f.Fuzz(func(t *testing.T, stdin []byte, id, namespace string) {
		b, err := parseBootstrap(flags{id: id, namespace: namespace, address: "/c.sock"}, stdin, func(string) string { return "" })
		if err != nil {
			return
		}
		if b.address == "" || b.ttrpcAddress == "" || b.socketDir == "" {
			t.Errorf("incomplete: %+v", b)
		}
		if b.options != nil && !isOptions(b.options) {
			t.Errorf("options of type %q", b.options.GetTypeUrl())
		}
		if b.protobuf {
			p := &bootstrapapi.BootstrapParams{}
			if err := proto.Unmarshal(stdin, p); err != nil || p.InstanceID != id || p.Namespace != namespace {
				t.Errorf("answers as protobuf to %q (%v)", stdin, err)
			}
		}
	})
}

func TestFlags(t *testing.T) {
	for _, tt := range []struct {
		args string
		err  string
	}{
		{"-namespace ns -id c1 start", ""},
		{"-namespace ns -id c1 -debug -bundle /b -publish-binary x -debug-socket y delete", ""},
		{"-namespace ns -id c1", ""},
		{"-id c1 start", "-namespace is required"},
		{"-namespace ns start", "-id is required"},
		{"-namespace ns -id ../c1 delete", "not a valid id"},
		{"-namespace ns -id .. delete", "not a valid id"},
		{"-namespace a/b -id c1 delete", "not a valid namespace"},
		{"-namespace ns -id c1 stop", `unknown action "stop"`},
		{"-frob", "not defined"},
	} {
		f, err := parseFlags(strings.Fields(tt.args))
		if err == nil {
			err = f.validate()
		}
		if (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%s: error %v, want %q", tt.args, err, tt.err)
		}
	}
}

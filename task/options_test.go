package task

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/api"
)

func pack(t testing.TB, v any) *anypb.Any {
	t.Helper()
	a, err := typeurl.MarshalAnyToProto(v)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// everyField has a value in every field of the options.
var everyField = &options.Options{
	NoPivotRoot: true, NoNewKeyring: true, ShimCgroup: "/shims", IoUid: 1, IoGid: 2,
	BinaryName: "crun", Root: "/run/crun", SystemdCgroup: true,
	CriuImagePath: "/images", CriuWorkPath: "/work",
}

const everyFieldTOML = `
BinaryName = "crun"
CriuImagePath = "/images"
CriuWorkPath = "/work"
IoGid = 2
IoUid = 1
NoNewKeyring = true
NoPivotRoot = true
Root = "/run/crun"
ShimCgroup = "/shims"
SystemdCgroup = true
`

func TestDecodeOptions(t *testing.T) {
	file := filepath.Join(t.TempDir(), "options.toml")
	if err := os.WriteFile(file, []byte(everyFieldTOML), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		in   *anypb.Any
		want *options.Options
	}{
		"none":        {nil, &options.Options{}},
		"empty":       {&anypb.Any{}, &options.Options{}},
		"runc":        {pack(t, everyField), everyField},
		"no field":    {pack(t, &options.Options{}), &options.Options{}},
		"config_body": {pack(t, &runtimeoptions.Options{ConfigBody: []byte(everyFieldTOML)}), everyField},
		"config_path": {pack(t, &runtimeoptions.Options{ConfigPath: file}), everyField},
		"no config":   {pack(t, &runtimeoptions.Options{}), &options.Options{}},
		"CRI's own keys": {pack(t, &runtimeoptions.Options{ConfigBody: []byte("TypeUrl = 'x'\nCriuPath = ''\nRoot = '/r'")}),
			&options.Options{Root: "/r"}},
	} {
		got, err := DecodeOptions(tc.in)
		if err != nil || !proto.Equal(got, tc.want) {
			t.Errorf("%s: %v, %v; want %v", name, got, err, tc.want)
		}
	}
}

func TestDecodeOptionsRefuses(t *testing.T) {
	for name, tc := range map[string]struct {
		in   *anypb.Any
		says string
	}{
		"another type":     {pack(t, &emptypb.Empty{}), "google.protobuf.Empty"},
		"checkpoint's":     {pack(t, &options.CheckpointOptions{Exit: true}), "CheckpointOptions"},
		"unknown type":     {&anypb.Any{TypeUrl: "example.com/Nothing", Value: []byte{1}}, "example.com/Nothing"},
		"malformed":        {&anypb.Any{TypeUrl: "containerd.runc.v1.Options", Value: []byte{0xff}}, "containerd.runc.v1.Options"},
		"malformed TOML":   {pack(t, &runtimeoptions.Options{ConfigBody: []byte("=")}), "config_body"},
		"unknown TOML key": {pack(t, &runtimeoptions.Options{ConfigBody: []byte("Rooot = '/r'")}), "Rooot"},
		"wrong TOML type":  {pack(t, &runtimeoptions.Options{ConfigBody: []byte("Root = 1")}), "config_body"},
		"missing file":     {pack(t, &runtimeoptions.Options{ConfigPath: "/does/not/exist"}), "config_path"},
	} {
		_, err := DecodeOptions(tc.in)
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), tc.says) {
			t.Errorf("%s: error %v, want an invalid argument that says %q", name, err, tc.says)
		}
	}
}

func TestDecodeCheckpointOptions(t *testing.T) {
	want := &options.CheckpointOptions{Exit: true, CgroupsMode: "soft", EmptyNamespaces: []string{"network"}}
	for name, tc := range map[string]struct {
		in   *anypb.Any
		want *options.CheckpointOptions
	}{
		"none":  {nil, &options.CheckpointOptions{}},
		"empty": {&anypb.Any{}, &options.CheckpointOptions{}},
		"some":  {pack(t, want), want},
	} {
		if got, err := decodeCheckpointOptions(tc.in); err != nil || !proto.Equal(got, tc.want) {
			t.Errorf("%s: %v, %v; want %v", name, got, err, tc.want)
		}
	}
	for says, in := range map[string]*anypb.Any{
		"runc.v1.Options":   pack(t, everyField),
		"CheckpointOptions": {TypeUrl: "containerd.runc.v1.CheckpointOptions", Value: []byte{0xff}},
	} {
		if _, err := decodeCheckpointOptions(in); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("error %v, want one that says %q", err, says)
		}
	}
}

// TestCheckpointOptions maps every option that the two services have in common, and
// refuses what CRIU would.
func TestCheckpointOptions(t *testing.T) {
	want := checkpoint.Options{OpenTCP: true, ExternalUnixSockets: true, Terminal: true, FileLocks: true, EmptyNamespaces: []string{"network"}, CgroupsMode: "soft"}
	for _, o := range []criuOptions{
		&options.CheckpointOptions{OpenTcp: true, ExternalUnixSockets: true, Terminal: true, FileLocks: true, EmptyNamespaces: []string{"network"}, CgroupsMode: "soft"},
		&api.CRIUOptions{OpenTcp: true, ExternalUnixSockets: true, Terminal: true, FileLocks: true, EmptyNamespaces: []string{"network"}, CgroupsMode: "soft"},
	} {
		if got, err := checkpointOptions(o); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%T: %+v, %v; want %+v", o, got, err, want)
		}
	}
	for says, o := range map[string]criuOptions{
		"cgroups_mode":     &options.CheckpointOptions{CgroupsMode: "hard"},
		"empty_namespaces": &api.CRIUOptions{EmptyNamespaces: []string{"pid"}},
	} {
		if _, err := checkpointOptions(o); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), says) {
			t.Errorf("%v; want an invalid argument that says %q", err, says)
		}
	}
}

func FuzzDecodeOptions(f *testing.F) {
	for _, a := range []*anypb.Any{
		pack(f, everyField),
		pack(f, &runtimeoptions.Options{ConfigBody: []byte(everyFieldTOML)}),
		pack(f, &options.CheckpointOptions{Exit: true, CgroupsMode: "soft"}),
		{TypeUrl: "x", Value: []byte{1}},
	} {
		f.Add(a.TypeUrl, a.Value)
	}
	f.Fuzz(func(t *testing.T, url string, value []byte) {
		a := &anypb.Any{TypeUrl: url, Value: value}
		if opts, err := DecodeOptions(a); (opts == nil) == (err == nil) {
			t.Errorf("options %v and error %v", opts, err)
		} else if err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("error %v is no invalid argument", err)
		}
		_, _ = decodeCheckpointOptions(a)
	})
}

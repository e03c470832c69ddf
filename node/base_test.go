package node

import (
	"slices"
	"testing"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// TestRemappedNames has the names as containerd 2.1 and 1.7 make them.
func TestRemappedNames(t *testing.T) {
	m := []specs.LinuxIDMapping{{ContainerID: 1, HostID: 5, Size: 9}, {HostID: 100000, Size: 1}}
	got := remappedNames("sha256:abc", &specs.Linux{UIDMappings: m[1:], GIDMappings: m})
	want := []string{
		digest.FromString(`{"Parent":"sha256:abc","IDMap":{"UidMap":[{"containerID":0,"hostID":100000,"size":1}],` +
			`"GidMap":[{"containerID":0,"hostID":100000,"size":1},{"containerID":1,"hostID":5,"size":9}]}}`).String(),
		"sha256:abc-100000-5",
	}
	if !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestByDigest(t *testing.T) {
	record := images.Image{Name: "sha256:abc", Target: ocispec.Descriptor{Digest: digest.FromString("x")}}
	for name, want := range map[string]string{
		"redis":                "docker.io/library/redis@" + string(record.Target.Digest),
		"r.example:5000/a/b:1": "r.example:5000/a/b@" + string(record.Target.Digest),
		"r.example/a@" + string(digest.FromString("y")): "r.example/a@" + string(record.Target.Digest),
		"NO NAME": "sha256:abc",
	} {
		if got := byDigest(name, record); got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
}

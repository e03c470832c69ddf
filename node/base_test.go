package node

import (
	"testing"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

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

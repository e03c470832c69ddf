package node

import (
	"strings"
	"testing"

	"github.com/stasis-run/stasis/checkpoint/capture"
)

func TestImageIdentity(t *testing.T) {
	here := imageIdentity{name: "docker.io/library/redis:7", digests: []string{"sha256:index", "sha256:manifest"}, config: "cafe"}
	for name, tc := range map[string]struct {
		base capture.Base
		same bool
	}{
		"config":                  {capture.Base{Config: "sha256:cafe"}, true},
		"config, another name":    {capture.Base{Name: "mirror/redis:7", Digest: "sha256:other", Config: "sha256:cafe"}, true},
		"Podman's config":         {capture.Base{Config: "cafe"}, true},
		"another config":          {capture.Base{Name: "docker.io/library/redis:7", Config: "sha256:beef"}, false},
		"index":                   {capture.Base{Digest: "sha256:index"}, true},
		"manifest":                {capture.Base{Name: "x", Digest: "sha256:manifest"}, true},
		"another digest":          {capture.Base{Name: "docker.io/library/redis:7", Digest: "sha256:other"}, false},
		"name":                    {capture.Base{Name: "docker.io/library/redis:7"}, true},
		"short name":              {capture.Base{Name: "redis:7"}, true},
		"another name":            {capture.Base{Name: "redis:8"}, false},
		"nothing is known at all": {capture.Base{}, true},
	} {
		got := here.differs(tc.base)
		if (got == "") != tc.same || got != "" && !strings.Contains(got, here.name) {
			t.Errorf("%s: %q", name, got)
		}
	}
}

package task

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

func TestRestoreRequest(t *testing.T) {
	for name, tc := range map[string]struct {
		annotations map[string]string
		want        restoreRequest
		refused     string
	}{
		"none":        {nil, restoreRequest{restart: restartFresh}, ""},
		"other's":     {map[string]string{"example.com/restore-from": "x"}, restoreRequest{restart: restartFresh}, ""},
		"plain":       {map[string]string{"stasis.run/restore-from": "reg/cp:1"}, restoreRequest{from: "reg/cp:1", restart: restartFresh}, ""},
		"named":       {map[string]string{"stasis.run/restore-from.app": "/a.tar"}, restoreRequest{from: "/a.tar", named: true, restart: restartFresh}, ""},
		"named first": {map[string]string{"stasis.run/restore-from.app": "a", "stasis.run/restore-from": "b"}, restoreRequest{from: "a", named: true, restart: restartFresh}, ""},
		"another's":   {map[string]string{"stasis.run/restore-from.other": "a"}, restoreRequest{restart: restartFresh}, ""},
		"restart":     {map[string]string{"stasis.run/restart": "restore", "stasis.run/tcp": "keep"}, restoreRequest{restart: restartRestore}, ""},
		"sandbox":     {map[string]string{criContainerType: criSandbox, "stasis.run/nonsense": "", "stasis.run/restore-from": "x"}, restoreRequest{restart: restartFresh}, ""},

		"unknown":       {map[string]string{"stasis.run/restore_from": "x"}, restoreRequest{}, "stasis.run/restore_from"},
		"prefix only":   {map[string]string{"stasis.run/": "x"}, restoreRequest{}, "stasis.run/"},
		"empty":         {map[string]string{"stasis.run/restore-from": ""}, restoreRequest{}, "is empty"},
		"no name":       {map[string]string{"stasis.run/restore-from.": "x"}, restoreRequest{}, "container's name"},
		"other's empty": {map[string]string{"stasis.run/restore-from.other": ""}, restoreRequest{}, "restore-from.other"},
		"space":         {map[string]string{"stasis.run/restore-from": "a b"}, restoreRequest{}, "a b"},
		"control":       {map[string]string{"stasis.run/restore-from": "a\n"}, restoreRequest{}, `"a\n"`},
		"long":          {map[string]string{"stasis.run/restore-from": strings.Repeat("x", maxReference+1)}, restoreRequest{}, "4096"},
		"up":            {map[string]string{"stasis.run/restore-from": "/a/../b"}, restoreRequest{}, `"/b"`},
		"policy":        {map[string]string{"stasis.run/restart": "Restore"}, restoreRequest{}, "Restore"},
		"no policy":     {map[string]string{"stasis.run/restart": ""}, restoreRequest{}, "stasis.run/restart"},
		"tcp":           {map[string]string{"stasis.run/tcp": ""}, restoreRequest{}, "stasis.run/tcp"},
	} {
		c := &config{Annotations: tc.annotations}
		if c.Annotations[criContainerType] == "" && c.Annotations != nil {
			c.Annotations[criContainerName] = "app"
		}
		got, err := c.restoreRequest()
		switch {
		case tc.refused == "" && (err != nil || got != tc.want):
			t.Errorf("%s: %+v, %v; want %+v", name, got, err, tc.want)
		case tc.refused != "" && (!errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), tc.refused)):
			t.Errorf("%s: %v; want an invalid argument that says %q", name, err, tc.refused)
		}
	}
}

func TestUserNamespaceOfPod(t *testing.T) {
	config, spec := &config{}, &specs.Spec{Linux: &specs.Linux{}}
	mappings := []specs.LinuxIDMapping{{HostID: 100000, Size: 65536}}
	for _, tc := range []struct {
		inPod    bool
		mappings []specs.LinuxIDMapping
		refused  bool
	}{{false, nil, false}, {false, mappings, false}, {true, nil, false}, {true, mappings, true}} {
		config.Annotations = nil
		if tc.inPod {
			config.Annotations = map[string]string{criSandboxNamespace: "default"}
		}
		spec.Linux.UIDMappings = tc.mappings
		if err := checkUserNamespace(config, spec); (err != nil) != tc.refused || err != nil && !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%+v: %v", tc, err)
		}
	}
}

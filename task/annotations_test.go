package task

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

func TestWish(t *testing.T) {
	for name, tc := range map[string]struct {
		annotations map[string]string
		want        wish
		refused     string
	}{
		"none":        {nil, wish{restart: restartFresh}, ""},
		"other's":     {map[string]string{"example.com/restore-from": "x"}, wish{restart: restartFresh}, ""},
		"plain":       {map[string]string{"stasis.run/restore-from": "reg/cp:1"}, wish{from: "reg/cp:1", restart: restartFresh}, ""},
		"named":       {map[string]string{"stasis.run/restore-from.app": "/a.tar"}, wish{from: "/a.tar", named: true, restart: restartFresh}, ""},
		"named first": {map[string]string{"stasis.run/restore-from.app": "a", "stasis.run/restore-from": "b"}, wish{from: "a", named: true, restart: restartFresh}, ""},
		"another's":   {map[string]string{"stasis.run/restore-from.other": "a"}, wish{restart: restartFresh}, ""},
		"restart":     {map[string]string{"stasis.run/restart": "restore", "stasis.run/tcp": "keep"}, wish{restart: restartRestore}, ""},
		"sandbox":     {map[string]string{criContainerType: criSandbox, "stasis.run/nonsense": "", "stasis.run/restore-from": "x"}, wish{restart: restartFresh}, ""},

		"unknown":       {map[string]string{"stasis.run/restore_from": "x"}, wish{}, "stasis.run/restore_from"},
		"prefix only":   {map[string]string{"stasis.run/": "x"}, wish{}, "stasis.run/"},
		"empty":         {map[string]string{"stasis.run/restore-from": ""}, wish{}, "is empty"},
		"no name":       {map[string]string{"stasis.run/restore-from.": "x"}, wish{}, "container's name"},
		"other's empty": {map[string]string{"stasis.run/restore-from.other": ""}, wish{}, "restore-from.other"},
		"space":         {map[string]string{"stasis.run/restore-from": "a b"}, wish{}, "a b"},
		"control":       {map[string]string{"stasis.run/restore-from": "a\n"}, wish{}, `"a\n"`},
		"long":          {map[string]string{"stasis.run/restore-from": strings.Repeat("x", maxReference+1)}, wish{}, "4096"},
		"up":            {map[string]string{"stasis.run/restore-from": "/a/../b"}, wish{}, `"/b"`},
		"policy":        {map[string]string{"stasis.run/restart": "Restore"}, wish{}, "Restore"},
		"no policy":     {map[string]string{"stasis.run/restart": ""}, wish{}, "stasis.run/restart"},
		"tcp":           {map[string]string{"stasis.run/tcp": ""}, wish{}, "stasis.run/tcp"},
	} {
		c := &config{Annotations: tc.annotations}
		if c.Annotations[criContainerType] == "" && c.Annotations != nil {
			c.Annotations[criContainerName] = "app"
		}
		got, err := c.wish()
		switch {
		case tc.refused == "" && (err != nil || got != tc.want):
			t.Errorf("%s: %+v, %v; want %+v", name, got, err, tc.want)
		case tc.refused != "" && (!errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), tc.refused)):
			t.Errorf("%s: %v; want an invalid argument that says %q", name, err, tc.refused)
		}
	}
}

func TestUserNamespaceOfPod(t *testing.T) {
	l := &restore{c: &container{id: "c", config: &config{}}, spec: &specs.Spec{Linux: &specs.Linux{}}}
	mappings := []specs.LinuxIDMapping{{HostID: 100000, Size: 65536}}
	for _, tc := range []struct {
		inPod    bool
		mappings []specs.LinuxIDMapping
		refused  bool
	}{{false, nil, false}, {false, mappings, false}, {true, nil, false}, {true, mappings, true}} {
		l.c.config.Annotations = nil
		if tc.inPod {
			l.c.config.Annotations = map[string]string{criSandboxNamespace: "default"}
		}
		l.spec.Linux.UIDMappings = tc.mappings
		if err := l.checkUserNamespace(); (err != nil) != tc.refused || err != nil && !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%+v: %v", tc, err)
		}
	}
}

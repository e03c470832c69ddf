package contentstore

import (
	"context"
	"errors"
	"testing"

	"github.com/containerd/containerd/api/services/introspection/v1"
	service "github.com/containerd/containerd/v2/core/introspection"
)

func TestLayoutKnown(t *testing.T) {
	for version, known := range map[string]bool{
		"1.0.0": true, "v1.7.28": true, "1.7.24~ds1": true, "1.7.25-0ubuntu1~24.04.1": true, "1.7.28+unknown": true,
		"v2.0.0-rc.1": true, "v2.4.2": true, "v2.1.4-k3s2": true, "v2.5.0-12-g1dcd765fa.m": true, "2.10.0": true,
		"0.2.9": false, "v3.0.0": false, "3.0.0-beta.0": false, "10.0.0": false, "21.4": false, "v22.0.0": false,
		"": false, "2": false, "v2": false, "unknown": false, "1dcd765fa": false, "2.x": false, "2.4beta": false,
		"containerd 2.4.2": false, " 2.4.2": false, "3.0.0\n2.4.2": false,
	} {
		if f := At("/x", version); f.Usable() != known || f.Path() != "/x" {
			t.Errorf("%q: usable %v", version, f.Usable())
		}
	}
	if At("", "2.4.2").Usable() {
		t.Error("no folder is usable")
	}
}

// plugins is an introspection service with content plugins.
type plugins struct {
	service.Service
	list []*introspection.Plugin
	err  error
}

func (p plugins) Plugins(context.Context, ...string) (*introspection.PluginsResponse, error) {
	return &introspection.PluginsResponse{Plugins: p.list}, p.err
}

func TestFind(t *testing.T) {
	plugin := func(id, root string) *introspection.Plugin {
		p := &introspection.Plugin{Type: "io.containerd.content.v1", ID: id}
		if root != "" {
			p.Exports = map[string]string{"root": root}
		}
		return p
	}
	local := plugin("content", "/root")
	for name, tc := range map[string]struct {
		plugins plugins
		version string
		path    string
		usable  bool
	}{
		"local":               {plugins{list: []*introspection.Plugin{local}}, "v2.4.2", "/root", true},
		"no root":             {plugins{list: []*introspection.Plugin{plugin("content", "")}}, "v2.4.2", "", false},
		"beside one without":  {plugins{list: []*introspection.Plugin{plugin("other", ""), local}}, "v2.4.2", "/root", true},
		"unknown version":     {plugins{list: []*introspection.Plugin{local}}, "v3.0.0", "/root", false},
		"no version":          {plugins{list: []*introspection.Plugin{local}}, "", "/root", false},
		"proxy":               {plugins{list: []*introspection.Plugin{plugin("other", "/other")}}, "v2.4.2", "/other", false},
		"no plugin":           {plugins{}, "v2.4.2", "", false},
		"no answer":           {plugins{err: errors.New("test")}, "v2.4.2", "", false},
		"no answer of either": {plugins{err: errors.New("test")}, "", "", false},
	} {
		if f := Find(t.Context(), tc.version, tc.plugins); f.Path() != tc.path || f.Usable() != tc.usable {
			t.Errorf("%s: %q, usable %v", name, f.Path(), f.Usable())
		}
	}
}

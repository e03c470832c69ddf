package kubernetes

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// testArchive looks at what the kubelet's endpoint for checkpoints writes: all that
// it has with runc.
func (e *env) testArchive(t *testing.T) {
	entries := map[string][]string{}
	for _, class := range []string{"", "stasis", "stasis-own"} {
		name := "archive-" + class + "x"
		manifest := render(appPod, "NAME", name, "NODE", e.here.Name, "IMAGE", App)
		if class == "" {
			manifest = strings.Replace(manifest, "  runtimeClassName: CLASS\n", "", 1)
		}
		e.Apply(t, render(manifest, "CLASS", class))
		e.WaitReady(t, name)
		path, err := e.Checkpoint(t.Context(), name, "app")
		if class == "" && err != nil {
			// It fails whenever a probe is just connecting, unlike ours.
			e.Wait(t, "a checkpoint by runc", func() error {
				path, err = e.Checkpoint(t.Context(), name, "app")
				return err
			})
		}
		if err != nil {
			t.Errorf("handler %q: %v", class, err)
			continue
		}
		if dir := filepath.Dir(path); dir != "/var/lib/kubelet/checkpoints" {
			t.Errorf("handler %q: the archive is %s", class, path)
		}
		out, err := e.here.Run(t.Context(), "tar", "-tf", path)
		if err != nil {
			t.Errorf("handler %q: %v", class, err)
		}
		entries[class] = strings.Fields(out)
		if out, err := e.here.Run(t.Context(), "stasis", "inspect", path); err != nil || !strings.Contains(out, "python3") {
			t.Errorf("handler %q: stasis inspect: %v\n%s", class, err, out)
		}
		// It runs on.
		e.follow(t, "attach", name)
	}
	for _, want := range []string{"checkpoint/pstree.img", "config.dump", "spec.dump", "status.dump", "container.log", "dump.log", "stats-dump"} {
		for class, list := range entries {
			if !slices.Contains(list, want) {
				t.Errorf("handler %q: the archive has no %s: %v", class, want, list)
			}
		}
	}
}

package task

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
)

// TestCRIFolder finds the folder in which CRI collects an archive, and no link in its
// place, and none for a container that is in no pod.
func TestCRIFolder(t *testing.T) {
	cri := filepath.Join(t.TempDir(), "io.containerd.grpc.v1.cri")
	folder := filepath.Join(cri, "containers", "c", "ctrd-checkpoint")
	found := func(file, annotations string) string {
		t.Helper()
		c := &container{id: "c", config: &config{}}
		spec := `{"mounts": [{"source": "/etc/hosts"}, {"source": "` + file + `"}], "annotations": {` + annotations + `}}`
		if err := json.Unmarshal([]byte(spec), c.config); err != nil {
			t.Fatal(err)
		}
		return c.criFolder()
	}
	const pod = `"io.kubernetes.cri.sandbox-id": "s", "io.kubernetes.cri.sandbox-namespace": "default"`
	file := filepath.Join(cri, "sandboxes", "s", "resolv.conf")
	if got := found(file, pod); got != "" {
		t.Errorf("while nobody collects: %s", got)
	}
	if err := os.MkdirAll(folder, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct{ file, annotations, want string }{
		{file, pod, folder},
		{file, "", ""},
		{filepath.Join(cri, "sandboxes", "s", "other"), pod, ""},
		{filepath.Join(cri, "elsewhere", "s", "resolv.conf"), pod, ""},
		{filepath.Join(filepath.Dir(cri), "other", "sandboxes", "s", "resolv.conf"), pod, ""},
	} {
		if got := found(tc.file, tc.annotations); got != tc.want {
			t.Errorf("by %s, %s: %q", tc.file, tc.annotations, got)
		}
	}
	if err := os.Remove(folder); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc", folder); err != nil {
		t.Fatal(err)
	}
	if got := found(file, pod); got != "" {
		t.Errorf("a link is followed: %s", got)
	}
}

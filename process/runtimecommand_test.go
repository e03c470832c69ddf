package process

import (
	"os"
	"path/filepath"
	"testing"
)

// TestFreezerGroup reads where crun freezes a container, which runc does not note.
func TestFreezerGroup(t *testing.T) {
	root := t.TempDir()
	r := NewRuntime(RuntimeConfig{Root: root}, "ns", t.TempDir(), "c")
	dir := filepath.Join(root, "ns", "c")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if got := r.FreezerGroup(); got != "" {
		t.Errorf("without a note: %q", got)
	}
	for text, want := range map[string]string{
		`{"pid": 7, "cgroup-path": "/a.slice/c.scope/container"}`: "/a.slice/c.scope/container",
		`{"pid": 7}`: "",
		`{`:          "",
	} {
		if err := os.WriteFile(filepath.Join(dir, "status"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := r.FreezerGroup(); got != want {
			t.Errorf("%s: %q", text, got)
		}
	}
}

func TestParseVersion(t *testing.T) {
	for out, want := range map[string][2]string{
		"runc version 1.5.2\ncommit: v1.5.2-0-g1\nspec: 1.3.0\n": {"runc", "1.5.2"},
		"crun version 1.21\ncommit: 10269840aa\nrundir: /run\n":  {"crun", "1.21"},
		"something else": {},
		"":               {},
	} {
		if name, version := parseVersion(out); name != want[0] || version != want[1] {
			t.Errorf("%q: %q, %q, want %q", out, name, version, want)
		}
	}
}

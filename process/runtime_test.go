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
	for out, want := range map[string]string{
		"runc version 1.5.2\ncommit: v1.5.2-0-g1\nspec: 1.3.0\n": "1.5.2",
		"crun version 1.21\ncommit: 10269840aa\nrundir: /run\n":  "1.21",
		"youki version 0.5.5":                                    "0.5.5",
		"something else":                                         "",
		"":                                                       "",
	} {
		if got := parseVersion(out); got != want {
			t.Errorf("%q: %q, want %q", out, got, want)
		}
	}
}

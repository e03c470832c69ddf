package node

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stasis-run/stasis/checkpoint/policy/allow"
)

// Files are as engines make them, whatever the umask.
func TestMakeFile(t *testing.T) {
	dir := t.TempDir()
	root, err := os.OpenRoot(t.TempDir()) // with no /.stasis
	must0(t, err)
	defer root.Close()
	for destination, want := range map[string]struct {
		mode os.FileMode
		text string // which it begins with
	}{
		"/etc/hosts":           {0o644, "127.0.0.1 localhost db\n"},
		"/etc/hostname":        {0o644, "db\n"},
		"/etc/resolv.conf":     {0o644, ""},
		"/run/.containerenv":   {0o644, ""},
		"/dev/termination-log": {0o666, ""},
		"/dev/shm":             {0o777 | os.ModeSticky | os.ModeDir, ""},
	} {
		if !allow.EngineFile(destination) {
			t.Errorf("%s is not made", destination)
		}
		path, err := makeFile(t.Context(), dir, destination, "db", root)
		if err != nil {
			t.Error(err)
			continue
		}
		info, err := os.Lstat(path)
		if err != nil || filepath.Dir(path) != dir || info.Mode() != want.mode {
			t.Errorf("%s: %s is %v, %v", destination, path, info, err)
			continue
		}
		if info.IsDir() {
			continue
		}
		text, err := os.ReadFile(path)
		if err != nil || !strings.HasPrefix(string(text), want.text) {
			t.Errorf("%s: %q, %v", destination, text, err)
		}
	}
	if allow.EngineFile("/data") {
		t.Error("a volume is made")
	}
}

func TestOCIBinary(t *testing.T) {
	for _, tc := range [][3]string{{"", "crun", "crun"}, {"", "runc", ""}, {"", "/tmp/crun", ""}, {"", "../crun", ""}, {"/opt/runc", "crun", "/opt/runc"}} {
		if got := ociBinary(tc[0], tc[1]); got != tc[2] {
			t.Errorf("%q, made by %q: %q, want %q", tc[0], tc[1], got, tc[2])
		}
	}
}

func TestImageName(t *testing.T) {
	for id, want := range map[string]string{
		"web": "web", "Web_1.a": "web_1.a", "a._b": "a-b", "web_-1": "web-1", "-x-": "x", "äb": "b", "___": "container", "a--b": "a-b",
	} {
		got := imageName(id)
		if got != want {
			t.Errorf("%q: %q, want %q", id, got, want)
		}
		if _, err := fullName("localhost/" + got + ":1"); err != nil {
			t.Errorf("%q: %v", id, err)
		}
	}
}

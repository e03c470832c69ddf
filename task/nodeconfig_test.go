package task

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func configFile(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// rootOnly skips what only root can set up; the tests run as root in CI.
func rootOnly(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("not root")
	}
}

func TestReadNodeConfig(t *testing.T) {
	rootOnly(t)
	n, err := readNodeConfig(configFile(t, "[restore]\narchives = ['/a', '/b/c']\n[restore.namespaces]\nx = ['y', '']\n'*' = ['z']"))
	if err != nil || !slices.Equal(n.Restore.Archives, []string{"/a", "/b/c"}) {
		t.Errorf("%+v, %v", n, err)
	}
	n, err = readNodeConfig(configFile(t, "# nothing"))
	if err != nil || !slices.Equal(n.Restore.Archives, []string{kubeletArchives}) {
		t.Errorf("default: %+v, %v", n, err)
	}
	if n, err = readNodeConfig(configFile(t, "[restore]\narchives = []")); err != nil || len(n.Restore.Archives) != 0 {
		t.Errorf("no archives: %+v, %v", n, err)
	}
	t.Setenv("STASIS_CONFIG_DIR", t.TempDir())
	if n, err := readNodeConfig(""); err != nil || !slices.Equal(n.Restore.Archives, []string{kubeletArchives}) || n.Restore.Unsigned != unsignedRefuse {
		t.Errorf("no file: %+v, %v", n, err)
	}
	must(t, os.WriteFile(defaultNodeConfig(), []byte("[restore]\nunsigned = 'check'"), 0o644))
	if n, err := readNodeConfig(""); err != nil || n.Restore.Unsigned != unsignedCheck {
		t.Errorf("in its folder: %+v, %v", n, err)
	}
	for says, text := range map[string]string{
		"restore.archive":      "[restore]\narchive = []",
		"unknown key \"x\"":    "x = 1",
		"refuse or check":      "[restore]\nunsigned = 'allow'",
		"absolute":             "[restore]\narchives = ['a']",
		"plain absolute":       "[restore]\narchives = ['/a/../b']",
		"node's configuration": "[restore]\nnamespaces = 'all'",
		"toml":                 "=",
		"larger":               strings.Repeat("#", maxConfig+1),
	} {
		if _, err := readNodeConfig(configFile(t, text)); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), says) {
			t.Errorf("%v; want an error that says %q", err, says)
		}
	}
	path := configFile(t, "")
	for says, change := range map[string]func() error{
		"mode 666": func() error { return os.Chmod(path, 0o666) },
		"user 1":   func() error { return os.Chown(path, 1, 0) },
		"no such":  func() error { return os.Remove(path) },
		"regular":  func() error { return unix.Mkfifo(path, 0o600) },
	} {
		must(t, os.RemoveAll(path))
		must(t, os.WriteFile(path, nil, 0o644))
		if says == "regular" {
			must(t, os.Remove(path))
		}
		must(t, change())
		if _, err := readNodeConfig(path); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), says) {
			t.Errorf("%v; want an error that says %q", err, says)
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestAllowNamespace(t *testing.T) {
	n := &nodeConfig{path: "/config"}
	n.Restore.Namespaces = map[string][]string{"staging": {"production", ""}, "any": {"*"}, "*": {"shared"}}
	for _, tc := range []struct {
		from, to string
		allowed  bool
	}{
		{"a", "a", true},
		{"a", "b", false},
		{"", "a", false},
		{"production", "staging", true},
		{"", "staging", true},
		{"other", "staging", false},
		{"staging", "production", false},
		{"other", "any", true},
		{"", "any", true},
		{"shared", "b", true},
		{"*", "b", false},
	} {
		if err := n.allowNamespace(tc.from, tc.to); (err == nil) != tc.allowed || err != nil && !errdefs.IsPermissionDenied(err) {
			t.Errorf("from %q to %q: %v", tc.from, tc.to, err)
		}
	}
}

func TestOpenArchive(t *testing.T) {
	dir := t.TempDir()
	allowed, outside := filepath.Join(dir, "allowed"), filepath.Join(dir, "outside")
	must(t, os.MkdirAll(filepath.Join(allowed, "sub"), 0o700))
	must(t, os.Mkdir(outside, 0o700))
	for _, f := range []string{"allowed/a.tar", "allowed/sub/b.tar", "outside/c.tar", "allowed..tar"} {
		must(t, os.WriteFile(filepath.Join(dir, f), []byte(f), 0o600))
	}
	must(t, os.Symlink("a.tar", filepath.Join(allowed, "link.tar")))
	must(t, os.Symlink(outside, filepath.Join(allowed, "out")))
	must(t, os.Symlink(allowed, filepath.Join(dir, "name")))
	n := &nodeConfig{path: "/config"}
	// The folder itself may be a link: the administrator has named it.
	n.Restore.Archives = []string{filepath.Join(dir, "nothing"), filepath.Join(dir, "name"), allowed}
	for path, refused := range map[string]func(error) bool{
		"allowed/a.tar":     nil,
		"name/sub/b.tar":    nil,
		"allowed/link.tar":  errdefs.IsPermissionDenied,
		"allowed/out/c.tar": errdefs.IsPermissionDenied,
		"outside/c.tar":     errdefs.IsPermissionDenied,
		"allowed":           errdefs.IsPermissionDenied,
		"allowed..tar":      errdefs.IsPermissionDenied,
		"allowed/none.tar":  errdefs.IsNotFound,
		"allowed/sub":       func(err error) bool { return strings.Contains(err.Error(), "regular") },
	} {
		f, err := n.openArchive(filepath.Join(dir, path))
		if err == nil {
			f.Close()
		}
		if (err == nil) != (refused == nil) || err != nil && !refused(err) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

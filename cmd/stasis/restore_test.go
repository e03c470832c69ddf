package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestCgroupsPath(t *testing.T) {
	for old, want := range map[string][2]string{ // without systemd, and with it
		"":                              {"/ns/new", "/ns/new"},
		"/ns/old":                       {"/ns/new", "/ns/new"},
		"/apps/db/old":                  {"/apps/db/new", "/apps/db/new"},
		"/kubepods/besteffort/pod1/old": {"/ns/new", "/ns/new"},
		"/libpod_parent/libpod-old":     {"/ns/new", "/ns/new"},
		"db.slice:ctr:old":              {"/ns/new", "db.slice:ctr:new"},
		"machine.slice:libpod:old":      {"/ns/new", "system.slice:stasis-ns:new"},
		"system.slice:cri-containerd:a": {"/ns/new", "system.slice:stasis-ns:new"},
		"kubepods-pod1.slice:x:a":       {"/ns/new", "system.slice:stasis-ns:new"},
	} {
		for i, systemd := range []bool{false, true} {
			if got := cgroupsPath(old, "ns", "new", systemd); got != want[i] {
				t.Errorf("%q, systemd %v: %q, want %q", old, systemd, got, want[i])
			}
		}
	}
}

func TestOfProcess(t *testing.T) {
	for path, want := range map[string]bool{
		"/proc/123/ns/net":      true,
		"/run/../proc/7/ns/ipc": true,
		"/proc/1/ns/net":        false,
		"/proc/self/ns/net":     false,
		"/run/netns/123":        false,
		"/proc":                 false,
	} {
		if got := ofProcess(path); got != want {
			t.Errorf("%q: %v", path, got)
		}
	}
}

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
		if !engineFile(destination) {
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
	if engineFile("/data") {
		t.Error("a volume is made")
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

package node

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestCredentials(t *testing.T) {
	home, podman := t.TempDir(), filepath.Join(t.TempDir(), "auth.json")
	t.Setenv("HOME", home)
	t.Setenv("DOCKER_CONFIG", "")
	t.Setenv("XDG_RUNTIME_DIR", "")
	t.Setenv("XDG_CONFIG_HOME", "")
	t.Setenv("REGISTRY_AUTH_FILE", podman)
	must0(t, os.Mkdir(filepath.Join(home, ".docker"), 0o700))
	// ZG9jazplcg== is "dock:er".
	must0(t, os.WriteFile(filepath.Join(home, ".docker", "config.json"), []byte(`{"auths":{
		"localhost:5000": {"auth": "ZG9jazplcg=="},
		"https://index.docker.io/v1/": {"auth": "ZG9jazplcg=="},
		"token.example": {"auth": "ZG9jazplcg==", "identitytoken": "abc"}}}`), 0o600))
	must0(t, os.WriteFile(podman, []byte(`{"auths":{"podman.example": {"auth": "cG9kOm1hbg=="}}}`), 0o600))
	for host, want := range map[string][2]string{
		"localhost:5000":       {"dock", "er"},
		"registry-1.docker.io": {"dock", "er"},
		"token.example":        {"", "abc"},
		"podman.example":       {"pod", "man"},
		"other.example":        {"", ""},
	} {
		user, secret, err := credentials(host)
		if err != nil || [2]string{user, secret} != want {
			t.Errorf("%s: %q %q, %v", host, user, secret, err)
		}
	}
	must0(t, os.WriteFile(podman, []byte(`{`), 0o600))
	if _, _, err := credentials("localhost:5000"); err == nil {
		t.Error("a broken file is no error")
	}
}

// TestLogin: a login is for one registry, and not for its mirrors.
func TestLogin(t *testing.T) {
	t.Setenv("REGISTRY_AUTH_FILE", filepath.Join(t.TempDir(), "none"))
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	t.Setenv("HOME", t.TempDir())
	for host, registry := range map[string]string{"r.example:5000": "r.example:5000", "registry-1.docker.io": "docker.io"} {
		r := Registry{Login: &Login{Registry: registry, Username: "me", Password: "mine"}}
		must0(t, r.check(registry+"/x:1"))
		if err := r.check("other.example/x:1"); !errors.Is(err, ErrRequest) {
			t.Errorf("a login of %s for another registry: %v", registry, err)
		}
		if user, secret, err := r.credentials(host); user != "me" || secret != "mine" || err != nil {
			t.Errorf("%s: %q %q, %v", host, user, secret, err)
		}
		for _, other := range []string{"mirror.example", "r.example", "r.example:5001", ""} {
			if user, secret, err := r.credentials(other); user != "" || secret != "" || err != nil {
				t.Errorf("%s for %s: %q %q, %v", other, registry, user, secret, err)
			}
		}
		if text := fmt.Sprintf("%v %+v %s", r, r, r.Login); strings.Contains(text, "mine") {
			t.Errorf("printed: %s", text)
		}
	}
	for _, l := range []Login{{Registry: "", Password: "p"}, {Registry: "r/path", Password: "p"}, {Registry: "me@r", Password: "p"}, {Registry: "r", Username: "me"}} {
		n := &Node{}
		registry := Registry{Login: &l}
		_, push := n.Push(t.Context(), PushRequest{Ref: "x", Registry: registry})
		_, pull := n.Pull(t.Context(), PullRequest{Ref: "x", Registry: registry})
		_, restore := n.Restore(t.Context(), RestoreRequest{Checkpoint: "x", Registry: registry})
		checkpoint := CheckpointRequest{Containers: []string{"c"}, Registry: registry}.Check()
		for _, err := range []error{push, pull, restore, checkpoint} {
			if !errors.Is(err, ErrRequest) || !strings.Contains(err.Error(), "login") {
				t.Errorf("%+v: %v", l, err)
			}
		}
	}
}

func TestIsOCI(t *testing.T) {
	archive := func(name string) []byte {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		must0(t, w.WriteHeader(&tar.Header{Name: name, Mode: 0o600}))
		must0(t, w.Close())
		return b.Bytes()
	}
	zipped := func(data []byte) []byte {
		var b bytes.Buffer
		w := gzip.NewWriter(&b)
		w.Write(data)
		must0(t, w.Close())
		return b.Bytes()
	}
	for _, tc := range []struct {
		name string
		data []byte
		want bool
	}{
		{"index", archive("index.json"), true},
		{"layout", archive("oci-layout"), true},
		{"blobs", archive("blobs/"), true},
		{"compressed", zipped(archive("blobs/sha256/x")), true},
		{"podman", archive("config.dump"), false},
		{"compressed podman", zipped(archive("checkpoint/")), false},
		{"nothing", nil, false},
		{"garbage", []byte("garbage"), false},
		{"half", zipped(archive("blobs/"))[:10], false},
	} {
		if got := isOCI(bufio.NewReaderSize(bytes.NewReader(tc.data), 64<<10)); got != tc.want {
			t.Errorf("%s: %v", tc.name, got)
		}
	}
}

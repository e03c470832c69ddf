package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

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

// greedy asks for something of each kind that a flag grants.
const greedy = `{
"process": {"cwd": "/", "capabilities": {"bounding": ["CAP_SYS_ADMIN"]}, "oomScoreAdj": -1, "apparmorProfile": "mine",
	"rlimits": [{"type": "RLIMIT_RTPRIO", "hard": 18446744073709551615, "soft": 0}]},
"root": {"path": "x"},
"mounts": [{"destination": "/m", "type": "bind", "source": "/it's here, 'now'"}, {"destination": "/o", "type": "overlay"}],
"hooks": {"poststart": [{"path": "/bin/evil"}]},
"linux": {"cgroupsPath": "/apps/db/c", "namespaces": [{"type": "mount"}, {"type": "network", "path": "/run"}, {"type": "time", "path": "/run"}],
	"sysctl": {"kernel.core_pattern": "x"}, "devices": [{"path": "/dev/x", "type": "b", "major": 8, "minor": 0}],
	"resources": {"devices": [{"allow": true, "access": "rwm"}]}}}`

// TestGrantFlags gives the flags that a refusal names, as a shell would.
func TestGrantFlags(t *testing.T) {
	ctx := namespaces.WithNamespace(t.Context(), "ns")
	parse := func(args ...string) *restoreFlags {
		f := &restoreFlags{}
		cmd := &cobra.Command{}
		cmd.Flags().StringVar(&f.network, "network", "", "")
		grantFlags(cmd, f)
		must0(t, cmd.ParseFlags(args))
		return f
	}
	_, _, err := parse().newSpec(ctx, "c", "", []byte(greedy), false)
	if !errdefs.IsPermissionDenied(err) {
		t.Fatal(err)
	}
	_, flags, _ := strings.Cut(err.Error(), "add: ")
	words, err := exec.Command("sh", "-c", `printf '%s\n' `+flags).Output()
	must0(t, err)
	args := strings.Split(strings.TrimSpace(string(words)), "\n")
	for _, f := range []*restoreFlags{parse(args...), parse("--privileged")} {
		spec, asks, err := f.newSpec(ctx, "c", "", []byte(greedy), false)
		if err != nil || spec.Hooks != nil || len(spec.Mounts) != 2 || spec.Linux.CgroupsPath != "/apps/db/c" {
			t.Errorf("%q: %v", args, err)
		}
		var errs strings.Builder
		(&app{err: &errs}).tellAsks(asks, f.grants.Privileged)
		if warned := strings.Contains(errs.String(), "WARNING") && strings.Contains(errs.String(), "CAP_SYS_ADMIN"); warned != f.grants.Privileged {
			t.Errorf("it says %s", errs.String())
		}
		if !strings.Contains(errs.String(), "/bin/evil") {
			t.Errorf("no word of the hook in %s", errs.String())
		}
	}
	for _, arg := range args {
		if !strings.HasPrefix(arg, "--") {
			continue
		}
		if code, _, errs := stasis(t, "restore", arg+"=x", "--help"); arg != "--allow-new-privs" && arg != "--allow-seccomp" && code != 0 {
			t.Errorf("restore has no %s: %s", arg, errs)
		}
	}
	if spec, _, err := parse().newSpec(ctx, "c", "", []byte(greedy), true); err != nil || spec.Hooks != nil {
		t.Errorf("its own: %v", err)
	}
}

func TestOCIBinary(t *testing.T) {
	for _, tc := range [][3]string{{"", "crun", "crun"}, {"", "runc", ""}, {"", "/tmp/crun", ""}, {"", "../crun", ""}, {"/opt/runc", "crun", "/opt/runc"}} {
		if got := ociBinary(tc[0], tc[1]); got != tc[2] {
			t.Errorf("%q, made by %q: %q, want %q", tc[0], tc[1], got, tc[2])
		}
	}
}

func TestCompleteGrants(t *testing.T) {
	for flag, want := range map[string]string{
		"allow-capability": "CAP_SYS_ADMIN", "allow-host": "pid", "allow-seccomp": "unconfined", "allow-priority": "oom", "allow-ulimit": "nofile",
		"allow-unmask": "/proc/kcore", "allow-sysctl": "all", "allow-label": "all", "network": "host",
	} {
		if _, out, _ := stasis(t, "__complete", "restore", "--"+flag, ""); !strings.Contains(out, want+"\n") {
			t.Errorf("--%s proposes %q", flag, out)
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

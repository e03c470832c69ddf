package process

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	runc "github.com/containerd/go-runc"
	"github.com/opencontainers/runtime-spec/specs-go"
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

// script is a runtime's program that writes its arguments to a file, a line a call.
// With the environment FAIL it fails as runc does; else it leaves a pid, if it is asked to.
const script = `#!/bin/sh
echo "$*" >> "$CALLS"
while [ $# -gt 0 ]; do
	case $1 in
	--log) log=$2 ;;
	--pid-file) pid=$2 ;;
	esac
	shift
done
if [ -n "$FAIL" ]; then
	echo '{"level":"info","msg":"not this"}' >> "$log"
	echo '{"level":"error","msg":"'"$FAIL"'"}' >> "$log"
	exit 1
fi
[ -z "$pid" ] || echo 4711 > "$pid"
`

// TestRuntimeCommand calls a program as each method says, and tells its own last error.
func TestRuntimeCommand(t *testing.T) {
	dir := t.TempDir()
	program, calls, root, bundle := filepath.Join(dir, "runtime"), filepath.Join(dir, "calls"), filepath.Join(dir, "root"), filepath.Join(dir, "bundle")
	for _, d := range []string{bundle, filepath.Join(root, "ns", "c")} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(program, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("CALLS", calls)
	was := runc.Monitor
	runc.Monitor = reaper()
	t.Cleanup(func() { runc.Monitor = was })
	r := NewRuntime(RuntimeConfig{Binary: program, Root: root, SystemdCgroup: true}, "ns", bundle, "c")
	ctx := t.Context()
	pidOf := func(pid int, err error) error {
		if err == nil && pid != 4711 {
			err = fmt.Errorf("pid %d", pid)
		}
		return err
	}
	for _, tc := range []struct {
		op   string
		do   func() error
		want []string // in its arguments
	}{
		{"create", func() error { return pidOf(r.Create(ctx, &runc.CreateOpts{NoPivot: true})) },
			[]string{"--root " + filepath.Join(root, "ns") + " ", "--systemd-cgroup", "create --bundle " + bundle, "--no-pivot", "--pid-file " + bundle + "/init.pid", " c"}},
		{"start", func() error { return r.Start(ctx) }, []string{" start c"}},
		{"exec", func() error {
			return pidOf(r.Exec(ctx, "e", &specs.Process{Args: []string{"x"}}, &runc.ExecOpts{}))
		}, []string{"exec --process ", "--detach", "--pid-file " + bundle + "/e.pid", " c"}},
		{"kill", func() error { return r.Kill(ctx, 15, false) }, []string{"kill c 15"}},
		{"kill", func() error { return r.Kill(ctx, 9, true) }, []string{"kill --all c 9"}},
		{"pause", func() error { return r.Pause(ctx) }, []string{"pause c"}},
		{"resume", func() error { return r.Resume(ctx) }, []string{"resume c"}},
		{"update", func() error { return r.Update(ctx, &specs.LinuxResources{}) }, []string{"update --resources=- c"}},
		{"checkpoint", func() error {
			return r.Checkpoint(ctx, &runc.CheckpointOpts{ImagePath: "/images", WorkDir: "/work"}, runc.LeaveRunning)
		}, []string{"checkpoint ", "--image-path /images", "--work-path /work", "--leave-running", " c"}},
		{"restore", func() error {
			return pidOf(r.Restore(ctx, &runc.RestoreOpts{CheckpointOpts: runc.CheckpointOpts{ImagePath: "/images"}}))
		}, []string{"restore ", "--image-path /images", "--detach", "--pid-file " + bundle + "/init.pid", "--bundle " + bundle + " c"}},
		{"delete", func() error { return r.Delete(ctx) }, []string{"delete c"}},
	} {
		if err := os.RemoveAll(calls); err != nil {
			t.Fatal(err)
		}
		if err := tc.do(); err != nil {
			t.Errorf("%s: %v", tc.op, err)
		}
		said, err := os.ReadFile(calls)
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range tc.want {
			if !strings.Contains(string(said), want) {
				t.Errorf("%s: called with %q, want %q", tc.op, said, want)
			}
		}
		t.Run(tc.op+" fails", func(t *testing.T) {
			t.Setenv("FAIL", "no such thing")
			err := tc.do()
			var failed *RuntimeError
			if !errors.As(err, &failed) || failed.Op != tc.op || failed.Msg != "no such thing" {
				t.Errorf("%#v", err)
			}
			if want := "OCI runtime " + tc.op + " failed: no such thing"; err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%v; want %q", err, want)
			}
		})
	}
	if left, err := filepath.Glob(filepath.Join(bundle, "log*")); err != nil || len(left) > 0 {
		t.Errorf("logs are left: %q, %v", left, err)
	}
	// Delete has tried without force, and then with it.
	said, err := os.ReadFile(calls)
	if err != nil || strings.Count(string(said), "delete c") != 2 || strings.Count(string(said), "delete --force c") != 1 {
		t.Errorf("delete: %q, %v", said, err)
	}
	// Of a container that the runtime does not know, it is not even asked.
	if err := os.RemoveAll(filepath.Join(root, "ns", "c")); err != nil {
		t.Fatal(err)
	}
	t.Setenv("FAIL", "unknown")
	if err := r.Delete(ctx); err != nil {
		t.Error(err)
	}
	if name, version := r.Version(ctx); name != "runtime" || version != "" {
		t.Errorf("version of a runtime that does not tell: %q, %q", name, version)
	}
}

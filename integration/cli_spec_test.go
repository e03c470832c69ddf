package integration

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	seccompprofile "github.com/containerd/containerd/v2/contrib/seccomp"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/oci"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/stasis-run/stasis/integration/stack"
)

// crunCache is where crun keeps compiled seccomp profiles.
var crunCache = []string{"/.cache"}

// editSpec copies an archive with another spec in it.
func editSpec(t *testing.T, from, to string, change func(*specs.Spec)) {
	t.Helper()
	in, err := os.Open(from)
	must(t, err)
	defer in.Close()
	out, err := os.Create(to)
	must(t, err)
	defer out.Close()
	r, w := tar.NewReader(in), tar.NewWriter(out)
	found := false
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		must(t, err)
		var body io.Reader = r
		if h.Name == "spec.dump" {
			found = true
			spec := &specs.Spec{}
			must(t, json.NewDecoder(r).Decode(spec))
			change(spec)
			data, err := json.Marshal(spec)
			must(t, err)
			h.Size, body = int64(len(data)), bytes.NewReader(data)
		}
		must(t, w.WriteHeader(h))
		_, err = io.Copy(w, body)
		must(t, err)
	}
	must(t, w.Close())
	if !found {
		t.Fatalf("no spec in %s", from)
	}
}

// inStore lists everything in containerd that a restore makes.
func inStore(ctx context.Context, t *testing.T, s *stack.Stack) (list []string) {
	t.Helper()
	containers, err := s.Client().ContainerService().List(ctx)
	must(t, err)
	for _, c := range containers {
		list = append(list, "container "+c.ID)
	}
	images, err := s.Client().ImageService().List(ctx)
	must(t, err)
	for _, i := range images {
		list = append(list, "image "+i.Name)
	}
	must(t, s.Client().SnapshotService("overlayfs").Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		list = append(list, "snapshot "+i.Name)
		return nil
	}))
	slices.Sort(list)
	return list
}

// TestHostileSpec restores checkpoints whose spec their author has changed, as an
// archive and as an image. What cannot be granted is left out; all else is refused,
// with the flag in the error and nothing left.
func TestHostileSpec(t *testing.T) {
	t.Parallel()
	for name, opts := range map[string]stack.Options{"runc": {NoGrants: true}, "crun": {NoGrants: true, Crun: true, KnownLeaks: crunCache}} {
		t.Run(name, func(t *testing.T) {
			s := stack.Start(t, opts)
			ctx := s.Ctx()
			c := s.NewContainer(ctx, "c", stack.Busybox, stack.Args("sleep", "1000"), seccompprofile.WithDefaultProfile())
			c.Start(ctx)
			good, evil := filepath.Join(s.Dir, "good.tar"), filepath.Join(s.Dir, "evil.tar")
			s.Stasis("checkpoint", "c", "--exit", "--output", good, "--format", "archive", "--compress", "none")
			c.Wait(ctx)
			c.Delete(ctx)
			place := []string{"--cgroup-parent", filepath.Dir(s.CgroupPath("x"))}

			touched := filepath.Join(s.Dir, "touched")
			script := filepath.Join(s.Dir, "script")
			must(t, os.WriteFile(script, []byte("#!/bin/sh\necho $0 $* >>"+touched+"\n"), 0o755))
			config := filepath.Join(s.Dir, "criu.conf")
			must(t, os.WriteFile(config, []byte("action-script "+script+"\n"), 0o644))
			hook := []specs.Hook{{Path: script, Args: []string{"hook"}}}
			for name, change := range map[string]func(*specs.Spec){
				"unchanged": func(*specs.Spec) {},
				"hooks": func(spec *specs.Spec) {
					spec.Hooks = &specs.Hooks{CreateRuntime: hook, CreateContainer: hook, StartContainer: hook, Poststart: hook, Poststop: hook}
				},
				"annotations": func(spec *specs.Spec) {
					spec.Annotations = map[string]string{
						"org.criu.config": config, "run.oci.hooks.stdout": touched, "io.kubernetes.cri.sandbox-id": "x",
						"io.containerd.runc.v2.group": "x", "stasis.run/restore-from": "x",
					}
				},
				"another's cgroup": func(spec *specs.Spec) { spec.Linux.CgroupsPath = "/" + s.Namespace + "/../victim/x" },
			} {
				editSpec(t, good, evil, change)
				var errs strings.Builder
				cmd := s.StasisCommand(append([]string{"restore", evil, "r"}, place...)...)
				cmd.Stderr = &errs
				if err := cmd.Run(); err != nil {
					t.Fatalf("%s: %v, %s", name, err, errs.String())
				}
				if (name == "hooks") != strings.Contains(errs.String(), "run program") {
					t.Errorf("%s: it says %s", name, errs.String())
				}
				r := load(t, s, "r")
				spec, err := r.Spec(ctx)
				must(t, err)
				if spec.Hooks != nil || len(spec.Annotations) > 0 || spec.Linux.CgroupsPath != s.CgroupPath("r") {
					t.Errorf("%s: hooks %v, annotations %v, cgroup %s", name, spec.Hooks, spec.Annotations, spec.Linux.CgroupsPath)
				}
				r.Kill(ctx, syscall.SIGKILL)
				r.Delete(ctx)
				if did, err := os.ReadFile(touched); err == nil {
					t.Errorf("%s: the author ran code on the host: %s", name, did)
				}
			}

			asks := map[string]struct {
				change func(*specs.Spec)
				says   string
			}{
				"mount of the host": {func(spec *specs.Spec) {
					spec.Mounts = append(spec.Mounts, specs.Mount{Destination: "/host", Type: "bind", Source: "/", Options: []string{"rbind", "rw"}})
				}, "--allow-mount /:/host"},
				"pasted": {func(spec *specs.Spec) {
					spec.Mounts = append(spec.Mounts, specs.Mount{Destination: "/host", Type: "bind", Source: "/$(touch " + touched + ")", Options: []string{"bind"}})
				}, "--allow-mount '/$(touch " + touched + "):/host'"},
				"unmasked proc": {func(spec *specs.Spec) {
					spec.Mounts = append(spec.Mounts, specs.Mount{Destination: "/proc2", Type: "proc", Source: "proc"})
				}, "--allow-mount proc:/proc2"},
				"device": {func(spec *specs.Spec) {
					spec.Linux.Devices = append(spec.Linux.Devices, specs.LinuxDevice{Path: "/dev/kmsg", Type: "c", Major: 1, Minor: 11})
				}, "--allow-device /dev/kmsg"},
				"disguised device": {func(spec *specs.Spec) {
					spec.Linux.Devices = append(spec.Linux.Devices, specs.LinuxDevice{Path: "/dev/null", Type: "c", Major: 1, Minor: 1})
				}, "--allow-device 'c 1:1 rwm'"},
				"all devices": {func(spec *specs.Spec) {
					spec.Linux.Resources.Devices = []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
				}, "--allow-device all"},
				"host's processes": {func(spec *specs.Spec) {
					spec.Linux.Namespaces = slices.DeleteFunc(spec.Linux.Namespaces, func(ns specs.LinuxNamespace) bool { return ns.Type == specs.PIDNamespace })
				}, "--allow-host pid"},
				"processes of init": {func(spec *specs.Spec) {
					for i, ns := range spec.Linux.Namespaces {
						if ns.Type == specs.PIDNamespace {
							spec.Linux.Namespaces[i].Path = "/proc/1/ns/pid"
						}
					}
				}, "--allow-host /proc/1/ns/pid"},
				"capability": {func(spec *specs.Spec) {
					spec.Process.Capabilities.Bounding = append(spec.Process.Capabilities.Bounding, "CAP_SYS_ADMIN")
				}, "--allow-capability CAP_SYS_ADMIN"},
				"no seccomp":     {func(spec *specs.Spec) { spec.Linux.Seccomp = nil }, "--allow-seccomp unconfined"},
				"new privileges": {func(spec *specs.Spec) { spec.Process.NoNewPrivileges = false }, "--allow-new-privs"},
				"no masks":       {func(spec *specs.Spec) { spec.Linux.MaskedPaths, spec.Linux.ReadonlyPaths = nil, nil }, "--allow-unmask all"},
				"sysctl":         {func(spec *specs.Spec) { spec.Linux.Sysctl = map[string]string{"kernel.core_pattern": "|" + script} }, "--allow-sysctl kernel.core_pattern"},
				"cgroup":         {func(spec *specs.Spec) { spec.Linux.CgroupsPath = "/apps/victim/x" }, "--cgroup-parent /apps/victim"},
				"shared root":    {func(spec *specs.Spec) { spec.Linux.RootfsPropagation = "rshared" }, "no checkpoint gets"},
			}
			flags := place
			const imported = "stasis.test/evil:1"
			before := inStore(ctx, t, s)
			for name, tc := range asks {
				if name == "cgroup" {
					flags = nil
				}
				editSpec(t, good, evil, tc.change)
				for format, from := range map[string]string{"archive": evil, "image": imported} {
					if format == "image" {
						s.Stasis("import", evil, imported)
						before = inStore(ctx, t, s)
					}
					_, err := s.StasisErr(append([]string{"restore", from, "r"}, flags...)...)
					if err == nil || !strings.Contains(err.Error(), tc.says) {
						t.Errorf("%s, %s: %v", name, format, err)
					}
					if after := inStore(ctx, t, s); !slices.Equal(before, after) {
						t.Errorf("%s, %s: left\n%s\nwas\n%s", name, format, strings.Join(after, "\n"), strings.Join(before, "\n"))
					}
					checkTidy(t, s)
					if format == "image" {
						if out := s.Stasis("inspect", from); !strings.Contains(out, "ASKS FOR") {
							t.Errorf("%s: inspect says %s", name, out)
						}
						s.Stasis("rm", from)
						collect(ctx, t, s)
						before = inStore(ctx, t, s)
					}
				}
				flags = place
			}

			// All at once, in one error and in what inspect lists.
			editSpec(t, good, evil, func(spec *specs.Spec) {
				for _, tc := range asks {
					tc.change(spec)
				}
				spec.Hooks = &specs.Hooks{CreateRuntime: hook}
			})
			_, err := s.StasisErr("restore", evil, "r")
			var listed struct {
				AsksFor []struct{ Field, What, Verdict, Flag string } `json:"asks_for"`
			}
			must(t, json.Unmarshal([]byte(s.Stasis("inspect", evil, "-o", "json")), &listed))
			for name, tc := range asks {
				if name == "processes of init" || name == "all devices" { // which others have undone
					continue
				}
				if !strings.Contains(fmt.Sprint(err), tc.says) {
					t.Errorf("no %s in %v", tc.says, err)
				}
				if strings.HasPrefix(tc.says, "--") && !slices.ContainsFunc(listed.AsksFor, func(a struct{ Field, What, Verdict, Flag string }) bool { return a.Flag == tc.says }) {
					t.Errorf("inspect lists no %s in %+v", tc.says, listed.AsksFor)
				}
			}
			if a := listed.AsksFor; len(a) == 0 || a[0].Field != "hooks.createRuntime[0]" || a[0].Verdict != "left out" {
				t.Errorf("inspect lists %+v", a)
			}
			if did, err := os.ReadFile(touched); err == nil {
				t.Errorf("the author ran code on the host: %s", did)
			}
		})
	}
}

// TestGrantedSpec restores a container that has more than others: with the flags
// that the refusal names, pasted into a shell, and with --privileged.
func TestGrantedSpec(t *testing.T) {
	t.Parallel()
	for name, opts := range map[string]stack.Options{"runc": {NoGrants: true}, "crun": {NoGrants: true, Crun: true, KnownLeaks: crunCache}} {
		t.Run(name, func(t *testing.T) {
			s := stack.Start(t, opts)
			ctx := s.Ctx()
			data := filepath.Join(s.Dir, "it's data")
			must(t, os.Mkdir(data, 0o755))
			must(t, os.WriteFile(filepath.Join(data, "file"), []byte("the host's\n"), 0o644))
			c := s.NewContainer(ctx, "c", stack.Busybox, stack.Args("sleep", "1000"),
				oci.WithAddedCapabilities([]string{"CAP_SYS_PTRACE", "CAP_NET_ADMIN"}),
				oci.WithMounts([]specs.Mount{{Destination: "/data", Type: "bind", Source: data, Options: []string{"rbind", "ro"}}}),
				oci.WithNewPrivileges, oci.WithMaskedPaths(nil), oci.WithReadonlyPaths(nil),
				oci.WithDevices("/dev/kmsg", "", "rw"), oci.WithHostNamespace(specs.NetworkNamespace))
			c.Start(ctx)
			own, file := "stasis.test/own:1", filepath.Join(s.Dir, "c.tar")
			s.Stasis("checkpoint", "c", own)
			s.Stasis("checkpoint", "c", "--exit", "--output", file, "--format", "archive", "--compress", "none")
			c.Wait(ctx)
			was, err := c.Spec(ctx)
			must(t, err)
			c.Delete(ctx)

			// What this node has made gets what it had.
			s.Stasis("restore", own, "r")
			r := load(t, s, "r")
			is, err := r.Spec(ctx)
			must(t, err)
			if !slices.Equal(is.Process.Capabilities.Bounding, was.Process.Capabilities.Bounding) || is.Process.NoNewPrivileges || is.Linux.Seccomp != nil ||
				!slices.ContainsFunc(is.Mounts, func(m specs.Mount) bool { return m.Source == data }) {
				t.Errorf("own checkpoint: %+v", is.Process)
			}
			r.Kill(ctx, syscall.SIGKILL)
			r.Delete(ctx)
			// But not what comes from elsewhere with its signature: another may have
			// changed its files.
			s.Stasis("convert", own, "stasis.test/copy:1", "--format", "podman")
			if _, err := s.StasisErr("restore", "stasis.test/copy:1", "r"); err == nil || !strings.Contains(err.Error(), "--allow-seccomp unconfined") {
				t.Errorf("an own checkpoint in another image: %v", err)
			}
			_, err = s.StasisErr("restore", file, "r")
			if err == nil {
				t.Fatal("restored without a flag")
			}
			_, flags, ok := strings.Cut(err.Error(), "add: ")
			flags = strings.TrimSpace(flags)
			for _, flag := range []string{
				"--allow-capability CAP_NET_ADMIN", "--allow-capability CAP_SYS_PTRACE", ":/data'", "--allow-new-privs", "--allow-unmask all",
				"--allow-device /dev/kmsg", "--allow-host network", "--allow-seccomp unconfined", "--cgroup-parent ",
			} {
				if !ok || !strings.Contains(flags, flag) {
					t.Fatalf("no %s in %v", flag, err)
				}
			}
			for name, flags := range map[string]string{"flags": flags, "privileged": "--privileged"} {
				words, err := exec.Command("sh", "-c", `printf '%s\0' `+flags).Output()
				must(t, err)
				cmd := s.StasisCommand(append([]string{"restore", file, "r"}, strings.Split(strings.TrimSuffix(string(words), "\x00"), "\x00")...)...)
				var errs strings.Builder
				cmd.Stderr = &errs
				if err := cmd.Run(); err != nil {
					t.Fatalf("%s: %v, %s", name, err, errs.String())
				}
				if (name == "privileged") != (strings.Contains(errs.String(), "WARNING: --privileged") && strings.Contains(errs.String(), "CAP_SYS_PTRACE")) {
					t.Errorf("%s: it says %s", name, errs.String())
				}
				r := load(t, s, "r")
				if out := r.Exec(ctx, "cat", "/data/file"); out != "the host's\n" {
					t.Errorf("%s: the mount has %q", name, out)
				}
				r.Exec(ctx, "ls", "/dev/kmsg")
				spec, err := r.Spec(ctx)
				must(t, err)
				if spec.Linux.CgroupsPath != s.CgroupPath("r") || !slices.Contains(spec.Process.Capabilities.Bounding, "CAP_NET_ADMIN") {
					t.Errorf("%s: %+v", name, spec.Linux)
				}
				r.Kill(ctx, syscall.SIGKILL)
				r.Delete(ctx)
			}
			checkTidy(t, s)
		})
	}
}

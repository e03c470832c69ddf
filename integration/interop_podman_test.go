package integration

import (
	"context"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	imagearchive "github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/containerd/v2/pkg/oci"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/archive"
	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/rootfs"
	"github.com/stasis-run/stasis/integration/stack"
)

// tool returns the path of a program that contrib/setup.sh installs.
func tool(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatalf("%v: run contrib/setup.sh, then eval \"$(contrib/setup.sh --env)\"", err)
	}
	return path
}

// podman is a Podman with containers and images of its own, in the folder of a
// stack.
type podman struct {
	t       *testing.T
	s       *stack.Stack
	program string
	flags   []string
}

func newPodman(t *testing.T, s *stack.Stack) *podman {
	t.Helper()
	dir := filepath.Join(s.Dir, "podman")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	p := &podman{t, s, tool(t, "podman"), []string{
		"--root", filepath.Join(dir, "root"), "--runroot", filepath.Join(dir, "run"), "--tmpdir", filepath.Join(dir, "tmp")}}
	t.Cleanup(func() {
		p.command(context.Background(), "rm", "--all", "--force", "--time=0").Run()
		// Podman mounts it onto itself and leaves it so.
		overlay := filepath.Join(dir, "root", "overlay")
		if err := unix.Unmount(overlay, 0); err != nil && err != unix.EINVAL && err != unix.ENOENT {
			t.Errorf("umount %s: %v", overlay, err)
		}
	})
	return p
}

func (p *podman) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, p.program, append(p.flags, args...)...)
	// By these the stack finds what is left of it.
	cmd.Env = append(os.Environ(), "STASIS_TEST_ID="+p.s.ID, "TMPDIR="+p.s.TempDir())
	return cmd
}

// run runs a command of Podman's and returns what it wrote on stdout.
func (p *podman) run(args ...string) string {
	p.t.Helper()
	cmd := p.command(p.s.Ctx(), args...)
	out, err := cmd.Output()
	if err != nil {
		var stderr []byte
		if exit, ok := err.(*exec.ExitError); ok {
			stderr = exit.Stderr
		}
		for _, log := range []string{"dump.log", "restore.log"} {
			logs, _ := filepath.Glob(filepath.Join(p.s.Dir, "podman/root/overlay-containers/*/userdata", log))
			for _, log := range logs {
				criu, _ := exec.Command("tail", "-n", "15", log).Output()
				p.t.Logf("%s:\n%s", log, criu)
			}
		}
		p.t.Fatalf("podman %q: %v\n%s%s", args, err, out, stderr)
	}
	return string(out)
}

// load gives Podman an image of the stack's, with the same ID.
func (p *podman) load(ctx context.Context, name string) {
	p.t.Helper()
	p.s.Image(ctx, name)
	file := filepath.Join(p.s.Dir, "image.tar")
	f, err := os.Create(file)
	if err != nil {
		p.t.Fatal(err)
	}
	defer os.Remove(file)
	err = p.s.Client().Export(ctx, f, imagearchive.WithImage(p.s.Client().ImageService(), name))
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		p.t.Fatal(err)
	}
	p.run("load", "--quiet", "--input", file)
}

// probe asks the probe in a container of Podman's to check all its items.
func (p *podman) probe(name string) stack.ProbeReport {
	p.t.Helper()
	var report stack.ProbeReport
	out := p.run("exec", name, "/probe", "check")
	if err := json.Unmarshal([]byte(out), &report); err != nil {
		p.t.Fatalf("probe check: %v\n%s", err, out)
	}
	if err := report.Err(); err != nil {
		p.t.Errorf("%s in Podman: %v", name, err)
	}
	return report
}

// TestArchiveOfPodman restores archives that Podman has exported.
func TestArchiveOfPodman(t *testing.T) {
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	p := newPodman(t, s)
	p.load(ctx, stack.Probe)
	// Below /dev/shm is something that Podman mounts from outside.
	p.run("run", "--detach", "--name", "probe", "--network", "none", stack.Probe, "/probe", "run", "-skip", "tcp,listen,udp")
	s.Poll(ctx, "the probe in Podman", func() bool { return strings.Contains(p.run("logs", "probe"), "ready\n") })
	p.run("exec", "probe", "sh", "-c", "mkdir /new && echo new >/new/file && rm /etc/group && rm -r /var/tmp && echo shared >/dev/shm/file")
	for name := range compressions {
		t.Run(name, func(t *testing.T) {
			p.t = t
			before := p.probe("probe")
			file := filepath.Join(s.Dir, name+".tar")
			p.run("container", "checkpoint", "--leave-running", "--file-locks", "--compress", name, "--export", file, "probe")
			checkSame(t, before, p.probe("probe"))

			f, err := os.Open(file)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			dir := filepath.Join(s.Dir, "podman-"+name)
			taken, err := archive.Read(ctx, f, dir, archive.Limits{})
			if err != nil {
				t.Fatal(err)
			}
			i := taken.Info
			if i.ContainerName != "probe" || i.Base.Name != stack.Probe || i.Engine.Name != "podman" || i.OCIRuntime.Name != "runc" {
				t.Errorf("info %+v", i)
			}
			c := s.NewContainer(ctx, "from-"+name, stack.Probe, specOf(t, taken, dir))
			if err := c.Create(ctx, client.WithRestoreImagePath(taken.Images)); err != nil {
				t.Fatal(err)
			}
			applyLayer(ctx, t, taken.Layer, filepath.Join(c.Bundle(), "rootfs"))
			if err := c.Task.Start(ctx); err != nil {
				t.Fatalf("%v\n%s", err, c.CRIULog("restore", taken.Images))
			}
			checkSame(t, before, c.Probe(ctx))
			out := c.Exec(ctx, "sh", "-c", "cat /new/file /dev/shm/file; ls -d /etc/group /var/tmp 2>/dev/null || true")
			if out != "new\nshared\n" {
				t.Errorf("the root filesystem is %q", out)
			}
			c.Kill(ctx, syscall.SIGKILL)
			c.Delete(ctx)
		})
	}
}

// specOf makes a container have the spec of a capture, with namespaces of its
// own, and what was mounted from the host replaced by what is in the archive, or
// by nothing.
func specOf(t *testing.T, taken *capture.Capture, dir string) oci.SpecOpts {
	t.Helper()
	var spec specs.Spec
	if err := json.Unmarshal(taken.Spec, &spec); err != nil {
		t.Fatal(err)
	}
	for i := range spec.Linux.Namespaces {
		spec.Linux.Namespaces[i].Path = ""
	}
	for i, m := range spec.Mounts {
		if m.Type != "bind" {
			continue
		}
		source := filepath.Join(dir, "mounts", strings.ReplaceAll(m.Destination, "/", "_"))
		err := os.MkdirAll(filepath.Dir(source), 0o755)
		if err == nil && m.Destination == "/dev/shm" {
			err = os.Mkdir(source, 0o777)
			if f, ferr := os.Open(filepath.Join(dir, "devshm-checkpoint.tar")); err == nil && ferr == nil {
				_, err = rootfs.Apply(t.Context(), source, f)
				f.Close()
			}
		} else if err == nil {
			err = os.WriteFile(source, nil, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
		spec.Mounts[i].Source = source
	}
	return func(_ context.Context, _ oci.Client, _ *containers.Container, s *oci.Spec) error {
		spec.Root, spec.Linux.CgroupsPath = s.Root, s.Linux.CgroupsPath
		*s = spec
		return nil
	}
}

// applyLayer applies a layer to a root filesystem.
func applyLayer(ctx context.Context, t *testing.T, layer capture.Layer, root string) {
	t.Helper()
	if layer == nil {
		t.Fatal("no layer")
	}
	r, w := io.Pipe()
	defer r.Close()
	go func() { w.CloseWithError(layer.WriteLayer(ctx, w)) }()
	if _, err := rootfs.Apply(ctx, root, r); err != nil {
		t.Fatal(err)
	}
}

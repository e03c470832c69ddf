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

	"github.com/containerd/containerd/v2/core/containers"
	imagearchive "github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/oci"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/layout"
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
		for _, log := range []string{layout.DumpLog, layout.RestoreLog} {
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
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	p := newPodman(t, s)
	p.load(ctx, stack.Probe)
	// Below /dev/shm is something that Podman mounts from outside.
	p.run("run", "--detach", "--name", "probe", "--network", "none", stack.Probe, "/probe", "run", "-skip", "tcp,listen,udp")
	s.Poll(ctx, "the probe in Podman", func() bool { return strings.Contains(p.run("logs", "probe"), "ready\n") })
	p.run("exec", "probe", "sh", "-c", "mkdir /new && echo new >/new/file && rm /etc/group && rm -r /var/tmp && echo shared >/dev/shm/file")
	before := p.probe("probe")
	files := map[string]string{}
	for name := range compressions {
		files[name] = filepath.Join(s.Dir, name+".tar")
		p.run("container", "checkpoint", "--leave-running", "--file-locks", "--compress", name, "--export", files[name], "probe")
		checkSame(t, before, p.probe("probe"))
	}
	// As on another host, where nothing is that Podman had mounted.
	p.run("rm", "--force", "--time=0", "probe")
	for name, file := range files {
		t.Run(name, func(t *testing.T) {
			c := restoreForeign(ctx, t, s, file, "from-"+name, ofPodman...)
			checkSame(t, before, c.Probe(ctx))
			if out := c.Exec(ctx, "sh", "-c", podmanFiles); out != podmanFilesAre {
				t.Errorf("the files are %q", out)
			}
			labels, err := c.Labels(ctx)
			must(t, err)
			if labels["stasis.run/restored-from"] == "" {
				t.Errorf("labels %v", labels)
			}
			c.Kill(ctx, syscall.SIGKILL)
			c.Delete(ctx)
		})
	}
	checkNoFiles(ctx, t, s)
	checkTidy(t, s)
}

// podmanFiles looks at what was changed, deleted, in /dev/shm, and at what Podman
// mounts, after a restore by Stasis.
const (
	podmanFiles = "cat /new/file /dev/shm/file; ls -d /etc/group /var/tmp 2>/dev/null; " +
		"stat -c '%a %n' /dev/shm /etc/hosts /etc/hostname /run/.containerenv; grep -c localhost /etc/hosts; true"
	podmanFilesAre = "new\nshared\n1777 /dev/shm\n644 /etc/hosts\n644 /etc/hostname\n644 /run/.containerenv\n2\n"
)

// checkNoFiles looks for what `stasis restore` made for containers that are
// deleted by now.
func checkNoFiles(ctx context.Context, t *testing.T, s *stack.Stack) {
	t.Helper()
	collect(ctx, t, s)
	must(t, s.Client().SnapshotService("overlayfs").Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		if strings.Contains(i.Name, "-files-") {
			t.Errorf("snapshot %s is left", i.Name)
		}
		return nil
	}))
}

// ofPodman grants what Podman's containers have by default, besides a seccomp
// profile of their own.
var ofPodman = []string{"--allow-new-privs"}

// restoreForeign has `stasis restore` restore what another program made.
func restoreForeign(ctx context.Context, t *testing.T, s *stack.Stack, from, name string, flags ...string) *stack.Container {
	t.Helper()
	if out := s.Stasis(append([]string{"restore", from, name}, flags...)...); out != name+"\n" {
		t.Errorf("restore %s printed %q", from, out)
	}
	container, err := s.Client().LoadContainer(ctx, name)
	must(t, err)
	c := s.Wrap(container)
	c.Load(ctx)
	return c
}

// TestRestoreImageOfPodman has `stasis restore` restore a checkpoint image of
// Podman's, from a file and from a registry.
func TestRestoreImageOfPodman(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	p := newPodman(t, s)
	p.load(ctx, stack.Probe)
	p.run("run", "--detach", "--name", "probe", "--network", "none", stack.Probe, "/probe", "run", "-skip", "tcp,listen,udp")
	s.Poll(ctx, "the probe in Podman", func() bool { return strings.Contains(p.run("logs", "probe"), "ready\n") })
	p.run("exec", "probe", "sh", "-c", "mkdir /new && echo new >/new/file && rm /etc/group && rm -r /var/tmp && echo shared >/dev/shm/file")
	before := p.probe("probe")
	reg := startRegistry(t, s, registryConfig{})
	ref := reg.host + "/of-podman:1"
	withPolicy(t, p).run("container", "checkpoint", "--file-locks", "--create-image", ref, "probe")
	file := filepath.Join(s.Dir, "of-podman.tar")
	p.run("save", "--quiet", "--format", "oci-archive", "--output", file, ref)
	p.run("push", "--quiet", "--tls-verify=false", ref)
	p.run("rm", "--force", "--time=0", "probe")
	const imported = "stasis.test/imported:1"
	// Podman gives it no name in the file.
	if out := s.Stasis("import", file); !strings.HasPrefix(out, "localhost/probe:") {
		t.Errorf("import without a name printed %q", out)
	}
	if out := s.Stasis("import", file, imported); out != imported+"\n" {
		t.Errorf("import printed %q", out)
	}
	const converted, again = "stasis.test/converted:1", "again.tar"
	s.Stasis("convert", imported, filepath.Join(s.Dir, again), "--format", "archive", "--compress", "none")
	s.Stasis("convert", filepath.Join(s.Dir, again), converted)
	for id, from := range map[string]string{"from-file": imported, "from-registry": ref, "converted": converted} {
		c := restoreForeign(ctx, t, s, from, id, ofPodman...)
		checkSame(t, before, c.Probe(ctx))
		if out := c.Exec(ctx, "sh", "-c", podmanFiles); out != podmanFilesAre {
			t.Errorf("%s: the files are %q", id, out)
		}
		c.Kill(ctx, syscall.SIGKILL)
		c.Delete(ctx)
	}
	checkNoFiles(ctx, t, s)
}

// TestPodmanRestores has Podman restore what `stasis checkpoint` writes for it:
// an archive, and an image that travels as an OCI layout and through a registry.
func TestPodmanRestores(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	p := newPodman(t, s)
	p.load(ctx, stack.Probe)
	// Under Podman loopback is down after a restore.
	c := startProbe(ctx, s, "probe", stack.ProbeArgs("-skip", "tcp,listen,udp"))
	c.Exec(ctx, "sh", "-c", "echo new >/new && rm /etc/group")
	before := c.Probe(ctx)
	const ref = "stasis.test/for-podman:1"
	pushed := startRegistry(t, s, registryConfig{}).host + "/for-podman:1"
	file, layout := filepath.Join(s.Dir, "for-podman.tar"), filepath.Join(s.Dir, "layout.tar")
	s.Stasis("checkpoint", "probe", "--output", file, "--format", "archive", "--file-locks")
	s.Stasis("checkpoint", "probe", ref, "--format", "podman", "--file-locks", "--exit")
	s.Stasis("export", ref, layout, "--format", "oci")
	s.Stasis("push", ref, pushed)
	c.Wait(ctx)
	c.Delete(ctx)
	p.run("load", "--quiet", "--input", layout)
	p.run("pull", "--quiet", "--tls-verify=false", pushed)
	for _, args := range [][]string{{"--import", file}, {ref}, {pushed}} {
		p.run(append([]string{"container", "restore", "--file-locks"}, args...)...)
		checkSame(t, before, p.probe("probe"))
		if out := p.run("exec", "probe", "sh", "-c", "cat /new; ls -d /etc/group 2>/dev/null || true"); out != "new\n" {
			t.Errorf("%v: the root filesystem in Podman: %q", args, out)
		}
		p.run("rm", "--force", "--time=0", "probe")
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

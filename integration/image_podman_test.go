package integration

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/archive/compression"

	"github.com/stasis-run/stasis/checkpoint/oci"
	"github.com/stasis-run/stasis/integration/stack"
)

// TestImageForPodman has Podman restore a checkpoint image of ours.
func TestImageForPodman(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	p := newPodman(t, s)
	p.load(ctx, stack.Probe)
	// Under Podman loopback is down after a restore.
	c := startProbe(ctx, s, "probe", stack.ProbeArgs("-skip", "tcp,listen,udp"))
	c.Exec(ctx, "sh", "-c", "echo new >/new && rm /etc/group")
	before := c.Probe(ctx)
	images := filepath.Join(s.Dir, "images")
	c.Checkpoint(ctx, images, &options.CheckpointOptions{Exit: true, FileLocks: true})
	taken := captureOf(ctx, t, s, c, images)
	const ref = "stasis.test/for-podman:1"
	saveImage(ctx, t, s, ref, oci.Podman, "", taken, compression.Gzip)
	p.load(ctx, ref)

	var inspected []struct{ Annotations map[string]string }
	if err := json.Unmarshal([]byte(p.run("image", "inspect", ref)), &inspected); err != nil {
		t.Fatal(err)
	}
	podmans := 0
	for key := range inspected[0].Annotations {
		if strings.HasPrefix(key, "io.podman.annotations.checkpoint.") {
			podmans++
		}
	}
	if name := inspected[0].Annotations["org.criu.checkpoint.container.name"]; podmans != 14 || name != "probe" {
		t.Errorf("Podman sees %v", inspected[0].Annotations)
	}
	p.run("container", "restore", "--file-locks", ref)
	checkSame(t, before, p.probe("probe"))
	if out := p.run("exec", "probe", "sh", "-c", "cat /new; ls -d /etc/group 2>/dev/null || true"); out != "new\n" {
		t.Errorf("the root filesystem in Podman: %q", out)
	}
	p.run("rm", "--force", "--time=0", "probe")
	c.Delete(ctx)
}

// TestImageOfPodman restores a checkpoint image that Podman has made.
func TestImageOfPodman(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	p := newPodman(t, s)
	p.load(ctx, stack.Probe)
	p.run("run", "--detach", "--name", "probe", "--network", "none", stack.Probe, "/probe", "run", "-skip", "tcp,listen,udp")
	s.Poll(ctx, "the probe in Podman", func() bool { return strings.Contains(p.run("logs", "probe"), "ready\n") })
	before := p.probe("probe")
	const ref = "stasis.test/of-podman:1"
	withPolicy(t, p).run("container", "checkpoint", "--file-locks", "--create-image", ref, "probe")
	file := filepath.Join(s.Dir, "of-podman.tar")
	p.run("save", "--quiet", "--format", "oci-archive", "--output", file, ref)
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := s.Client().Import(ctx, f, client.WithIndexName(ref)); err != nil {
		t.Fatal(err)
	}

	img, err := s.Client().GetImage(ctx, ref)
	if err != nil {
		t.Fatal(err)
	}
	summary, err := oci.ReadInfo(ctx, s.Client().ContentStore(), img.Target())
	if err != nil || summary.Info.ContainerName != "probe" || summary.Info.Engine.Name != "podman" || summary.Info.Base.Name != stack.Probe {
		t.Errorf("%+v, %v", summary, err)
	}
	taken := readImage(ctx, t, s, ref, oci.Podman)
	c := s.NewContainer(ctx, "from-podman", stack.Probe, specOf(t, taken, filepath.Dir(taken.Images)))
	if err := c.Create(ctx, client.WithRestoreImagePath(taken.Images)); err != nil {
		t.Fatal(err)
	}
	applyLayer(ctx, t, taken.Layer, filepath.Join(c.Bundle(), "rootfs"))
	if err := c.Task.Start(ctx); err != nil {
		t.Fatalf("%v\n%s", err, c.CRIULog("restore", taken.Images))
	}
	checkSame(t, before, c.Probe(ctx))
	c.Kill(ctx, syscall.SIGKILL)
	c.Delete(ctx)
}

// withPolicy returns a Podman that sees an /etc/containers/policy.json, by which
// it asks itself, when it is root, whether it may make an image. No flag and no
// variable tells it another place. What is mounted is so for its processes only.
func withPolicy(t *testing.T, p *podman) *podman {
	t.Helper()
	dir := filepath.Join(p.s.Dir, "etc")
	policy := filepath.Join(dir, "upper/containers/policy.json")
	script := filepath.Join(dir, "podman")
	for path, text := range map[string]string{
		policy: `{"default":[{"type":"insecureAcceptAnything"}]}`,
		script: "#!/bin/sh\nmount -t overlay -o lowerdir=/etc,upperdir='" + dir + "/upper',workdir='" + dir + "/work' overlay /etc && " +
			"exec '" + p.program + "' \"$@\"\n",
	} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "work"), 0o755); err != nil {
		t.Fatal(err)
	}
	return &podman{p.t, p.s, tool(t, "unshare"), append([]string{"--mount", script}, p.flags...)}
}

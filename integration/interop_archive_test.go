package integration

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/pkg/archive/compression"

	"github.com/stasis-run/stasis/checkpoint/archive"
	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/checkpoint/rootfs"
	"github.com/stasis-run/stasis/integration/stack"
)

var compressions = map[string]compression.Compression{
	"none": compression.Uncompressed, "gzip": compression.Gzip, "zstd": compression.Zstd,
}

// captureOf makes a capture of a container whose checkpoint is in the folder
// images.
func captureOf(ctx context.Context, t *testing.T, s *stack.Stack, c *stack.Container, images string) *capture.Capture {
	t.Helper()
	info, err := c.Info(ctx)
	if err != nil {
		t.Fatal(err)
	}
	img, err := c.Image(ctx)
	if err != nil {
		t.Fatal(err)
	}
	config, err := img.Config(ctx)
	if err != nil {
		t.Fatal(err)
	}
	mounts, err := s.Client().SnapshotService(info.Snapshotter).Mounts(ctx, info.SnapshotKey)
	if err != nil {
		t.Fatal(err)
	}
	var layer rootfs.OverlayLayer
	for _, option := range mounts[0].Options {
		if dir, ok := strings.CutPrefix(option, "upperdir="); ok {
			layer.Upper = dir
		} else if dirs, ok := strings.CutPrefix(option, "lowerdir="); ok {
			layer.Lower = strings.Split(dirs, ":")
		}
	}
	return &capture.Capture{
		Info: capture.Info{
			Version:       1,
			ContainerID:   c.ID(),
			ContainerName: c.ID(),
			Namespace:     s.Namespace,
			Base: capture.Base{
				Name: img.Name(), Digest: img.Target().Digest.String(), Config: config.Digest.String(), Snapshotter: info.Snapshotter,
			},
			Runtime:    info.Runtime.Name,
			OCIRuntime: capture.Program{Name: "runc", Version: "1.5.2"},
			Engine:     capture.Program{Name: "stasis", Version: "test"},
			Created:    info.CreatedAt,
		},
		Spec:   info.Spec.GetValue(),
		Images: images,
		Layer:  layer,
	}
}

// writeArchive writes the archive of a capture into a file.
func writeArchive(ctx context.Context, t *testing.T, file string, c *capture.Capture, comp compression.Compression) {
	t.Helper()
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := archive.Write(ctx, f, c, comp); err != nil {
		t.Fatal(err)
	}
}

// TestArchiveForOthers has checkpointctl show an archive of ours, and Podman
// restore it.
func TestArchiveForOthers(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	p := newPodman(t, s)
	p.load(ctx, stack.Probe)
	// Under Podman loopback is down after a restore, and checkpointctl looks for
	// the memory of zombies, too.
	c := startProbe(ctx, s, "probe", stack.ProbeArgs("-skip", "tcp,listen,udp,zombie"))
	c.Exec(ctx, "sh", "-c", "mkdir /new && echo new >/new/file && rm /etc/group && rm -r /var/tmp")
	before := c.Probe(ctx)
	images := filepath.Join(s.Dir, "images")
	work := filepath.Join(s.Dir, "work")
	c.Checkpoint(ctx, images, &options.CheckpointOptions{Exit: true, FileLocks: true, WorkPath: work})
	for _, name := range []string{layout.DumpStats, layout.DumpLog} {
		if err := os.Rename(filepath.Join(work, name), filepath.Join(images, name)); err != nil {
			t.Fatal(err)
		}
	}
	taken := captureOf(ctx, t, s, c, images)
	for name, comp := range compressions {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(s.Dir, name+".tar")
			writeArchive(ctx, t, file, taken, comp)
			checkpointctl(ctx, t, []string{"show", file}, "probe", stack.Probe, "runc", "containerd")
			checkpointctl(ctx, t, []string{"inspect", "--all", file}, "probe", stack.Probe, "runc", "containerd",
				"Memory pages size: ", "Root FS diff size: ", "Frozen time: ", "Process tree", "/var/probe/file", "Destination: /proc")
			p.t = t
			p.run("container", "restore", "--import", file, "--file-locks")
			checkSame(t, before, p.probe("probe"))
			if out := p.run("exec", "probe", "sh", "-c", "cat /new/file; ls -d /etc/group /var/tmp 2>/dev/null || true"); out != "new\n" {
				t.Errorf("the root filesystem in Podman: %q", out)
			}
			p.run("rm", "--force", "--time=0", "probe")
		})
	}
	c.Delete(ctx)
}

// checkpointctl runs that program, which has to tell all of want.
func checkpointctl(ctx context.Context, t *testing.T, args []string, want ...string) {
	t.Helper()
	out, err := exec.CommandContext(ctx, tool(t, "checkpointctl"), args...).CombinedOutput()
	if err != nil {
		t.Fatalf("checkpointctl %v: %v\n%s", args, err, out)
	}
	for _, want := range want {
		if !strings.Contains(string(out), want) {
			t.Errorf("checkpointctl %v does not tell %q:\n%s", args, want, out)
		}
	}
}

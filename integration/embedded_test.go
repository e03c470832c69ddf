package integration

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"

	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/integration/stack"
)

// TestEmbeddedAgain starts a container from an image with a checkpoint more than
// once: after a restore that failed it is restored, after one that was done it
// starts afresh on its files, and after one of which nobody knows it is refused.
func TestEmbeddedAgain(t *testing.T) {
	t.Parallel()
	for _, snapshotter := range []string{"overlayfs", "native", "erofs", "blockfile"} {
		t.Run(snapshotter, func(t *testing.T) {
			// What a killed shim's runtime leaves.
			s := stack.Start(t, stack.Options{Snapshotter: snapshotter, KnownLeaks: []string{"runc-process"}})
			ctx := s.Ctx()
			f := s.Faults()
			c := s.NewContainer(ctx, "c", stack.Busybox, stack.Args("sh", "-c", "echo start >> /starts; exec sleep 1000"))
			c.Start(ctx)
			s.Poll(ctx, "the file", func() bool { r, err := c.ExecErr(ctx, "cat", "/starts"); return err == nil && r.Code == 0 })
			spec, err := c.Spec(ctx)
			must(t, err)
			ref := strings.TrimSpace(s.Stasis("checkpoint", "c", "--exit"))
			c.Wait(ctx)
			c.Delete(ctx)
			record, err := s.Client().GetImage(ctx, ref)
			must(t, err)
			must(t, record.Unpack(ctx, snapshotter))
			made := func(id string) *stack.Container {
				spec.Linux.CgroupsPath = s.CgroupPath(id)
				container, err := s.Client().NewContainer(ctx, id, client.WithImage(record), client.WithSnapshotter(snapshotter),
					client.WithNewSnapshot(id, record), client.WithSpec(spec), client.WithRuntime(s.Runtime(), s.RuncOptions("")))
				must(t, err)
				return s.Wrap(container)
			}
			starts := func(d *stack.Container) int {
				return strings.Count(d.Exec(ctx, "cat", "/starts"), "start")
			}
			end := func(d *stack.Container) {
				d.Kill(ctx, syscall.SIGKILL)
				d.DeleteTask(ctx)
			}

			d := made("d")
			f.Fail("restore", stack.Before, "as requested")
			if err := d.StartErr(ctx); err == nil || !strings.Contains(err.Error(), "as requested") {
				t.Fatalf("start: %v", err)
			}
			f.Clear("restore")
			if d.Task != nil {
				d.DeleteTask(ctx)
			}
			d.Start(ctx)
			if n := starts(d); n != 1 {
				t.Errorf("restored: it has started %d times", n)
			}
			end(d)
			d.Start(ctx)
			s.Poll(ctx, "a start afresh", func() bool { return starts(d) == 2 })
			if out := d.Exec(ctx, "sh", "-c", "ls -a / | grep -x .stasis; true"); out != "" {
				t.Errorf("the container sees %q", out)
			}
			end(d)
			d.Delete(ctx)

			e := made("e")
			f.KillShim("restore", stack.After)
			if err := e.StartErr(ctx); err == nil {
				t.Fatal("started without a shim")
			}
			f.Clear("restore")
			// Until containerd has cleaned up after the shim, the old task is there.
			var again error
			s.Poll(ctx, "containerd to clean up", func() bool {
				e.Task = nil
				again = e.StartErr(ctx)
				return !errdefs.IsAlreadyExists(again)
			})
			if again == nil || !strings.Contains(again.Error(), "cut short") {
				t.Errorf("start after a restore that was cut short: %v", again)
			}
			e.Task = nil
			e.Delete(ctx)
			// What containerd's mount manager has made for a task whose shim was
			// killed goes with the container, as garbage.
			collect(ctx, t, s)
		})
	}
}

// TestEmbeddedDamaged starts a container whose root filesystem is no folder of the
// host's, where the checkpoint is found only when it is mounted, and cannot be
// read. That is refused, and the shim's other containers do not notice.
func TestEmbeddedDamaged(t *testing.T) {
	t.Parallel()
	sh := startShim(t, stack.Options{})
	tree, disk := filepath.Join(sh.s.Dir, "tree"), filepath.Join(sh.s.Dir, "disk")
	must(t, os.MkdirAll(filepath.Join(tree, layout.EmbeddedImages), 0o700))
	must(t, os.WriteFile(filepath.Join(tree, layout.EmbeddedInfo), []byte(`{"version":1}`), 0o600))
	must(t, os.WriteFile(disk, nil, 0o600))
	must(t, os.Truncate(disk, 8<<20))
	if out, err := exec.Command("mkfs.ext4", "-q", "-d", tree, disk).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v: %s (apt-get install e2fsprogs)", err, out)
	}
	r := sh.createRequest("c")
	r.Rootfs = []*types.Mount{{Type: "ext4", Source: disk, Options: []string{"loop", "ro"}}}
	_, err := sh.Create(sh.ctx, r)
	if err == nil || !strings.Contains(err.Error(), "restore container c from its image") {
		t.Errorf("create: %v", err)
	}
	if _, err := sh.State(sh.ctx, &taskapi.StateRequest{ID: "anchor"}); err != nil {
		t.Errorf("the shim's other container: %v", err)
	}
}

package integration

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/client"
	"golang.org/x/sync/errgroup"

	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/integration/stack"
)

// TestClients checkpoints and restores by the commands of ctr and the calls of
// containerd's Go client, whatever Stasis is called.
func TestClients(t *testing.T) {
	t.Parallel()
	for name, opts := range map[string]stack.Options{
		"stasis":       {},
		"drop-in":      {DropIn: true},
		"1.7":          {Version: "1.7"},
		"1.7, drop-in": {Version: "1.7", DropIn: true},
	} {
		t.Run(name, func(t *testing.T) {
			s := stack.Start(t, opts)
			ctx := s.Ctx()
			// ctr has no flags for what these need.
			c := startProbe(ctx, s, "c", stack.ProbeArgs("-skip", "tcp,flock,fcntl,ofd"))
			last := c.Probe(ctx)
			check := func(c *stack.Container) {
				t.Helper()
				now := c.Probe(ctx)
				checkSame(t, last, now)
				last = now
			}

			// The names of such images tell the second only. And containerd 1.7 fails
			// if it has the container's spec in its content store already.
			const byClient = "stasis.test/task:1"
			forget := func() {
				t.Helper()
				images, err := s.Client().ListImages(ctx)
				if err != nil {
					t.Fatal(err)
				}
				for _, img := range images {
					if strings.HasPrefix(img.Name(), "containerd.io/checkpoint/") || opts.Version == "1.7" && img.Name() == byClient {
						s.Ctr("images", "delete", "--sync", img.Name())
					}
				}
			}

			// Images of a task, as it runs on.
			if ref := s.Ctr("tasks", "checkpoint", "c"); !strings.Contains(s.Ctr("images", "list", "--quiet"), ref) {
				t.Errorf("no image %s", ref)
			}
			check(c)
			forget()
			if _, err := c.Task.Checkpoint(ctx, client.WithCheckpointName(byClient)); err != nil {
				t.Fatal(err)
			}
			check(c)
			noTemporary(t, s)

			// A folder, as it runs on. Under another name than runc's, the client
			// makes an image as well, which is of no use.
			byPath := filepath.Join(s.Dir, "client")
			forget()
			if _, err := c.Task.Checkpoint(ctx, client.WithCheckpointImagePath(byPath)); err != nil {
				t.Fatal(err)
			}
			check(c)

			if entries, err := os.ReadDir(byPath); err != nil || len(entries) == 0 {
				t.Errorf("%s: %v, %v; want a checkpoint", byPath, entries, err)
			}

			// As it ends. ctr 1.7 has options for runc's own shim only.
			if opts.DropIn || opts.Version != "1.7" {
				forget()
				dir, work := filepath.Join(s.Dir, "ctr"), filepath.Join(s.Dir, "work")
				s.Ctr("tasks", "checkpoint", "--exit", "--image-path", dir, "--work-path", work, "c")
				if _, err := os.Stat(filepath.Join(work, layout.DumpLog)); err != nil {
					t.Errorf("work path: %v", err)
				}
				c.Wait(ctx)
				c.DeleteTask(ctx)
				c.Restore(ctx, dir)
				check(c)
			}

			// Container and rootfs.
			forget()
			s.Ctr("containers", "checkpoint", "--rw", "--image", "--task", "c", "stasis.test/container:1")
			check(c)
			c.Kill(ctx, syscall.SIGKILL)
			c.Delete(ctx)
			s.Ctr("containers", "restore", "--rw", "--live", "again", "stasis.test/container:1")
			loaded, err := s.Client().LoadContainer(ctx, "again")
			if err != nil {
				t.Fatal(err)
			}
			again := s.Wrap(loaded)
			again.Load(ctx)
			r, err := again.ProbeErr(ctx)
			if err == nil {
				err = r.Err()
			}
			if err != nil || r.ID != last.ID {
				t.Errorf("restored by ctr: %+v, %v", r, err)
			}
			noTemporary(t, s)
			again.Kill(ctx, syscall.SIGKILL)
			again.Delete(ctx)

			// ctr cannot restore what is made of a task only, as it lacks what the
			// container was made with; the client can.
			if opts.Version == "1.7" {
				return
			}
			img, err := s.Client().GetImage(ctx, byClient)
			if err != nil {
				t.Fatal(err)
			}
			other := s.NewContainer(ctx, "other", stack.Probe)
			err = other.StartErr(ctx, client.WithTaskCheckpoint(img))
			if err == nil || !strings.Contains(err.Error(), "var/probe/") {
				t.Errorf("restored without its files: %v", err)
			}
			other.DeleteTask(ctx)
			noTemporary(t, s)
		})
	}
}

// TestTemporary checks that containerd's copy of a checkpoint, which it forgets,
// is removed, and nothing else.
func TestTemporary(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	c := startProbe(ctx, s, "c", stack.ProbeArgs("-items", "none"))
	img, err := c.Task.Checkpoint(ctx)
	if err != nil {
		t.Fatal(err)
	}
	// Others' that look alike, and a checkpoint that a caller keeps there.
	named := filepath.Join(s.TempDir(), "ctrd-checkpoint123")
	c.Checkpoint(ctx, named, nil)
	c.Kill(ctx, syscall.SIGKILL)
	c.DeleteTask(ctx)
	keep := []string{"ctrd-checkpoint123", "ctrd-checkpoint456", "ctrd-checkpoint789x", "my-ctrd-checkpoint1"}
	for _, name := range keep[1:] {
		if err := os.Mkdir(filepath.Join(s.TempDir(), name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	withCheckpoint := client.WithTaskCheckpoint(img)
	end := func() {
		t.Helper()
		runsOn(t, ctx, c)
		c.Kill(ctx, syscall.SIGKILL)
		c.DeleteTask(ctx)
	}

	t.Run("restored", func(t *testing.T) {
		c.Start(ctx, withCheckpoint)
		noTemporary(t, s, keep...) // while it runs
		end()
	})
	t.Run("never started", func(t *testing.T) {
		if err := c.Create(ctx, withCheckpoint); err != nil {
			t.Fatal(err)
		}
		c.DeleteTask(ctx)
		noTemporary(t, s, keep...)
	})
	t.Run("failed", func(t *testing.T) {
		other := s.NewContainer(ctx, "other", stack.Busybox) // It lacks the program.
		if err := other.StartErr(ctx, withCheckpoint); err == nil {
			t.Fatal("restored")
		}
		other.DeleteTask(ctx)
		noTemporary(t, s, keep...)
	})
	t.Run("by path", func(t *testing.T) {
		for range 2 {
			c.Restore(ctx, named)
			end()
			noTemporary(t, s, keep...)
		}
	})
	for _, name := range keep {
		os.RemoveAll(filepath.Join(s.TempDir(), name))
	}
}

// TestManyAtOnce takes many containers through their lives at the same time.
func TestManyAtOnce(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	watch := watchEvents(t, s)
	const many = 30
	var all []*stack.Container
	for i := range many {
		all = append(all, s.NewContainer(ctx, fmt.Sprint("c", i), stack.Busybox, stack.Args("sleep", "1000")))
	}
	var group errgroup.Group
	for _, c := range all {
		group.Go(func() error {
			if err := wholeLife(ctx, c, filepath.Join(s.Dir, "checkpoints", c.ID())); err != nil {
				return fmt.Errorf("%s: %w", c.ID(), err)
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
	watch.waitFor(ctx, "/tasks/delete", 2*many)
	for _, c := range all {
		got := strings.ReplaceAll(topics(t, watch, c.ID()), "exit checkpointed", "checkpointed exit")
		if want := "create start exec-added exec-started exit checkpointed exit delete create start exec-added exec-started exit exit delete"; got != want {
			t.Errorf("%s: events %s, want %s", c.ID(), got, want)
		}
	}
}

// wholeLife starts a container, checkpoints, restores, kills and deletes it.
func wholeLife(ctx context.Context, c *stack.Container, dir string) error {
	echo := func() error {
		r, err := c.ExecErr(ctx, "echo", c.ID())
		if err == nil && r.Stdout != c.ID()+"\n" {
			err = fmt.Errorf("exec: %+v", r)
		}
		return err
	}
	if err := c.StartErr(ctx); err != nil {
		return err
	}
	if err := echo(); err != nil {
		return err
	}
	if err := c.CheckpointErr(ctx, dir, &options.CheckpointOptions{Exit: true}); err != nil {
		return err
	}
	if err := c.RestoreErr(ctx, dir); err != nil {
		return err
	}
	if err := echo(); err != nil {
		return err
	}
	exit, err := c.Task.Wait(ctx)
	if err != nil {
		return err
	}
	if err := c.Task.Kill(ctx, syscall.SIGKILL); err != nil {
		return err
	}
	if status := <-exit; status.Error() != nil || status.ExitCode() != 137 {
		return fmt.Errorf("exit code %d, %v; want 137", status.ExitCode(), status.Error())
	}
	if _, err := c.Task.Delete(ctx); err != nil {
		return err
	}
	return c.Container.Delete(ctx, client.WithSnapshotCleanup)
}

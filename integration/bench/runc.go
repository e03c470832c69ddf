package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/oci"

	"github.com/stasis-run/stasis/integration/stack"
)

// bundle is a container that runc runs by itself. Spec, snapshot and mounts are
// those that a shim would have been given.
type bundle struct {
	b    *bench
	c    *stack.Container // only for its spec and snapshot; has no task
	id   string
	dir  string
	root string   // of runc's state
	out  *os.File // the container's stdout and stderr; a pipe, as shims give it
}

func (b *bench) newBundle(image string, opts ...oci.SpecOpts) *bundle {
	u := &bundle{b: b, c: b.s.NewContainer(b.ctx, b.name(raw), image, opts...)}
	u.id = u.c.ID()
	u.dir = filepath.Join(b.s.Dir, "bundle-"+u.id)
	u.root = filepath.Join(b.s.Dir, "runc")
	b.tb.Cleanup(u.remove) // whatever happens
	if err := u.prepare(); err != nil {
		b.tb.Fatalf("bundle for runc: %v", err)
	}
	return u
}

func (u *bundle) prepare() error {
	rootfs := filepath.Join(u.dir, "rootfs")
	if err := os.MkdirAll(rootfs, 0o711); err != nil {
		return err
	}
	spec, err := u.c.Spec(u.b.ctx)
	if err != nil {
		return err
	}
	data, err := json.Marshal(spec)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(u.dir, "config.json"), data, 0o600); err != nil {
		return err
	}
	info, err := u.c.Info(u.b.ctx, client.WithoutRefreshedMetadata)
	if err != nil {
		return err
	}
	mounts, err := u.b.s.Client().SnapshotService(info.Snapshotter).Mounts(u.b.ctx, info.SnapshotKey)
	if err != nil {
		return err
	}
	if err := mount.All(mounts, rootfs); err != nil {
		return err
	}
	read, write, err := os.Pipe()
	if err != nil {
		return err
	}
	go func() {
		io.Copy(io.Discard, read)
		read.Close()
	}()
	u.out = write
	return nil
}

// runc runs runc to its end, which must be a good one.
func (u *bundle) runc(args ...string) {
	if err := u.runcErr(args...); err != nil {
		u.b.tb.Fatalf("%v", err)
	}
}

func (u *bundle) runcErr(args ...string) error {
	logFile := filepath.Join(u.dir, "log.json")
	args = append([]string{"--root", u.root, "--log", logFile, "--log-format", "json"}, args...)
	cmd := exec.Command(u.b.s.OCIRuntime(), args...)
	// runc finds criu in it.
	cmd.Env = append(os.Environ(), "PATH="+filepath.Dir(u.b.s.OCIRuntime())+":"+os.Getenv("PATH"))
	cmd.Stdout, cmd.Stderr = u.out, u.out
	if err := cmd.Run(); err != nil {
		log, _ := os.ReadFile(logFile)
		return fmt.Errorf("runc %s: %w\n%s", strings.Join(args, " "), err, log)
	}
	return nil
}

// start starts the container in the background.
func (u *bundle) start() {
	u.runc("run", "--detach", "--bundle", u.dir, "--pid-file", u.pidFile(), u.id)
}

// restore is start from a checkpoint.
func (u *bundle) restore(images string) {
	u.runc("restore", "--detach", "--bundle", u.dir, "--pid-file", u.pidFile(),
		"--image-path", images, "--work-path", u.dir, u.id)
}

// checkpoint dumps the container, which runs on.
func (u *bundle) checkpoint(images string) {
	u.runc("checkpoint", "--leave-running", "--image-path", images, "--work-path", u.dir, u.id)
}

// kill ends the container. On a busy machine runc may be too early for the
// removal of the cgroup.
func (u *bundle) kill() {
	u.b.s.Poll(u.b.ctx, "runc to delete its container", func() bool {
		return u.runcErr("delete", "--force", u.id) == nil
	})
}

func (u *bundle) pidFile() string { return filepath.Join(u.dir, "init.pid") }

func (u *bundle) pid() int {
	data, err := os.ReadFile(u.pidFile())
	if err != nil {
		u.b.tb.Fatalf("%v", err)
	}
	pid, err := strconv.Atoi(string(data))
	if err != nil {
		u.b.tb.Fatalf("%s: %v", u.pidFile(), err)
	}
	return pid
}

// remove removes the container, dead or alive. It may be called again.
func (u *bundle) remove() {
	if u.out == nil {
		return
	}
	u.kill()
	u.out.Close()
	u.out = nil
	if err := mount.UnmountRecursive(filepath.Join(u.dir, "rootfs"), 0); err != nil {
		u.b.tb.Errorf("unmount: %v", err)
	}
	if err := os.RemoveAll(u.dir); err != nil {
		u.b.tb.Errorf("%v", err)
	}
	u.c.Delete(u.b.ctx)
}

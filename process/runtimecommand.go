package process

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"

	"github.com/containerd/containerd/v2/core/mount"
	runc "github.com/containerd/go-runc"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// runtimeCommand is the Runtime that is run as a command, by go-runc. Its errors hold
// the runtime's own last error line.
type runtimeCommand struct {
	id     string
	bundle string
	runc   runc.Runc
	calls  atomic.Uint64
}

// NewRuntime returns the runtime for the container id, whose bundle is given,
// in a containerd namespace. It waits for the runtime's processes by runc.Monitor,
// which in a shim is a Reaper.
func NewRuntime(cfg RuntimeConfig, namespace, bundle, id string) Runtime {
	root := cfg.Root
	if root == "" {
		root = DefaultRuntimeRoot
	}
	return &runtimeCommand{id: id, bundle: bundle, runc: runc.Runc{
		Command:   cfg.Binary,
		LogFormat: runc.JSON,
		// A runtime must not outlive the shim that would hear of its end.
		PdeathSignal:  unix.SIGKILL,
		Root:          filepath.Join(root, namespace),
		SystemdCgroup: cfg.SystemdCgroup,
	}}
}

// call runs fn with a go-runc client that logs to a file of its own, so that
// the error lines of calls that run side by side are not confused.
func (r *runtimeCommand) call(op string, fn func(*runc.Runc) error) error {
	c := r.runc
	c.Log = filepath.Join(r.bundle, "log-"+strconv.FormatUint(r.calls.Add(1), 10)+".json")
	defer os.Remove(c.Log)
	err := fn(&c)
	if err == nil {
		return nil
	}
	return &RuntimeError{Op: op, Msg: lastError(c.Log), Err: err}
}

// lastError returns the last message of level error in a runtime's JSON log.
func lastError(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	msg := ""
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var entry struct{ Level, Msg string }
		if json.Unmarshal(lines.Bytes(), &entry) == nil && entry.Level == "error" {
			msg = strings.TrimSpace(entry.Msg)
		}
	}
	return msg
}

func (r *runtimeCommand) Create(ctx context.Context, opts *runc.CreateOpts) (int, error) {
	opts.PidFile = r.pidFile("init")
	err := r.call("create", func(c *runc.Runc) error { return c.Create(ctx, r.id, r.bundle, opts) })
	if err != nil {
		return 0, err
	}
	return readPid(opts.PidFile)
}

// pidFile is where the runtime leaves a process's pid. There is none yet: runc does not
// write over the temporary file of an earlier try, which it leaves on a full disk.
func (r *runtimeCommand) pidFile(process string) string {
	name := process + ".pid"
	_ = os.Remove(filepath.Join(r.bundle, "."+name)) // of runc (utils_linux.go, createPidFile)
	return filepath.Join(r.bundle, name)
}

// FreezerGroup is what the runtime has noted, "" if it has not. crun does
// (libcrun/status.c), and under systemd makes a group of its own below the scope. runc
// takes the one of the spec.
func (r *runtimeCommand) FreezerGroup() string {
	data, err := os.ReadFile(filepath.Join(r.runc.Root, r.id, "status"))
	if err != nil {
		return ""
	}
	var status struct {
		Group string `json:"cgroup-path"`
	}
	if err := json.Unmarshal(data, &status); err != nil {
		return ""
	}
	return status.Group
}

func (r *runtimeCommand) Start(ctx context.Context) error {
	return r.call("start", func(c *runc.Runc) error { return c.Start(ctx, r.id) })
}

func (r *runtimeCommand) Exec(ctx context.Context, execID string, spec *specs.Process, opts *runc.ExecOpts) (int, error) {
	opts.Detach = true
	opts.PidFile = r.pidFile(execID)
	defer os.Remove(opts.PidFile)
	err := r.call("exec", func(c *runc.Runc) error { return c.Exec(ctx, r.id, *spec, opts) })
	if err != nil {
		return 0, err
	}
	return readPid(opts.PidFile)
}

func (r *runtimeCommand) Kill(ctx context.Context, sig unix.Signal, all bool) error {
	return r.call("kill", func(c *runc.Runc) error {
		return c.Kill(ctx, r.id, int(sig), &runc.KillOpts{All: all})
	})
}

func (r *runtimeCommand) Pause(ctx context.Context) error {
	return r.call("pause", func(c *runc.Runc) error { return c.Pause(ctx, r.id) })
}

func (r *runtimeCommand) Resume(ctx context.Context) error {
	return r.call("resume", func(c *runc.Runc) error { return c.Resume(ctx, r.id) })
}

func (r *runtimeCommand) Update(ctx context.Context, resources *specs.LinuxResources) error {
	return r.call("update", func(c *runc.Runc) error { return c.Update(ctx, r.id, resources) })
}

func (r *runtimeCommand) Delete(ctx context.Context) error {
	err := r.unmountCRIURoot()
	// Where runc and crun keep its state: they would find nothing to do.
	if _, serr := os.Lstat(filepath.Join(r.runc.Root, r.id)); errors.Is(serr, fs.ErrNotExist) {
		return err
	}
	// First without force: with it, runc always waits for a tenth of a second.
	if r.delete(ctx, false) == nil {
		return err
	}
	return errors.Join(err, r.delete(ctx, true))
}

func (r *runtimeCommand) delete(ctx context.Context, force bool) error {
	return r.call("delete", func(c *runc.Runc) error {
		return c.Delete(ctx, r.id, &runc.DeleteOpts{Force: force})
	})
}

// unmountCRIURoot undoes what a restore does that was cut short: the rootfs is
// mounted in the runtime's folder (runc), which can then not be removed, or in
// the bundle (crun), with which it would be emptied.
func (r *runtimeCommand) unmountCRIURoot() error {
	for _, dir := range []string{filepath.Join(r.runc.Root, r.id), r.bundle} {
		root := filepath.Join(dir, "criu-root")
		if _, err := os.Lstat(root); err != nil {
			continue
		}
		if err := mount.UnmountRecursive(root, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount what an unfinished restore has left: %w", err)
		}
		if err := os.Remove(root); err != nil {
			return err
		}
	}
	return nil
}

// Checkpoint has the runtime lead a process group, so that a cancelled dump ends CRIU
// too (see Reaper.Command). CRIU would otherwise go on and hold the container frozen.
func (r *runtimeCommand) Checkpoint(ctx context.Context, opts *runc.CheckpointOpts, actions ...runc.CheckpointAction) error {
	return r.call("checkpoint", func(c *runc.Runc) error {
		c.Setpgid = true
		return c.Checkpoint(ctx, r.id, opts, actions...)
	})
}

// Restore is cancelled like Checkpoint.
func (r *runtimeCommand) Restore(ctx context.Context, opts *runc.RestoreOpts) (int, error) {
	opts.Detach = true
	opts.PidFile = r.pidFile("init")
	err := r.call("restore", func(c *runc.Runc) error {
		c.Setpgid = true
		_, err := c.Restore(ctx, r.id, r.bundle, opts)
		return err
	})
	if err != nil {
		return 0, err
	}
	return readPid(opts.PidFile)
}

// Version asks the runtime itself: go-runc knows runc's version only.
func (r *runtimeCommand) Version(ctx context.Context) (name, version string) {
	command := cmp.Or(r.runc.Command, runc.DefaultCommand)
	if out, err := Output(ctx, command, "--version"); err == nil {
		if name, version := parseVersion(string(out)); name != "" {
			return name, version
		}
	}
	return filepath.Base(command), ""
}

// parseVersion reads the first line, such as "crun version 1.21".
func parseVersion(out string) (name, version string) {
	line, _, _ := strings.Cut(out, "\n")
	name, version, ok := strings.Cut(line, " version ")
	if !ok {
		return "", ""
	}
	return name, strings.TrimSpace(version)
}

func readPid(path string) (int, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, fmt.Errorf("the runtime left no pid: %w", err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil || pid <= 0 {
		return 0, fmt.Errorf("%s: %q is not a pid", path, data)
	}
	return pid, nil
}

package node

import (
	"context"
	"crypto/rand"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/prometheus/procfs"
)

// Bundle is a bundle container that runs.
type Bundle struct {
	Container string
	Bundle    string
	Paused    bool
	Processes []Process // the main process first
}

// Process is a process of a container that was started from outside: its main process, or
// one that Exec has added.
type Process struct {
	Pid      int
	User     specs.User
	Args     []string
	Env      []string
	Cwd      string
	Terminal bool
}

// execPrefix begins the IDs that Exec gives to processes.
const execPrefix = "stasis-exec-"

// Bundles lists the bundle containers that run.
func (n *Node) Bundles(ctx context.Context) ([]Bundle, error) {
	c, err := n.Client(ctx)
	if err != nil {
		return nil, err
	}
	containers, err := c.Containers(ctx, fmt.Sprintf("labels.%q", labelBundle))
	if err != nil {
		return nil, fmt.Errorf("list containers: %w", err)
	}
	found := []Bundle{}
	for _, container := range containers {
		b, err := describeBundle(ctx, container)
		if errdefs.IsNotFound(err) || errdefs.IsFailedPrecondition(err) {
			continue // it has ended meanwhile
		}
		if err != nil {
			return nil, fmt.Errorf("look at container %s: %w", container.ID(), err)
		}
		found = append(found, *b)
	}
	return found, nil
}

// describeBundle returns an error of errdefs.ErrNotFound if the container has ended.
func describeBundle(ctx context.Context, container client.Container) (*Bundle, error) {
	info, err := container.Info(ctx, client.WithoutRefreshedMetadata)
	if err != nil {
		return nil, err
	}
	task, err := container.Task(ctx, nil)
	if err != nil {
		return nil, err
	}
	status, err := task.Status(ctx)
	if err != nil {
		return nil, err
	}
	if status.Status != client.Running && status.Status != client.Paused && status.Status != client.Pausing {
		return nil, fmt.Errorf("it is %s: %w", status.Status, errdefs.ErrNotFound)
	}
	if !isBundle(info) {
		return nil, fmt.Errorf("it was not started from a bundle: %w", errdefs.ErrNotFound)
	}
	b := &Bundle{Container: info.ID, Bundle: info.Labels[labelBundle], Paused: status.Status != client.Running}
	var spec specs.Spec
	if err := typeurl.UnmarshalTo(info.Spec, &spec); err != nil {
		return nil, fmt.Errorf("its spec: %w", err)
	}
	if p := spec.Process; p != nil {
		b.Processes = append(b.Processes, Process{Pid: int(task.Pid()), User: p.User, Args: p.Args, Env: p.Env, Cwd: p.Cwd, Terminal: p.Terminal})
	}
	added, err := execs(ctx, task)
	if err != nil {
		return nil, err
	}
	for _, pid := range slices.Sorted(maps.Keys(added)) {
		if p, err := readProcess(pid); err == nil { // else it has ended
			b.Processes = append(b.Processes, *p)
		}
	}
	return b, nil
}

// execs are the IDs of the processes that were added to a container, by their pids.
func execs(ctx context.Context, task client.Task) (map[int]string, error) {
	all, err := task.Pids(ctx)
	if err != nil {
		return nil, fmt.Errorf("list its processes: %w", err)
	}
	found := map[int]string{}
	for _, p := range all {
		var details options.ProcessDetails
		if p.Info != nil && typeurl.UnmarshalTo(p.Info, &details) == nil && details.ExecID != "" {
			found[int(p.Pid)] = details.ExecID
		}
	}
	return found, nil
}

// readProcess says what a process runs, as the kernel has it: containerd does not keep
// the spec of a process that was added.
func readProcess(pid int) (*Process, error) {
	proc, err := procfs.NewProc(pid)
	if err != nil {
		return nil, err
	}
	p := &Process{Pid: pid}
	if p.Args, err = proc.CmdLine(); err != nil {
		return nil, err
	}
	if p.Env, err = proc.Environ(); err != nil {
		return nil, err
	}
	if p.Cwd, err = os.Readlink(fmt.Sprintf("/proc/%d/cwd", pid)); err != nil {
		return nil, err
	}
	stat, err := proc.Stat()
	if err != nil {
		return nil, err
	}
	p.Terminal = stat.TTY != 0
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(status)) {
		key, value, _ := strings.Cut(line, ":")
		var ids []uint32
		for _, field := range strings.Fields(value) {
			id, err := strconv.ParseUint(field, 10, 32)
			if err != nil {
				break
			}
			ids = append(ids, uint32(id))
		}
		switch {
		case key == "Uid" && len(ids) > 1:
			p.User.UID = ids[1] // the effective one
		case key == "Gid" && len(ids) > 1:
			p.User.GID = ids[1]
		case key == "Groups":
			p.User.AdditionalGids = ids
		}
	}
	return p, nil
}

// ExecRequest says what process to add to a bundle container.
type ExecRequest struct {
	Container string
	User      specs.User
	Args      []string
	Env       []string // nil: as the main process
	Cwd       string   // empty: as the main process
	Terminal  bool
}

// Exec adds a process to a bundle container and returns its pid. It has the capabilities
// and limits that the container's main process has, and no streams.
func (n *Node) Exec(ctx context.Context, r ExecRequest) (pid uint32, err error) {
	if len(r.Args) == 0 {
		return 0, requestError("a process needs args")
	}
	container, task, err := n.bundle(ctx, r.Container)
	if err != nil {
		return 0, err
	}
	spec, err := container.Spec(ctx)
	if err != nil {
		return 0, fmt.Errorf("add a process to %s: %w", r.Container, err)
	}
	process := *spec.Process
	process.Args, process.User, process.Terminal = r.Args, r.User, r.Terminal
	process.CommandLine, process.ConsoleSize = "", nil
	if r.Env != nil {
		process.Env = r.Env
	}
	if r.Cwd != "" {
		process.Cwd = r.Cwd
	}
	id := execPrefix + strings.ToLower(rand.Text())
	added, err := task.Exec(ctx, id, &process, func(string) (cio.IO, error) { return unattached{Terminal: r.Terminal}, nil })
	if err != nil {
		return 0, fmt.Errorf("add a process to %s: %w", r.Container, err)
	}
	if err := added.Start(ctx); err != nil {
		_, _ = added.Delete(context.WithoutCancel(ctx), client.WithProcessKill)
		return 0, fmt.Errorf("start %q in %s: %w", r.Args[0], r.Container, err)
	}
	return added.Pid(), nil
}

// Signal sends a signal to a process of a bundle container: to the one with that pid, if
// it is its main process or one that was added; 0: to its main process.
func (n *Node) Signal(ctx context.Context, id string, pid int, signal syscall.Signal) error {
	_, task, err := n.bundle(ctx, id)
	if err != nil {
		return err
	}
	var target client.Process = task
	if pid != 0 && pid != int(task.Pid()) {
		added, err := execs(ctx, task)
		if err != nil {
			return fmt.Errorf("signal a process of %s: %w", id, err)
		}
		exec, ok := added[pid]
		if !ok {
			return fmt.Errorf("%s has no process %d that was started from outside: %w", id, pid, errdefs.ErrNotFound)
		}
		if target, err = task.LoadProcess(ctx, exec, nil); err != nil {
			return fmt.Errorf("signal process %d of %s: %w", pid, id, err)
		}
	}
	if err := target.Kill(ctx, signal); err != nil {
		return fmt.Errorf("signal %s: %w", id, err)
	}
	return nil
}

// Pause has all processes of a bundle container stand still.
func (n *Node) Pause(ctx context.Context, id string) error {
	return n.withBundle(ctx, id, client.Task.Pause, "pause")
}

// Resume has them go on.
func (n *Node) Resume(ctx context.Context, id string) error {
	return n.withBundle(ctx, id, client.Task.Resume, "resume")
}

func (n *Node) withBundle(ctx context.Context, id string, do func(client.Task, context.Context) error, what string) error {
	_, task, err := n.bundle(ctx, id)
	if err != nil {
		return err
	}
	if err := do(task, ctx); err != nil {
		return fmt.Errorf("%s %s: %w", what, id, err)
	}
	return nil
}

// bundle returns a bundle container that runs.
func (n *Node) bundle(ctx context.Context, id string) (client.Container, client.Task, error) {
	c, err := n.Client(ctx)
	if err != nil {
		return nil, nil, err
	}
	container, err := c.LoadContainer(ctx, id)
	if err != nil {
		return nil, nil, fmt.Errorf("look at container %s: %w", id, err)
	}
	info, err := container.Info(ctx, client.WithoutRefreshedMetadata)
	if err != nil {
		return nil, nil, fmt.Errorf("look at container %s: %w", id, err)
	}
	if !isBundle(info) {
		return nil, nil, fmt.Errorf("container %s was not started from a bundle: %w", id, errdefs.ErrNotFound)
	}
	task, err := container.Task(ctx, nil)
	if err != nil {
		return nil, nil, fmt.Errorf("look at the task of %s: %w", id, err)
	}
	return container, task, nil
}

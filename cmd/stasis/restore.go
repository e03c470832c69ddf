package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"time"

	"github.com/containerd/console"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/identifiers"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/image"
	"github.com/stasis-run/stasis/checkpoint/policy/allow"
)

// restoreFlags are those of `stasis restore`.
type restoreFlags struct {
	// madeHere: what is restored is an image as this host has made it. It is no flag.
	madeHere bool

	attach      bool
	tcpClose    bool
	network     string
	healthy     string
	healthyFor  time.Duration
	logURI      string
	runtime     string
	runcBinary  string
	snapshotter string
	plainHTTP   bool
	grants      allow.Grants
	seccomp     choice
}

const runtimeName = "io.containerd.stasis.v1"

func newRestoreCommand(a *app) *cobra.Command {
	f := &restoreFlags{}
	cmd := &cobra.Command{
		Use:   "restore REF|FILE [NAME]",
		Short: "Start a container where a checkpoint left it",
		Long: `Start a container from a checkpoint of any form: an image, which is pulled if it
is not here, or an archive in a file. The container gets the ID it had, or NAME,
and runs under Stasis.

The processes come back as they were, so what they once read cannot change any
more: their arguments, their environment, host name and user. What can: the ID,
the cgroup, the network (--network), where output goes. TCP connections go on if
the container has their addresses, and are closed if not. --network is for a
container whose network namespace was made for it, as in a pod; one that had its
own gets a new one again, and one that had the host's gets that or none.

The spec in a checkpoint is a request: without flags the container gets what an
ordinary one has, which is one with containerd's default spec and seccomp profile.
If the checkpoint asks for more, the restore is refused before anything is made,
and the error lists the flags that grant it: --allow-..., --cgroup-parent,
--network, or --privileged for all. --allow-... can be repeated. OCI hooks and
annotations that runtimes obey are never taken over. "stasis inspect" shows what a
checkpoint asks for; docs/security.md has the rules.

With --attach, signals go to the container, and the exit code is the container's.
Else the exit codes are those of every command.`,
		Example: `  stasis restore localhost/db:20261122-071900
  stasis restore registry.example.com/backup/db:monday db2
  stasis restore db.tar.zst db2 --wait-healthy 'redis-cli ping'
  stasis restore db.tar --network join=proxy
  stasis restore of-podman.tar --allow-new-privs --allow-seccomp profile --allow-mount /srv/db`,
		Args:              cobra.RangeArgs(1, 2),
		ValidArgsFunction: firstArgs(1, a.completeCheckpoints()),
		RunE: func(cmd *cobra.Command, args []string) error {
			id := ""
			if len(args) > 1 {
				id = args[1]
			}
			return a.restore(cmd.Context(), f, args[0], id)
		},
	}
	flags := cmd.Flags()
	flags.BoolVar(&f.attach, "attach", false, "connect this terminal to the container, until it ends")
	flags.BoolVar(&f.tcpClose, "tcp-close", false, "close all TCP connections")
	flags.StringVar(&f.network, "network", "", "host, none (its own, with a loopback only), or join=ID of a container; default: as it was")
	flags.StringVar(&f.healthy, "wait-healthy", "", "run `CMD` (by sh -c) in the container until it succeeds")
	flags.DurationVar(&f.healthyFor, "wait-timeout", time.Minute, "how long --wait-healthy waits")
	flags.StringVar(&f.logURI, "log-uri", "", "where output goes without --attach: file:///path or binary:///path; default: nowhere")
	flags.StringVar(&f.runtime, "runtime", runtimeName, "containerd's runtime; Stasis's shim must be behind it")
	flags.StringVar(&f.runcBinary, "runc-binary", "", "the OCI runtime; default: the one that made the checkpoint, as the other names mounts differently")
	flags.StringVar(&f.snapshotter, "snapshotter", "", "containerd's snapshotter; default: containerd's own choice")
	a.addMaxSize(cmd)
	flags.BoolVar(&f.plainHTTP, "plain-http", false, "pull without TLS; implied for localhost")
	grantFlags(cmd, f)
	return cmd
}

// restoreResult is what `stasis restore -o json` prints.
type restoreResult struct {
	Container string        `json:"container"`
	Ref       string        `json:"ref"`
	Pid       uint32        `json:"pid"`
	Restored  time.Duration `json:"restored_ns"` // create and start
	Took      time.Duration `json:"took_ns"`
}

func (a *app) restore(ctx context.Context, f *restoreFlags, arg, id string) (err error) {
	started := time.Now()
	if id != "" {
		if err := identifiers.Validate(id); err != nil {
			return usageError("NAME: %v", err)
		}
	}
	ctx, c, done, err := a.leased(ctx)
	if err != nil {
		return err
	}
	runs := false
	defer func() {
		// When the lease has ended, so that nothing keeps the content.
		if err != nil && !runs {
			err = errors.Join(err, a.removeAdded(ctx, c))
		}
	}()
	defer done()
	bar := a.progress(arg)
	defer bar.Done()
	before := a.refusable(ctx, c, arg)
	record, err := a.runnable(ctx, c, arg, f, bar)
	if err != nil {
		return fmt.Errorf("restore %s: %w", arg, before.undo(ctx, err))
	}
	summary, err := image.ReadInfo(ctx, c.ContentStore(), record.Target)
	if err != nil {
		return fmt.Errorf("restore %s: %w", arg, err)
	}
	f.runcBinary = ociBinary(f.runcBinary, summary.Info.OCIRuntime.Name)
	if id == "" {
		if id = summary.Info.ContainerID; identifiers.Validate(id) != nil {
			return usageError("the checkpoint does not tell a container's ID that could be used again: give a NAME")
		}
	}
	if _, err := c.LoadContainer(ctx, id); err == nil {
		return fmt.Errorf("restore %s: there is a container %s: give another NAME, or remove it: %w", arg, id, errdefs.ErrAlreadyExists)
	}
	bar.Stage("unpack")
	img := client.NewImage(c, record)
	if err := before.unpacking(ctx, img, f.snapshotter); err != nil {
		return fmt.Errorf("restore %s: %w", arg, err)
	}
	if err := img.Unpack(ctx, f.snapshotter); err != nil {
		return fmt.Errorf("restore %s: unpack it: %w", arg, err)
	}
	container, spec, err := a.newRestored(ctx, c, img, id, summary.Info.Namespace, f)
	if err != nil {
		return fmt.Errorf("restore %s: %w", arg, before.undo(ctx, err))
	}
	bar.Stage("restore")
	if f.attach {
		// The terminal is the container's now.
		bar.Done()
		a.endProgress()
	}
	restoring := time.Now()
	task, attached, err := a.startRestored(ctx, container, spec, f)
	if err != nil {
		err = fmt.Errorf("restore %s as %s: %w", arg, id, err)
		return errors.Join(err, removeContainer(ctx, container))
	}
	runs = true
	restored := time.Since(restoring)
	bar.Done()
	if f.healthy != "" {
		if err := waitHealthy(ctx, task, spec, f); err != nil {
			return fmt.Errorf("%s runs, but %w", id, err)
		}
	}
	if attached != nil {
		return attached(ctx)
	}
	r := restoreResult{Container: id, Ref: record.Name, Pid: task.Pid(), Restored: restored, Took: time.Since(started)}
	if a.json() {
		return printJSON(a.out, r)
	}
	fmt.Fprintln(a.out, id)
	if !a.quiet {
		fmt.Fprintf(a.err, "stasis: %s runs again as process %d; restored in %s, all of it took %s\n",
			id, r.Pid, restored.Round(time.Millisecond), r.Took.Round(time.Millisecond))
	}
	return nil
}

// ociBinary is the OCI runtime's program: the one that the caller names, else the one
// of which a checkpoint says that it was made by it. That is only a name, and only
// of one that we know: the author could name any program.
func ociBinary(named, madeBy string) string {
	if named == "" && madeBy == "crun" {
		return "crun"
	}
	return named
}

// newRestored makes the container, whose image has its checkpoint.
func (a *app) newRestored(ctx context.Context, c *client.Client, img client.Image, id, oldNamespace string, f *restoreFlags) (client.Container, *specs.Spec, error) {
	var spec *specs.Spec
	opts := []client.NewContainerOpts{
		client.WithImage(img),
		client.WithSnapshotter(f.snapshotter),
		client.WithNewSnapshot(id, img),
		client.WithAdditionalContainerLabels(map[string]string{"stasis.run/restored-from": img.Name()}),
		func(ctx context.Context, c *client.Client, container *containers.Container) error {
			err := withEmbedded(ctx, c, container, func(root *os.Root) (err error) {
				spec, err = a.embedded(ctx, c, container, root, oldNamespace, f)
				return err
			})
			if err != nil {
				return err
			}
			if err := client.WithSpec(spec)(ctx, c, container); err != nil {
				return err
			}
			return client.WithRuntime(f.runtime, &options.Options{BinaryName: f.runcBinary, SystemdCgroup: bySystemd(spec)})(ctx, c, container)
		},
	}
	container, err := c.NewContainer(ctx, id, opts...)
	if err != nil {
		rerr := c.SnapshotService(defaultSnapshotter(ctx, c, f.snapshotter)).Remove(context.WithoutCancel(ctx), id)
		if rerr != nil && !errdefs.IsNotFound(rerr) && !errdefs.IsAlreadyExists(err) {
			err = errors.Join(err, rerr)
		}
		return nil, nil, fmt.Errorf("make container %s: %w", id, err)
	}
	return container, spec, nil
}

// startRestored restores the processes. attached, which is nil without --attach,
// waits for the container's end.
func (a *app) startRestored(ctx context.Context, container client.Container, spec *specs.Spec, f *restoreFlags) (_ client.Task, attached func(context.Context) error, err error) {
	terminal := spec.Process != nil && spec.Process.Terminal
	creator := unattachedIO(f.logURI, terminal)
	// What the container prints: if nobody reads it, that does not undo the restore.
	out := newOutput(a.out.w, func(error) {})
	switch {
	case f.attach && terminal:
		creator = cio.NewCreator(cio.WithStreams(a.in, out, nil), cio.WithTerminal)
	case f.attach:
		creator = cio.NewCreator(cio.WithStreams(a.in, out, a.err))
	}
	task, err := container.NewTask(ctx, creator)
	if err != nil {
		return nil, nil, err
	}
	remove := func(err error) error {
		_, derr := task.Delete(context.WithoutCancel(ctx), client.WithProcessKill)
		return errors.Join(err, derr)
	}
	exited, err := task.Wait(context.WithoutCancel(ctx))
	if err != nil {
		return nil, nil, remove(err)
	}
	var con console.Console
	if f.attach && terminal {
		con = rawTerminal()
	}
	// From here on: one that comes when all is restored, and so undoes nothing any
	// more, is for the container.
	var signals chan os.Signal
	if f.attach {
		signals = catchSignals()
	}
	if err := startTask(ctx, task); err != nil {
		if con != nil {
			con.Reset()
		}
		signal.Stop(signals)
		return nil, nil, remove(err)
	}
	if !f.attach {
		return task, nil, nil
	}
	return task, func(ctx context.Context) error {
		ctx = context.WithoutCancel(ctx)
		if con != nil {
			defer con.Reset()
			defer followSize(ctx, task, con)()
		}
		defer forwardSignals(ctx, task, signals)()
		var status client.ExitStatus
		select {
		case status = <-exited:
		case <-out.broken:
			return out.failed() // the container runs on
		}
		if err := status.Error(); err != nil {
			return fmt.Errorf("wait for %s: %w", container.ID(), err)
		}
		_, err := task.Delete(ctx)
		if err == nil && status.ExitCode() != 0 {
			err = exitCode(status.ExitCode())
		}
		return err
	}, nil
}

// startTask starts a task, or kills it if we are interrupted. A call that was only
// given up would go on, and the container run after it was removed.
func startTask(ctx context.Context, task client.Task) error {
	whole := context.WithoutCancel(ctx)
	stop := context.AfterFunc(ctx, func() { _ = task.Kill(whole, unix.SIGKILL) })
	err := task.Start(whole)
	if !stop() {
		return errors.Join(context.Cause(ctx), err)
	}
	return err
}

// removeContainer undoes newRestored.
func removeContainer(ctx context.Context, container client.Container) error {
	err := container.Delete(context.WithoutCancel(ctx), client.WithSnapshotCleanup)
	if err != nil {
		return fmt.Errorf("remove container %s again: %w", container.ID(), err)
	}
	return nil
}

// rawTerminal hands what is typed at this terminal to the container as it is. It
// returns nil if this is no terminal; Reset undoes it.
func rawTerminal() console.Console {
	con, err := console.ConsoleFromFile(os.Stdin)
	if err != nil {
		return nil // not a terminal: as with `… </dev/null`
	}
	if err := con.SetRaw(); err != nil {
		return nil
	}
	return con
}

// waitHealthy runs a command in the container until it succeeds.
func waitHealthy(ctx context.Context, task client.Task, spec *specs.Spec, f *restoreFlags) error {
	ctx, cancel := context.WithTimeout(ctx, f.healthyFor)
	defer cancel()
	process := *spec.Process
	process.Terminal = false
	process.Args = []string{"/bin/sh", "-c", f.healthy}
	var last error
	for try := 0; ; try++ {
		var out strings.Builder
		code, err := runIn(ctx, task, fmt.Sprintf("stasis-healthy-%d", try), &process, &out)
		if err == nil && code == 0 {
			return nil
		}
		if ctx.Err() == nil {
			last = err
			if err == nil {
				last = fmt.Errorf("exit code %d: %s", code, strings.TrimSpace(printable(out.String())))
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("--wait-healthy %q did not succeed within %s: %w", f.healthy, f.healthyFor, last)
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// runIn runs a process in a container and returns its exit code.
func runIn(ctx context.Context, task client.Task, id string, process *specs.Process, out io.Writer) (uint32, error) {
	p, err := task.Exec(ctx, id, process, cio.NewCreator(cio.WithStreams(nil, out, out)))
	if err != nil {
		return 0, err
	}
	defer p.Delete(context.WithoutCancel(ctx), client.WithProcessKill)
	exited, err := p.Wait(ctx)
	if err != nil {
		return 0, err
	}
	if err := p.Start(ctx); err != nil {
		return 0, err
	}
	select {
	case status := <-exited:
		p.IO().Wait()
		return status.ExitCode(), status.Error()
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

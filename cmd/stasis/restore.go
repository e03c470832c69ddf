package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/stasis-run/stasis/checkpoint/policy/allow"
	"github.com/stasis-run/stasis/node"
)

// restoreFlags holds the flags of `stasis restore`. Flags that are used as they are typed
// set request; restore adds the others.
type restoreFlags struct {
	request node.RestoreRequest
	attach  bool
	seccomp choice
}

func newRestoreCommand(a *app) *cobra.Command {
	f := &restoreFlags{}
	cmd := &cobra.Command{
		Use:   "restore REF|FILE [NAME]",
		Short: "Start a container where a checkpoint left it",
		Long: `Start a container from a checkpoint of any format: an image, which is pulled if it
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
If the checkpoint asks for more, the restore is refused and leaves nothing behind,
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
			f.request.Checkpoint = args[0]
			if len(args) > 1 {
				f.request.Name = args[1]
			}
			return a.restore(cmd.Context(), f)
		},
	}
	flags := cmd.Flags()
	flags.BoolVar(&f.attach, "attach", false, "connect this terminal to the container, until it ends")
	flags.BoolVar(&f.request.TCPClose, "tcp-close", false, "close all TCP connections")
	flags.StringVar(&f.request.Grants.Network, "network", "", "host, none (its own, with a loopback only), or join=ID of a container; default: as it was")
	flags.StringVar(&f.request.Healthy, "wait-healthy", "", "run `CMD` (by sh -c) in the container until it succeeds")
	flags.DurationVar(&f.request.HealthyTimeout, "wait-timeout", time.Minute, "how long --wait-healthy waits")
	flags.StringVar(&f.request.LogURI, "log-uri", "", "where output goes without --attach: file:///path or binary:///path; default: nowhere")
	flags.StringVar(&f.request.Runtime, "runtime", node.RuntimeName, "containerd's runtime; Stasis's shim must be behind it")
	flags.StringVar(&f.request.RuncBinary, "runc-binary", "", "the OCI runtime; default: the one that made the checkpoint, as the other names mounts differently")
	flags.StringVar(&f.request.Snapshotter, "snapshotter", "", "containerd's snapshotter; default: containerd's own choice")
	a.addMaxSize(cmd)
	flags.BoolVar(&f.request.Registry.PlainHTTP, "plain-http", false, "pull without TLS; implied for localhost")
	grantFlags(cmd, f)
	return cmd
}

func (a *app) restore(ctx context.Context, f *restoreFlags) error {
	r := f.request
	r.Grants.Seccomp, r.MaxSize, r.Progress = f.seccomp.value, int64(a.maxSize), a.progress()
	r.Asked = func(asks []allow.Ask) { a.tellAsks(asks, r.Grants.Privileged) }
	var at *attachment
	if f.attach {
		at = a.attachTo(&r)
		defer at.reset()
	}
	result, err := a.operations().Restore(ctx, r)
	if err != nil {
		return err
	}
	if at != nil {
		return at.wait(ctx, result)
	}
	if a.json() {
		return printJSON(a.out, result)
	}
	fmt.Fprintln(a.out, result.Container)
	if !a.quiet {
		fmt.Fprintf(a.err, "stasis: %s runs again as process %d; restored in %s, all of it took %s\n",
			result.Container, result.Pid, result.Restored.Round(time.Millisecond), result.Took.Round(time.Millisecond))
	}
	return nil
}

// tellAsks says what a checkpoint gets by --privileged, and what it does not get
// and may miss. Annotations are left out of every container of another engine's.
func (a *app) tellAsks(asks []allow.Ask, privileged bool) {
	var granted, left []string
	for _, ask := range asks {
		line := fmt.Sprintf("\n  %s: %s", ask.Field, ask.What)
		switch {
		case ask.Verdict == allow.Granted && privileged:
			granted = append(granted, line)
		case ask.Verdict == allow.LeftOut && ask.Field != "annotations":
			left = append(left, line)
		}
	}
	if len(granted) > 0 {
		fmt.Fprintf(a.err, "stasis: WARNING: --privileged grants all that the spec in the checkpoint asks for:%s\n", strings.Join(granted, ""))
	}
	if len(left) > 0 {
		fmt.Fprintf(a.err, "stasis: left out of the container's spec:%s\n", strings.Join(left, ""))
	}
}

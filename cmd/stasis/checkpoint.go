package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/stasis-run/stasis/checkpoint/criu"
	"github.com/stasis-run/stasis/node"
)

// checkpointFlags holds the flags of `stasis checkpoint`. Flags that are used as they are
// typed set request; complete adds the others.
type checkpointFlags struct {
	request    node.CheckpointRequest
	ghostLimit string
	preDump    string
	compress   choice
	format     choice
	file       string
}

func newCheckpointCommand(a *app) *cobra.Command {
	f := &checkpointFlags{
		compress: choice{"zstd", []string{"zstd", "gzip", "none"}},
		format:   choice{"runnable", []string{"runnable", "index", "podman", "archive"}},
	}
	cmd := &cobra.Command{
		Use:   "checkpoint CONTAINER... [REF]",
		Short: "Save running containers as images or archives",
		Long: `Save a running container, with its memory, open files, and the changes of its
root filesystem, as an image called REF, or as an archive. The container stands
still while CRIU writes it and its changed files are copied, and runs on; with
--exit it ends.

REF needs a slash or a colon, which is what tells it from a container. Without
one the image is called localhost/CONTAINER:TIME.

Formats: runnable is an image that Stasis resumes and every other runtime starts
afresh; index is that of "ctr containers checkpoint"; podman is the image of
Podman and CRI-O; archive is the tar file of Podman, CRI-O and the kubelet.`,
		Example: `  stasis checkpoint db
  stasis checkpoint db registry.example.com/backup/db:monday --push
  stasis checkpoint db --exit --tcp-established
  stasis checkpoint db --output db.tar.zst
  stasis checkpoint --namespace k8s.io --pod web-0`,
		ValidArgsFunction: a.completeContainers(),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.checkpoint(cmd.Context(), f, args)
		},
	}
	flags := cmd.Flags()
	flags.BoolVar(&f.request.Exit, "exit", false, "end the container with the checkpoint")
	flags.BoolVar(&f.request.Options.OpenTCP, "tcp-established", false, "save TCP connections")
	flags.BoolVar(&f.request.Options.TCPClose, "tcp-close", false, "drop TCP connections from the checkpoint; the running container keeps its own")
	flags.BoolVar(&f.request.Options.FileLocks, "file-locks", false, "save file locks")
	flags.BoolVar(&f.request.Options.ExternalUnixSockets, "ext-unix-sk", false, "allow unix sockets connected to outside the container")
	flags.BoolVar(&f.request.Options.Terminal, "shell-job", false, "allow a terminal whose session leader is outside the container")
	flags.BoolVar(&f.request.Options.LinkRemap, "link-remap", false, "allow open files that were deleted and have other names; only with --exit")
	flags.StringVar(&f.ghostLimit, "ghost-limit", "", "largest deleted file that is saved, such as 64M (CRIU's default is 1M)")
	flags.StringVar(&f.preDump, "pre-dump", "", "write the memory `N` times before, while the container runs, each time what has changed, so that it stands still for less; auto: until that is no less than the time before")
	flags.Var(&f.compress, "compress", "how layers or the archive are compressed: zstd, gzip or none")
	flags.Var(&f.format, "format", "format of the checkpoint: runnable, index, podman or archive")
	flags.StringVarP(&f.file, "output", "o", "", "write an archive to `FILE` instead of an image (json or table: what to print, as elsewhere)")
	flags.BoolVar(&f.request.Push, "push", false, "push the image to its registry")
	flags.BoolVar(&f.request.Registry.PlainHTTP, "plain-http", false, "push without TLS; implied for localhost")
	flags.StringVar(&f.request.From, "from", "", "store what an earlier call with --exit has left in `FOLDER` when it could not store it; the container must not have run since")
	flags.StringVar(&f.request.Pod, "pod", "", "every container of the Kubernetes pod `NAME` (or NAMESPACE/NAME)")
	must(cmd.RegisterFlagCompletionFunc("pre-dump", cobra.FixedCompletions([]string{"auto"}, cobra.ShellCompDirectiveNoFileComp)))
	must(cmd.RegisterFlagCompletionFunc("compress", f.compress.complete))
	must(cmd.RegisterFlagCompletionFunc("format", f.format.complete))
	return cmd
}

func (a *app) checkpoint(ctx context.Context, f *checkpointFlags, args []string) error {
	if err := f.complete(a, args); err != nil {
		return err
	}
	results, err := a.operations().Checkpoint(ctx, f.request)
	if results == nil {
		return err
	}
	for _, r := range results {
		if r.Note != "" {
			fmt.Fprintf(a.err, "stasis: %s: %s\n", r.Container, r.Note)
		}
	}
	stdout := isStdout(f.file) // has the archive, and nothing else
	if a.json() && !stdout {
		return errors.Join(err, printJSON(a.out, results))
	}
	for _, r := range results {
		if !stdout {
			fmt.Fprintln(a.out, r.Ref+r.File)
		}
		if !a.quiet && r.Frozen > 0 {
			fmt.Fprintf(a.err, "stasis: %s stood still for %s; %s of memory and state, %s of files; done in %s\n", r.Container,
				r.Frozen.Round(time.Millisecond), size(r.ImageBytes), size(r.LayerBytes), r.Took.Round(time.Millisecond))
		}
	}
	return err
}

// complete makes the request of the flags and the arguments.
func (f *checkpointFlags) complete(a *app, args []string) error {
	switch f.file {
	case "json", "table":
		a.output.value, f.file = f.file, ""
	}
	r := &f.request
	r.Format, r.Compression, r.Progress = f.format.value, f.compress.value, a.progress()
	if f.file != "" {
		if r.Format == node.FormatRunnable { // which is the default
			r.Format = node.FormatArchive
		}
		r.Archive = a.outputTo(f.file)
	}
	for i, arg := range args {
		if !strings.ContainsAny(arg, "/:@") {
			r.Containers = append(r.Containers, arg)
			continue
		}
		if i != len(args)-1 {
			return usageError("%s: a REF comes last, and there is only one", arg)
		}
		r.Ref = arg
	}
	if f.ghostLimit != "" {
		n, err := units.RAMInBytes(f.ghostLimit)
		if err != nil || n <= 0 {
			return usageError("--ghost-limit %s: it is a size, such as 64M", f.ghostLimit)
		}
		r.Options.GhostLimit = uint64(n)
	}
	switch f.preDump {
	case "":
	case "auto":
		r.PreDumps = criu.PreDumpAuto
	default:
		n, err := strconv.ParseInt(f.preDump, 10, 8)
		if err != nil || n < 1 {
			return usageError("--pre-dump %s: it is auto, or a number from 1 to 127", f.preDump)
		}
		r.PreDumps = int(n)
	}
	return nil
}

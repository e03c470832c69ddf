package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/docker/go-units"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/api"
	"github.com/stasis-run/stasis/checkpoint/archive"
	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/image"
)

// checkpointFlags are those of `stasis checkpoint`.
type checkpointFlags struct {
	exit        bool
	criu        api.CRIUOptions
	ghostLimit  string
	preDump     string
	preDumps    int32 // as in api.CheckpointRequest
	from        string
	compress    choice
	format      choice
	file        string
	push        bool
	plainHTTP   bool
	pod         string
	compression compression.Compression
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
	flags.BoolVar(&f.exit, "exit", false, "end the container with the checkpoint")
	flags.BoolVar(&f.criu.OpenTcp, "tcp-established", false, "save TCP connections")
	flags.BoolVar(&f.criu.TcpClose, "tcp-close", false, "drop TCP connections from the checkpoint; the running container keeps its own")
	flags.BoolVar(&f.criu.FileLocks, "file-locks", false, "save file locks")
	flags.BoolVar(&f.criu.ExternalUnixSockets, "ext-unix-sk", false, "allow unix sockets connected to outside the container")
	flags.BoolVar(&f.criu.Terminal, "shell-job", false, "allow a terminal whose session leader is outside the container")
	flags.BoolVar(&f.criu.LinkRemap, "link-remap", false, "allow open files that were deleted and have other names; only with --exit")
	flags.StringVar(&f.ghostLimit, "ghost-limit", "", "largest deleted file that is saved, such as 64M (CRIU's default is 1M)")
	flags.StringVar(&f.preDump, "pre-dump", "", "write the memory `N` times before, while the container runs, each time what has changed, so that it stands still for less; auto: until that is no less than the time before")
	flags.Var(&f.compress, "compress", "how layers or the archive are compressed: zstd, gzip or none")
	flags.Var(&f.format, "format", "form of the checkpoint: runnable, index, podman or archive")
	flags.StringVarP(&f.file, "output", "o", "", "write an archive to `FILE` instead of an image (json or table: what to print, as elsewhere)")
	flags.BoolVar(&f.push, "push", false, "push the image to its registry")
	flags.BoolVar(&f.plainHTTP, "plain-http", false, "push without TLS; implied for localhost")
	flags.StringVar(&f.from, "from", "", "store what an earlier call with --exit has left in `FOLDER` when it could not store it; the container must not have run since")
	flags.StringVar(&f.pod, "pod", "", "every container of the Kubernetes pod `NAME` (or NAMESPACE/NAME)")
	must(cmd.RegisterFlagCompletionFunc("pre-dump", cobra.FixedCompletions([]string{"auto"}, cobra.ShellCompDirectiveNoFileComp)))
	must(cmd.RegisterFlagCompletionFunc("compress", f.compress.complete))
	must(cmd.RegisterFlagCompletionFunc("format", f.format.complete))
	return cmd
}

// checkpointResult is what `stasis checkpoint -o json` prints of one container.
type checkpointResult struct {
	Container  string        `json:"container"`
	Ref        string        `json:"ref,omitempty"`
	Digest     string        `json:"digest,omitempty"`
	File       string        `json:"file,omitempty"`
	PreDumps   []preDump     `json:"pre_dumps,omitempty"`
	Frozen     time.Duration `json:"frozen_ns"`
	Took       time.Duration `json:"took_ns"`
	ImageBytes int64         `json:"image_bytes"`
	LayerBytes int64         `json:"layer_bytes"`
	Note       string        `json:"note,omitempty"`
}

// preDump is what one round of --pre-dump has written.
type preDump struct {
	Took  time.Duration `json:"took_ns"`
	Pages uint64        `json:"pages"`
}

func (a *app) checkpoint(ctx context.Context, f *checkpointFlags, args []string) error {
	ids, ref, err := f.complete(a, args)
	if err != nil {
		return err
	}
	c, err := a.connect(ctx)
	if err != nil {
		return err
	}
	if f.pod != "" {
		if ids, err = podContainers(ctx, c, f.pod); err != nil {
			return err
		}
	}
	// Nothing is done for the first if the last is not there.
	var containers []client.Container
	for _, id := range ids {
		container, err := c.LoadContainer(ctx, id)
		if err != nil {
			return fmt.Errorf("checkpoint %s: %w (a REF has a slash or a colon; containers of Kubernetes are in --namespace k8s.io)", id, err)
		}
		containers = append(containers, container)
	}
	results := []checkpointResult{}
	var failed []error
	for _, container := range containers {
		one := a.checkpointOne
		if f.from != "" {
			one = a.storeKept
		}
		r, err := one(ctx, c, container, ref, f)
		if err != nil {
			failed = append(failed, fmt.Errorf("checkpoint %s: %w", container.ID(), err))
			continue
		}
		if r.Note != "" {
			fmt.Fprintf(a.err, "stasis: %s: %s\n", r.Container, r.Note)
		}
		results = append(results, *r)
	}
	stdout := isStdout(f.file) // has the archive, and nothing else
	if a.json() && !stdout {
		return errors.Join(append(failed, printJSON(a.out, results))...)
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
	return errors.Join(failed...)
}

// complete checks the flags and sorts the arguments.
func (f *checkpointFlags) complete(a *app, args []string) (ids []string, ref string, err error) {
	switch f.file {
	case "json", "table":
		a.output.value, f.file = f.file, ""
	}
	if f.file != "" {
		if f.format.value != "runnable" && f.format.value != "archive" {
			return nil, "", usageError("--output writes an archive, not --format %s", f.format.value)
		}
		f.format.value = "archive"
	} else if f.format.value == "archive" {
		return nil, "", usageError("--format archive needs --output FILE")
	}
	for i, arg := range args {
		if !strings.ContainsAny(arg, "/:@") {
			ids = append(ids, arg)
			continue
		}
		if i != len(args)-1 {
			return nil, "", usageError("%s: a REF comes last, and there is only one", arg)
		}
		named, err := reference.ParseDockerRef(arg)
		if err != nil {
			return nil, "", usageError("REF %s: %v", arg, err)
		}
		ref = named.String()
	}
	switch {
	case f.pod != "" && len(ids) > 0:
		return nil, "", usageError("either containers or --pod")
	case f.pod == "" && len(ids) == 0:
		return nil, "", usageError("no container is given")
	case len(ids) > 1 && f.file != "":
		return nil, "", usageError("--output takes one container")
	case (len(ids) > 1 || f.pod != "") && ref != "":
		return nil, "", usageError("a REF is for one container; several get names of their own")
	case f.criu.LinkRemap && !f.exit:
		return nil, "", usageError("--link-remap needs --exit: CRIU removes the links again if the container runs on")
	case f.criu.OpenTcp && f.criu.TcpClose:
		return nil, "", usageError("either --tcp-established or --tcp-close")
	case f.from != "" && (len(ids) != 1 || f.pod != ""):
		return nil, "", usageError("--from takes one container")
	case f.from != "" && (f.exit || f.preDump != "" || f.ghostLimit != "" || proto.Size(&f.criu) > 0):
		return nil, "", usageError("--from is of a container that was dumped: it takes no options of a dump")
	case f.push && f.file != "":
		return nil, "", usageError("either --push or --output")
	case f.push && ref == "":
		return nil, "", usageError("--push needs a REF, which names the registry")
	}
	if f.ghostLimit != "" {
		n, err := units.RAMInBytes(f.ghostLimit)
		if err != nil || n <= 0 {
			return nil, "", usageError("--ghost-limit %s: it is a size, such as 64M", f.ghostLimit)
		}
		f.criu.GhostLimit = uint64(n)
	}
	switch f.preDump {
	case "":
	case "auto":
		f.preDumps = checkpoint.PreDumpAuto
	default:
		n, err := strconv.ParseInt(f.preDump, 10, 8)
		if err != nil || n < 1 {
			return nil, "", usageError("--pre-dump %s: it is auto, or a number from 1 to 127", f.preDump)
		}
		f.preDumps = int32(n)
	}
	f.compression = compressions[f.compress.value]
	return ids, ref, nil
}

var compressions = map[string]compression.Compression{
	"zstd": compression.Zstd, "gzip": compression.Gzip, "none": compression.Uncompressed,
}

// defaultRef is the name of a checkpoint that was given none.
func defaultRef(id string, at time.Time) string {
	return "localhost/" + imageName(id) + ":" + at.UTC().Format("20060102-150405")
}

// imageName makes a part of an image's name of a container's: lower case, with one
// separator between letters and digits.
func imageName(id string) string {
	name := separators.ReplaceAllStringFunc(strings.ToLower(id), func(s string) string {
		if s == "." || s == "_" {
			return s
		}
		return "-"
	})
	return cmp.Or(strings.Trim(name, ".-_"), "container")
}

var separators = regexp.MustCompile(`[^a-z0-9]+`)

// podContainers are the IDs of a pod's containers in containerd, but for its
// sandbox.
func podContainers(ctx context.Context, c *client.Client, pod string) ([]string, error) {
	namespace, name, ok := strings.Cut(pod, "/")
	if !ok {
		namespace, name = "", pod
	}
	filter := fmt.Sprintf("labels.%q==%q", "io.kubernetes.pod.name", name)
	if namespace != "" {
		filter += fmt.Sprintf(",labels.%q==%q", "io.kubernetes.pod.namespace", namespace)
	}
	found, err := c.Containers(ctx, filter)
	if err != nil {
		return nil, fmt.Errorf("list the containers of pod %s: %w", pod, err)
	}
	var ids []string
	in := map[string]bool{}
	for _, container := range found {
		info, err := container.Info(ctx, client.WithoutRefreshedMetadata)
		if err != nil {
			return nil, fmt.Errorf("look at container %s: %w", container.ID(), err)
		}
		if info.Labels["io.cri-containerd.kind"] == "sandbox" {
			continue
		}
		task, err := container.Task(ctx, nil)
		if errdefs.IsNotFound(err) {
			continue // it has ended, and is not removed yet
		}
		if err != nil {
			return nil, fmt.Errorf("look at container %s: %w", container.ID(), err)
		}
		if status, err := task.Status(ctx); err != nil || status.Status != client.Running && status.Status != client.Paused {
			continue
		}
		ids = append(ids, container.ID())
		in[info.Labels["io.kubernetes.pod.namespace"]] = true
	}
	if len(in) > 1 {
		return nil, fmt.Errorf("there is a pod %s in several namespaces of Kubernetes: say which, NAMESPACE/%s", name, name)
	}
	if len(ids) == 0 {
		return nil, fmt.Errorf("pod %s has no running container in containerd's namespace (Kubernetes has k8s.io): %w", pod, errdefs.ErrNotFound)
	}
	return ids, nil
}

// checkpointOne makes one checkpoint and stores it.
func (a *app) checkpointOne(ctx context.Context, c *client.Client, container client.Container, ref string, f *checkpointFlags) (_ *checkpointResult, err error) {
	started := time.Now()
	bar := a.progress(container.ID())
	defer bar.Done()
	work, err := a.newWork()
	if err != nil {
		return nil, err
	}
	// With exit, what was dumped is all that is left of the container.
	note := ""
	defer func() {
		if note != "" && err != nil {
			err = fmt.Errorf("%w; the container has ended, and %s", err, note)
			work.release()
			return
		}
		err = errors.Join(err, work.remove())
	}()
	ctx, done, err := image.WithLease(ctx, c.LeasesService())
	if err != nil {
		return nil, err
	}
	defer done()

	d, err := newDumper(ctx, c, container)
	if err != nil {
		return nil, err
	}
	// Before the container is frozen, and maybe ended.
	if err := d.checkTarget(ctx, ref, f.format.value); err != nil {
		return nil, err
	}
	o := a.storeOptions(ctx, c, f.compression, bar)
	defer func() { d.early.discard(ctx) }()
	got, err := d.dump(ctx, work.dir, f, o, bar)
	// Also if it was interrupted too late.
	images := filepath.Join(work.dir, "checkpoint")
	if partial := unfinished(images); f.exit {
		// In this order, as the shim may be moving them up just now.
		begun := isWhole(partial)
		if err == nil || isWhole(images) {
			note = keptNote(container.ID(), work.dir)
		} else if begun {
			note = fmt.Sprintf("what CRIU wrote of it is in %s, and its files are in its snapshot still", partial)
		}
	}
	if err != nil {
		return nil, err
	}
	result, err := a.storeCapture(ctx, d, got, ref, f, o)
	if err != nil {
		return nil, err
	}
	note = ""
	if err := a.pushResult(ctx, c, result, f, bar); err != nil {
		return nil, err
	}
	result.Took = time.Since(started)
	return result, nil
}

// storeCapture makes an image or an archive of what was dumped.
func (a *app) storeCapture(ctx context.Context, d *dumper, got *capture.Capture, ref string, f *checkpointFlags, o image.Options) (_ *checkpointResult, err error) {
	result := &checkpointResult{
		Container: d.container.ID(), PreDumps: d.preDumps, Frozen: got.Info.Stats.Frozen, Note: d.note,
		ImageBytes: got.Info.Stats.ImageBytes, LayerBytes: got.Info.Stats.LayerBytes,
	}
	if f.file != "" {
		result.File = f.file
		err = a.writeTo(ctx, f.file, func(w io.Writer) error { return archive.Write(ctx, w, got, f.compression) })
		if err != nil {
			err = fmt.Errorf("write the archive %s: %w", f.file, err)
		}
	} else {
		if ref == "" {
			ref = defaultRef(d.container.ID(), got.Info.Checkpointed)
		}
		result.Ref = ref
		if d.early != nil {
			result.Digest, err = d.storeEarly(ctx, ref, got, f.exit, o)
		} else {
			result.Digest, err = store(ctx, d.client, ref, got, d.base, f.format.value, o)
		}
	}
	return result, err
}

// pushResult does what --push asks for.
func (a *app) pushResult(ctx context.Context, c *client.Client, r *checkpointResult, f *checkpointFlags, bar *progress) error {
	if !f.push {
		return nil
	}
	if err := a.push(ctx, c, r.Ref, r.Ref, f.plainHTTP, bar); err != nil {
		return fmt.Errorf("%w (the checkpoint is here as %s)", err, r.Ref)
	}
	return nil
}

// checkRef refuses early to replace an image that is no checkpoint.
func checkRef(ctx context.Context, c *client.Client, ref string) error {
	if ref == "" {
		return nil
	}
	record, err := c.ImageService().Get(ctx, ref)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if form, err := image.Detect(ctx, c.ContentStore(), record.Target); err == nil && form == image.None {
		return fmt.Errorf("there is an image %s that is no checkpoint; choose another REF: %w", ref, errdefs.ErrAlreadyExists)
	}
	return nil
}

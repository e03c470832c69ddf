package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/api"
	"github.com/stasis-run/stasis/checkpoint/archive"
	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/criu"
	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/checkpoint/oci"
)

// CheckpointRequest says which containers to checkpoint, how, and what to make of it.
type CheckpointRequest struct {
	// Containers are IDs in containerd. Instead of them, Pod is a Kubernetes pod, NAME
	// or NAMESPACE/NAME: all its running containers.
	Containers []string
	Pod        string

	// Ref is the name of the image, for one container. Empty:
	// localhost/CONTAINER:TIME.
	Ref string
	// Format is FormatRunnable, FormatIndex, FormatPodman or FormatArchive; empty:
	// FormatArchive if there is an Archive, else FormatRunnable.
	Format string
	// Archive is where that goes, of one container.
	Archive Output
	// Compression is that of layers or of the archive: "zstd", which is what "" means,
	// "gzip" or "none".
	Compression string

	// Exit ends the container with the checkpoint.
	Exit    bool
	Options DumpOptions
	// PreDumps is how many times the memory is written before, while the container
	// runs, up to 127; criu.PreDumpAuto: until that gets no less.
	PreDumps int
	// From is a folder that an earlier call with Exit has left when it could not store
	// what is in it. That is stored, and nothing dumped.
	From string

	// Push sends the image to the registry that Ref names.
	Push     bool
	Registry Registry

	Progress Progress
}

// DumpOptions say what a container may have that CRIU else refuses to save.
type DumpOptions struct {
	// OpenTCP saves TCP connections; TCPClose leaves them out.
	OpenTCP, TCPClose   bool
	FileLocks           bool
	ExternalUnixSockets bool // connected to outside the container
	Terminal            bool // whose session leader is outside the container
	LinkRemap           bool // open files that were deleted and have other names; only with Exit
	// GhostLimit is the size in bytes of the largest deleted file that is saved; 0:
	// CRIU's default.
	GhostLimit uint64
}

func (o DumpOptions) forShim() *api.CRIUOptions {
	return &api.CRIUOptions{OpenTcp: o.OpenTCP, TcpClose: o.TCPClose, FileLocks: o.FileLocks, ExternalUnixSockets: o.ExternalUnixSockets,
		Terminal: o.Terminal, LinkRemap: o.LinkRemap, GhostLimit: o.GhostLimit}
}

// CheckpointResult is the checkpoint of one container.
type CheckpointResult struct {
	Container string `json:"container"`
	// Ref and Digest are of an image, File is an archive.
	Ref      string    `json:"ref,omitempty"`
	Digest   string    `json:"digest,omitempty"`
	File     string    `json:"file,omitempty"`
	PreDumps []PreDump `json:"pre_dumps,omitempty"`
	// Frozen is for how long the container stood still, Took for how long all of it
	// took.
	Frozen     time.Duration `json:"frozen_ns"`
	Took       time.Duration `json:"took_ns"`
	ImageBytes int64         `json:"image_bytes"` // of CRIU's images
	LayerBytes int64         `json:"layer_bytes"` // of the writable layer
	// Note is what a user should know about the checkpoint.
	Note string `json:"note,omitempty"`
}

// PreDump is what one round of CheckpointRequest.PreDumps has written.
type PreDump struct {
	Took  time.Duration `json:"took_ns"`
	Pages uint64        `json:"pages"`
}

// Checkpoint saves running containers as images or as an archive. Each stands still
// while CRIU writes it and its changed files are copied, and runs on, unless Exit is
// set. Containers are saved one after the other, and none if one of them is not there.
// The results are of those that succeeded, also if there is an error.
//
// If a container has ended with its dump, and that could not be stored, the error says
// in what folder it is; see CheckpointRequest.From.
func (n *Node) Checkpoint(ctx context.Context, r CheckpointRequest) ([]CheckpointResult, error) {
	if err := r.complete(); err != nil {
		return nil, err
	}
	c, err := n.Client(ctx)
	if err != nil {
		return nil, err
	}
	ids := r.Containers
	if r.Pod != "" {
		if ids, err = podContainers(ctx, c, r.Pod); err != nil {
			return nil, err
		}
	}
	var containers []client.Container
	for _, id := range ids {
		container, err := c.LoadContainer(ctx, id)
		if err != nil {
			return nil, fmt.Errorf("checkpoint %s: %w (a REF has a slash or a colon; containers of Kubernetes are in --namespace k8s.io)", id, err)
		}
		containers = append(containers, container)
	}
	results := []CheckpointResult{}
	var failed []error
	for _, container := range containers {
		one := n.checkpointOne
		if r.From != "" {
			one = n.storeRetained
		}
		result, err := one(ctx, c, container, &r)
		if err != nil {
			failed = append(failed, fmt.Errorf("checkpoint %s: %w", container.ID(), err))
			continue
		}
		results = append(results, *result)
	}
	return results, errors.Join(failed...)
}

// maxPreDumps is far beyond any use. The shim is asked in 32 bits.
const maxPreDumps = 127

// Check says what is wrong with a request in itself, which Checkpoint would say, too.
func (r CheckpointRequest) Check() error { return r.complete() }

// complete checks a request, and fills in what is left empty.
func (r *CheckpointRequest) complete() error {
	if r.Format == "" {
		r.Format = FormatRunnable
		if r.Archive.isSet() {
			r.Format = FormatArchive
		}
	}
	if err := r.Registry.check(r.Ref); err != nil {
		return err
	}
	switch {
	case r.Archive.isSet() && r.Format != FormatArchive:
		return requestError("--output writes an archive, not --format %s", r.Format)
	case !r.Archive.isSet() && r.Format == FormatArchive:
		return requestError("--format archive needs --output FILE")
	case !slices.Contains([]string{FormatRunnable, FormatIndex, FormatPodman, FormatArchive}, r.Format):
		return requestError("%s is no format of a checkpoint", r.Format)
	case r.Pod != "" && len(r.Containers) > 0:
		return requestError("either containers or --pod")
	case r.Pod == "" && len(r.Containers) == 0:
		return requestError("no container is given")
	case (len(r.Containers) > 1 || r.Pod != "") && r.Archive.isSet():
		return requestError("--output takes one container")
	case r.Ref != "" && r.Archive.isSet():
		return requestError("either a REF, which names an image, or --output FILE")
	case (len(r.Containers) > 1 || r.Pod != "") && r.Ref != "":
		return requestError("a REF is for one container; several get names of their own")
	case r.Options.LinkRemap && !r.Exit:
		return requestError("--link-remap needs --exit: CRIU removes the links again if the container runs on")
	case r.Options.OpenTCP && r.Options.TCPClose:
		return requestError("either --tcp-established or --tcp-close")
	case r.From != "" && (len(r.Containers) != 1 || r.Pod != ""):
		return requestError("--from takes one container")
	case r.From != "" && (r.Exit || r.PreDumps != 0 || r.Options != DumpOptions{}):
		return requestError("--from is of a container that was dumped: it takes no options of a dump")
	case r.PreDumps < criu.PreDumpAuto || r.PreDumps > maxPreDumps:
		return requestError("--pre-dump %d: it is auto, or a number from 1 to %d", r.PreDumps, maxPreDumps)
	case r.Push && r.Archive.isSet():
		return requestError("either --push or --output")
	case r.Push && r.Ref == "":
		return requestError("--push needs a REF, which names the registry")
	}
	if r.Ref != "" {
		named, err := reference.ParseDockerRef(r.Ref)
		if err != nil {
			return requestError("REF %s: %v", r.Ref, err)
		}
		r.Ref = named.String()
	}
	_, err := compressionOf(r.Compression)
	return err
}

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
		return nil, fault.Invalid("there is a pod %s in several namespaces of Kubernetes: say which, NAMESPACE/%s", name, name)
	}
	if len(ids) == 0 {
		return nil, fmt.Errorf("pod %s has no running container in containerd's namespace (Kubernetes has k8s.io): %w", pod, errdefs.ErrNotFound)
	}
	return ids, nil
}

// checkpointOne makes one checkpoint and stores it.
func (n *Node) checkpointOne(ctx context.Context, c *client.Client, container client.Container, r *CheckpointRequest) (_ *CheckpointResult, err error) {
	started := time.Now()
	bar := r.Progress.of(container.ID())
	defer bar.end()
	work, err := n.newWork()
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
	ctx, done, err := n.lease(ctx, c.LeasesService())
	if err != nil {
		return nil, err
	}
	defer done()

	d, err := n.newDumper(ctx, c, container)
	if err != nil {
		return nil, err
	}
	// Before the container is frozen, and maybe ended.
	if err := d.checkTarget(ctx, r.Ref, r.Format); err != nil {
		return nil, err
	}
	o, err := storeOptions(ctx, c, r.Compression, bar)
	if err != nil {
		return nil, err
	}
	defer func() { d.early.discard(ctx) }()
	got, err := d.dump(ctx, work.dir, r, o, bar)
	// Also if it was interrupted too late.
	images := filepath.Join(work.dir, layout.Images)
	if r.Exit {
		// In this order, as the shim may be moving them up just now.
		dumped := checkpoint.Uncommitted(images)
		if err == nil || isWhole(images) {
			note = retainedNote(container.ID(), work.dir)
		} else if dumped != "" {
			note = fmt.Sprintf("what CRIU wrote of it is in %s, and its files are in its snapshot still", dumped)
		}
	}
	if err != nil {
		return nil, err
	}
	result, err := n.storeCapture(ctx, d, got, r, o)
	if err != nil {
		return nil, err
	}
	note = ""
	if err := n.pushResult(ctx, c, result, r, bar); err != nil {
		return nil, err
	}
	result.Took = time.Since(started)
	return result, nil
}

// storeCapture makes an image or an archive of what was dumped.
func (n *Node) storeCapture(ctx context.Context, d *dumper, got *capture.Capture, r *CheckpointRequest, o oci.Options) (_ *CheckpointResult, err error) {
	result := &CheckpointResult{
		Container: d.container.ID(), PreDumps: d.preDumps, Frozen: got.Info.Stats.Frozen, Note: d.note,
		ImageBytes: got.Info.Stats.ImageBytes, LayerBytes: got.Info.Stats.LayerBytes,
	}
	if r.Archive.isSet() {
		result.File = r.Archive.Path
		err = r.Archive.Write(ctx, func(w io.Writer) error { return archive.Write(ctx, w, got, o.Compression) })
		if err != nil {
			return nil, fmt.Errorf("write the archive %s: %w", r.Archive.Path, err)
		}
		return result, nil
	}
	var img Image
	if d.early != nil {
		img, err = d.storeEarly(ctx, r.Ref, got, r.Exit, o)
	} else {
		img, err = store(ctx, d.client, r.Ref, got, d.base, r.Format, o)
	}
	result.Ref, result.Digest = img.Ref, img.Digest
	return result, err
}

// pushResult does what Push asks for.
func (n *Node) pushResult(ctx context.Context, c *client.Client, result *CheckpointResult, r *CheckpointRequest, bar *stages) error {
	if !r.Push {
		return nil
	}
	if err := push(ctx, c, result.Ref, result.Ref, r.Registry, bar); err != nil {
		return fmt.Errorf("%w (the checkpoint is here as %s)", err, result.Ref)
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
	if format, err := oci.Detect(ctx, c.ContentStore(), record.Target); err == nil && format == oci.None {
		return fmt.Errorf("there is an image %s that is no checkpoint; choose another REF: %w", ref, errdefs.ErrAlreadyExists)
	}
	return nil
}

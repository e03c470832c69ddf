package node

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/checkpoint/policy/allow"
	"github.com/stasis-run/stasis/checkpoint/rootfs"
)

// maxSpec bounds spec.json, as containerd's messages bound a spec, in bytes.
const maxSpec = 16 << 20

// withEmbedded calls fn with the folder of a container's new snapshot that has
// /.stasis. It is somebody else's, so fn gets it as a root that no link leads out
// of.
func withEmbedded(ctx context.Context, c *client.Client, container *containers.Container, fn func(root *os.Root) error) error {
	mounts, err := c.SnapshotService(container.Snapshotter).Mounts(ctx, container.SnapshotKey)
	if err != nil {
		return fmt.Errorf("look at snapshot %s: %w", container.SnapshotKey, err)
	}
	in := func(dir string) error {
		root, err := os.OpenRoot(dir)
		if err != nil {
			return err
		}
		defer root.Close()
		return fn(root)
	}
	return withMounts(ctx, c, "", mounts, func(mounts []mount.Mount) error {
		folders := rootfs.Lower(mounts)
		if dir, upper := rootfs.Writable(mounts); dir != "" && !upper {
			folders = []string{dir}
		}
		for _, dir := range folders {
			if _, err := os.Lstat(filepath.Join(dir, layout.EmbeddedSpec)); err == nil {
				return in(dir)
			}
		}
		if folders != nil {
			return fmt.Errorf("the image has no /%s: %w", layout.EmbeddedSpec, errdefs.ErrInvalidArgument)
		}
		return mount.WithReadonlyTempMount(ctx, mounts, in)
	})
}

// readSpec reads the spec of the container that was checkpointed.
func readSpec(root *os.Root) ([]byte, error) {
	info, err := root.Lstat(layout.EmbeddedSpec)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxSpec {
		return nil, fmt.Errorf("/%s is no file, or larger than %d bytes: %w", layout.EmbeddedSpec, maxSpec, errdefs.ErrInvalidArgument)
	}
	data, err := root.ReadFile(layout.EmbeddedSpec)
	if err != nil {
		return nil, err
	}
	if err := capture.CheckJSON(data); err != nil {
		return nil, fmt.Errorf("/%s: %w", layout.EmbeddedSpec, err)
	}
	return data, nil
}

// ownCheckpoint tells whether a checkpoint is this node's own, as it was made: its key
// has signed it, with that spec, and its files, which no signature is of, are those of
// the image that was made here. images is the folder with CRIU's images and
// stasis.json; a signature that is not valid is an error.
func (op *restoring) ownCheckpoint(images *os.Root, spec []byte) (bool, error) {
	trust, err := op.node.keys.Trust()
	if err != nil {
		return false, err
	}
	// Of the folder itself, whatever its path leads to by now.
	dir, err := images.Open(".")
	if err != nil {
		return false, err
	}
	defer dir.Close()
	own, err := checkpoint.OwnSpec(fmt.Sprintf("/proc/self/fd/%d", dir.Fd()), spec, trust)
	if err != nil {
		return false, fmt.Errorf("look who has signed it: %w", err)
	}
	return own && op.madeHere, nil
}

// checkSpec tells whether a checkpoint may have what its spec asks for, before
// anything is made of it.
func (op *restoring) checkSpec(ctx context.Context, got *capture.Capture) error {
	images, err := os.OpenRoot(got.Images)
	if err != nil {
		return err
	}
	defer images.Close()
	own, err := op.ownCheckpoint(images, got.Spec)
	if err != nil {
		return err
	}
	_, _, err = op.newSpec(ctx, "", got.Info.Namespace, got.Spec, own)
	return err
}

// newSpec makes the spec of the container that is restored out of that of the one
// that was checkpointed, perhaps on another host and from another engine's.
func (op *restoring) newSpec(ctx context.Context, id, oldNamespace string, data []byte, own bool) (*specs.Spec, []allow.Ask, error) {
	namespace, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return nil, nil, err
	}
	asked, unknown, err := allow.Parse(data)
	if err != nil {
		return nil, nil, err
	}
	return allow.New(asked, unknown, allow.Options{
		Grants: op.Grants, Own: own, ID: id, Namespace: namespace, OldNamespace: oldNamespace,
		Systemd: exists("/run/systemd/system"), // sd_booted(3)
		Host:    allow.ThisHost(),
	})
}

// embedded makes the spec of a container whose new snapshot has /.stasis; root is
// that of withEmbedded.
func (op *restoring) embedded(ctx context.Context, container *containers.Container, root *os.Root, oldNamespace string) (*specs.Spec, error) {
	data, err := readSpec(root)
	if err != nil {
		return nil, err
	}
	images, err := root.OpenRoot(layout.EmbeddedImages)
	if err != nil {
		return nil, err
	}
	defer images.Close()
	own, err := op.ownCheckpoint(images, data)
	if err != nil {
		return nil, err
	}
	spec, asks, err := op.newSpec(ctx, container.ID, oldNamespace, data, own)
	if err != nil {
		return nil, err
	}
	if op.Asked != nil {
		op.Asked(asks)
	}
	if op.TCPClose {
		if spec.Annotations == nil {
			spec.Annotations = map[string]string{}
		}
		spec.Annotations[checkpoint.AnnotationTCP] = "close"
	}
	if err := patchNetwork(ctx, op.c, spec, container.ID, op.Grants.Network); err != nil {
		return nil, err
	}
	return spec, patchMounts(ctx, op.c, container, spec, root)
}

// bySystemd tells whether the runtime is to have systemd make the control group.
func bySystemd(spec *specs.Spec) bool { return strings.Contains(spec.Linux.CgroupsPath, ":") }

// patchMounts gives the container files of its own for those that its engine made
// for it and that are not here, and refuses to do without anything else.
func patchMounts(ctx context.Context, c *client.Client, container *containers.Container, spec *specs.Spec, root *os.Root) error {
	var made, missing []int
	for i, m := range spec.Mounts {
		switch {
		case !allow.IsBind(m):
		case m.Source == "", m.Destination == devShmMount && hasDevShm(root):
			made = append(made, i) // else it would share that of another container
		case exists(m.Source):
		case allow.EngineFile(filepath.Clean(m.Destination)):
			made = append(made, i)
		default:
			missing = append(missing, i)
		}
	}
	if len(missing) > 0 {
		var names []string
		for _, i := range missing {
			names = append(names, fmt.Sprintf("%s (for %s)", spec.Mounts[i].Source, spec.Mounts[i].Destination))
		}
		return fmt.Errorf("the container had mounts whose sources are not on this host: %s: %w", strings.Join(names, ", "), errdefs.ErrFailedPrecondition)
	}
	if len(made) == 0 {
		return nil
	}
	dir, err := filesFolder(ctx, c, container)
	if err != nil {
		return err
	}
	for _, i := range made {
		m := &spec.Mounts[i]
		if m.Source, err = makeFile(ctx, dir, filepath.Clean(m.Destination), spec.Hostname, root); err != nil {
			return fmt.Errorf("make %s for the container: %w", m.Destination, err)
		}
	}
	return nil
}

// patchNetwork sets the network namespace. CRIU brings processes that were in one
// which was made for them (the spec names it) back into any that is there. One
// that was the container's own it makes anew, and empty: the runtimes know no
// other way. Those that were in the host's cannot leave it.
func patchNetwork(ctx context.Context, c *client.Client, spec *specs.Spec, id, network string) error {
	at := -1
	for i, ns := range spec.Linux.Namespaces {
		if ns.Type == specs.NetworkNamespace {
			at = i
		}
	}
	path := ""
	switch {
	case network == "" && at < 0, network == "host" && at < 0:
		return nil
	case at < 0:
		return fmt.Errorf("--network %s: the container was in the host's network namespace, and its processes cannot leave it: %w", network, errdefs.ErrFailedPrecondition)
	case network == "":
		path = spec.Linux.Namespaces[at].Path
		if path == "" {
			return nil
		}
		if allow.OfProcess(path) || !exists(path) {
			return fmt.Errorf("the container was in network namespace %s, which is gone: say which it gets with --network: %w", path, errdefs.ErrFailedPrecondition)
		}
	case network == "none":
		if spec.Linux.Namespaces[at].Path != "" {
			return fmt.Errorf("--network none: the container was in a network namespace that was made for it (%s), and CRIU brings it back only into one that is there: `ip netns add %s`, then --network join=/run/netns/%[2]s: %w",
				spec.Linux.Namespaces[at].Path, id, errdefs.ErrFailedPrecondition)
		}
	case spec.Linux.Namespaces[at].Path == "" && (network == "host" || strings.HasPrefix(network, "join=")):
		return fmt.Errorf("--network %s: the container had a network namespace of its own, and its processes cannot come back in another: %w", network, errdefs.ErrFailedPrecondition)
	case network == "host":
		path = "/proc/self/ns/net" // of the runtime, which is where containerd is
	case strings.HasPrefix(network, "join=/"):
		path = strings.TrimPrefix(network, "join=")
	case strings.HasPrefix(network, "join="):
		id := strings.TrimPrefix(network, "join=")
		other, err := c.LoadContainer(ctx, id)
		if err != nil {
			return fmt.Errorf("--network %s: %w", network, err)
		}
		task, err := other.Task(ctx, nil)
		if err != nil {
			return fmt.Errorf("--network %s: the container does not run: %w", network, err)
		}
		path = fmt.Sprintf("/proc/%d/ns/net", task.Pid())
	default:
		return requestError("--network %s: it is host, none or join=ID", network)
	}
	spec.Linux.Namespaces[at].Path = path
	return nil
}

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/capture"
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
			if _, err := os.Lstat(filepath.Join(dir, embeddedSpec)); err == nil {
				return in(dir)
			}
		}
		if folders != nil {
			return fmt.Errorf("the image has no /%s: %w", embeddedSpec, errdefs.ErrInvalidArgument)
		}
		return mount.WithReadonlyTempMount(ctx, mounts, in)
	})
}

// What a runnable image has besides CRIU's images.
const (
	embeddedSpec   = ".stasis/spec.json"
	embeddedDevShm = ".stasis/devshm-checkpoint.tar"
)

// readSpec reads the spec of the container that was checkpointed.
func readSpec(root *os.Root) (*specs.Spec, error) {
	info, err := root.Lstat(embeddedSpec)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxSpec {
		return nil, fmt.Errorf("/.stasis/spec.json is no file, or larger than %d bytes: %w", maxSpec, errdefs.ErrInvalidArgument)
	}
	data, err := root.ReadFile(embeddedSpec)
	if err != nil {
		return nil, err
	}
	if err := capture.CheckJSON(data); err != nil {
		return nil, fmt.Errorf("/.stasis/spec.json: %w", err)
	}
	spec := &specs.Spec{}
	if err := json.Unmarshal(data, spec); err != nil {
		return nil, fmt.Errorf("/.stasis/spec.json: %v: %w", err, errdefs.ErrInvalidArgument)
	}
	if spec.Process == nil || spec.Linux == nil || spec.Root == nil {
		return nil, fmt.Errorf("/.stasis/spec.json describes no Linux container: %w", errdefs.ErrInvalidArgument)
	}
	return spec, nil
}

// amend makes of the spec of the container that was checkpointed that of the one
// that is restored, perhaps on another host and from another engine's. root is that
// of withEmbedded.
func amend(ctx context.Context, c *client.Client, container *containers.Container, spec *specs.Spec, root *os.Root, f *restoreFlags) error {
	spec.Root.Path = "rootfs"
	namespace, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return err
	}
	spec.Linux.CgroupsPath = cgroupsPath(spec.Linux.CgroupsPath, namespace, container.ID, exists("/run/systemd/system")) // sd_booted(3)
	// It is in no pod any more: by these the shim would look for its sandbox.
	for key := range spec.Annotations {
		if strings.HasPrefix(key, "io.kubernetes.") || strings.HasPrefix(key, "io.containerd.runc.v2.group") || strings.HasPrefix(key, "cdi.k8s.io") {
			delete(spec.Annotations, key)
		}
	}
	if f.tcpClose {
		if spec.Annotations == nil {
			spec.Annotations = map[string]string{}
		}
		spec.Annotations[checkpoint.AnnotationTCP] = "close"
	}
	if err := amendNetwork(ctx, c, spec, container.ID, f.network); err != nil {
		return err
	}
	for i, ns := range spec.Linux.Namespaces {
		switch {
		case ns.Path == "" || ns.Type == specs.NetworkNamespace || !ofProcess(ns.Path) && exists(ns.Path):
		case ns.Type == specs.PIDNamespace:
			// CRIU would have to know it from outside, like a network's.
			return fmt.Errorf("the container shared the process IDs of its pod (namespace %s), which cannot be had outside of that: %w", ns.Path, errdefs.ErrFailedPrecondition)
		default:
			spec.Linux.Namespaces[i].Path = "" // that of a sandbox which is gone
		}
	}
	return amendMounts(ctx, c, container, spec, root)
}

// cgroupsPath is where a container goes whose old one was at a path: below the
// same parent, unless that was of another engine. A path of systemd's form
// (slice:prefix:name) stays one where systemd is there to make it.
func cgroupsPath(old, namespace, id string, systemd bool) string {
	if parts := strings.Split(old, ":"); systemd && len(parts) == 3 {
		if slice, prefix := parts[0], parts[1]; !strings.Contains(slice, "kubepods") && !slices.Contains([]string{"cri-containerd", "crio", "libpod"}, prefix) {
			return slice + ":" + prefix + ":" + id
		}
		return "system.slice:stasis-" + namespace + ":" + id
	}
	if old == "" || strings.Contains(old, ":") || strings.Contains(old, "/kubepods") || strings.Contains(old, "/libpod") {
		return filepath.Join("/", namespace, id)
	}
	return filepath.Join(filepath.Dir(old), id)
}

// bySystemd tells whether the runtime is to have systemd make the control group.
func bySystemd(spec *specs.Spec) bool { return strings.Contains(spec.Linux.CgroupsPath, ":") }

// ofProcess tells whether a namespace is named by the number of a process in it,
// which is somebody else's by now, or will be.
func ofProcess(path string) bool {
	rest, ok := strings.CutPrefix(filepath.Clean(path), "/proc/")
	pid, _, _ := strings.Cut(rest, "/")
	_, err := strconv.Atoi(pid)
	return ok && err == nil && pid != "1"
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// isBind tells whether a mount has a source on the host.
func isBind(m specs.Mount) bool {
	return m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind")
}

// amendMounts gives the container files of its own for those that its engine made
// for it and that are not here, and refuses to do without anything else.
func amendMounts(ctx context.Context, c *client.Client, container *containers.Container, spec *specs.Spec, root *os.Root) error {
	var made, missing []int
	for i, m := range spec.Mounts {
		switch {
		case !isBind(m):
		case m.Destination == devShmMount && hasDevShm(root):
			made = append(made, i) // else it would share that of another container
		case exists(m.Source):
		case engineFile(m.Destination):
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
		if m.Source, err = makeFile(ctx, dir, m.Destination, spec.Hostname, root); err != nil {
			return fmt.Errorf("make %s for the container: %w", m.Destination, err)
		}
	}
	return nil
}

// amendNetwork sets the network namespace. CRIU brings processes that were in one
// which was made for them (the spec names it) back into any that is there. One
// that was the container's own it makes anew, and empty: the runtimes know no
// other way. Those that were in the host's cannot leave it.
func amendNetwork(ctx context.Context, c *client.Client, spec *specs.Spec, id, network string) error {
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
		if ofProcess(path) || !exists(path) {
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
		return usageError("--network %s: it is host, none or join=ID", network)
	}
	spec.Linux.Namespaces[at].Path = path
	return nil
}

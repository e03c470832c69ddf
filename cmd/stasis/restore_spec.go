package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/stasis-run/stasis/checkpoint"
)

// maxSpec bounds spec.json, as containerd's messages bound a spec, in bytes.
const maxSpec = 16 << 20

// embeddedSpec reads /.stasis/spec.json out of a container's new snapshot.
func embeddedSpec(ctx context.Context, c *client.Client, container *containers.Container) (*specs.Spec, error) {
	mounts, err := c.SnapshotService(container.Snapshotter).Mounts(ctx, container.SnapshotKey)
	if err != nil {
		return nil, fmt.Errorf("look at snapshot %s: %w", container.SnapshotKey, err)
	}
	var folders []string
	if _, lower := overlayFolders(mounts); len(lower) > 0 {
		folders = lower
	} else if len(mounts) == 1 && mounts[0].Type == "bind" {
		folders = []string{mounts[0].Source}
	}
	for _, dir := range folders {
		spec, err := readSpec(dir)
		if !errors.Is(err, fs.ErrNotExist) {
			return spec, err
		}
	}
	if folders != nil {
		return nil, fmt.Errorf("the image has no /.stasis/spec.json: %w", errdefs.ErrInvalidArgument)
	}
	var spec *specs.Spec
	err = mount.WithReadonlyTempMount(ctx, mounts, func(root string) (err error) {
		spec, err = readSpec(root)
		return err
	})
	return spec, err
}

// readSpec reads the spec from a folder that is somebody else's: no link in it is
// followed.
func readSpec(dir string) (*specs.Spec, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	name := filepath.Join(".stasis", "spec.json")
	info, err := root.Lstat(name)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxSpec {
		return nil, fmt.Errorf("/.stasis/spec.json is no file, or larger than %d bytes: %w", maxSpec, errdefs.ErrInvalidArgument)
	}
	data, err := root.ReadFile(name)
	if err != nil {
		return nil, err
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
// that is restored.
func amend(ctx context.Context, c *client.Client, spec *specs.Spec, id string, f *restoreFlags) error {
	spec.Root.Path = "rootfs"
	namespace, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return err
	}
	// systemd's form is slice:prefix:name.
	if parts := strings.Split(spec.Linux.CgroupsPath, ":"); len(parts) == 3 {
		spec.Linux.CgroupsPath = parts[0] + ":" + parts[1] + ":" + id
	} else if spec.Linux.CgroupsPath != "" && !strings.Contains(spec.Linux.CgroupsPath, "/kubepods") {
		spec.Linux.CgroupsPath = filepath.Join(filepath.Dir(spec.Linux.CgroupsPath), id)
	} else {
		spec.Linux.CgroupsPath = filepath.Join("/", namespace, id)
	}
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
	if err := amendNetwork(ctx, c, spec, f.network); err != nil {
		return err
	}
	var missing []string
	for i, ns := range spec.Linux.Namespaces {
		if ns.Path == "" || ns.Type == specs.NetworkNamespace {
			continue
		}
		if _, err := os.Stat(ns.Path); errors.Is(err, fs.ErrNotExist) {
			spec.Linux.Namespaces[i].Path = "" // that of a sandbox which is gone
		}
	}
	for _, m := range spec.Mounts {
		if m.Type != "bind" && !slices.Contains(m.Options, "bind") && !slices.Contains(m.Options, "rbind") {
			continue
		}
		if _, err := os.Stat(m.Source); errors.Is(err, fs.ErrNotExist) {
			missing = append(missing, fmt.Sprintf("%s (for %s)", m.Source, m.Destination))
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("the container had mounts whose sources are not on this host: %s: %w", strings.Join(missing, ", "), errdefs.ErrFailedPrecondition)
	}
	return nil
}

// amendNetwork sets the network namespace. CRIU brings processes that had one
// back into another, but none that had the host's.
func amendNetwork(ctx context.Context, c *client.Client, spec *specs.Spec, network string) error {
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
		if _, err := os.Stat(path); err != nil {
			return fmt.Errorf("the container was in network namespace %s, which is gone: say which it gets with --network: %w", path, errdefs.ErrFailedPrecondition)
		}
	case network == "none":
	case network == "host":
		path = "/proc/1/ns/net"
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

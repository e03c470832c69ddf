package node

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/errdefs"

	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/checkpoint/rootfs"
)

// Podman, CRI-O and the kubelet make some files for every container and bind them
// into it (allow.EngineFile). A checkpoint does not have them, and CRIU brings a
// container back only with a mount in each of their places.
const devShmMount = "/dev/shm" // a folder, of Podman's

// filesFolder makes a folder that goes with a container which is about to be made:
// a snapshot of its own, without a parent. The container's label keeps it, so
// whoever deletes the container, containerd removes it then. The lease of ctx
// keeps it until the container is there.
func filesFolder(ctx context.Context, c *client.Client, container *containers.Container) (string, error) {
	key := container.ID + "-files-" + rand.Text() // after the name is used again
	mounts, err := c.SnapshotService(container.Snapshotter).Prepare(ctx, key, "")
	if err != nil {
		return "", fmt.Errorf("make a folder for what the container's engine had mounted: %w", err)
	}
	if len(mounts) != 1 || mounts[0].Type != "bind" {
		return "", fmt.Errorf("the container had files of its engine (/etc/hosts and the like), which snapshotter %s has no place for: give --snapshotter overlayfs: %w",
			container.Snapshotter, errdefs.ErrFailedPrecondition)
	}
	if container.Labels == nil {
		container.Labels = map[string]string{}
	}
	container.Labels["containerd.io/gc.ref.snapshot."+container.Snapshotter] = key
	return mounts[0].Source, nil
}

// makeFile makes what is mounted at a destination, as engines do, and returns its
// path in dir. root is that of withEmbedded.
func makeFile(ctx context.Context, dir, destination, hostname string, root *os.Root) (string, error) {
	path := filepath.Join(dir, strings.ReplaceAll(strings.TrimPrefix(destination, "/"), "/", "-"))
	mode := fs.FileMode(0o644)
	var text []byte
	switch destination {
	case devShmMount:
		return path, makeDevShm(ctx, path, root)
	case "/etc/hosts":
		text = []byte(strings.TrimSpace("127.0.0.1 localhost "+hostname) + "\n::1 localhost ip6-localhost ip6-loopback\n")
	case "/etc/hostname":
		text = []byte(hostname + "\n")
	case "/etc/resolv.conf":
		var err error
		if text, err = os.ReadFile(destination); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
	case "/dev/termination-log":
		mode = 0o666 // as the kubelet has it: the container's user writes there
	}
	if err := os.WriteFile(path, text, mode); err != nil {
		return "", err
	}
	return path, os.Chmod(path, mode) // whatever the umask is
}

// makeDevShm makes a folder for /dev/shm. It is on a disk: a tmpfs would have to
// be unmounted by whoever deletes the container.
func makeDevShm(ctx context.Context, path string, root *os.Root) error {
	if err := os.Mkdir(path, 0o700); err != nil {
		return err
	}
	if hasDevShm(root) {
		f, err := root.Open(layout.EmbeddedDevShm)
		if err != nil {
			return err
		}
		defer f.Close()
		if _, err := rootfs.Apply(ctx, path, f); err != nil {
			return err
		}
	}
	return os.Chmod(path, 0o777|fs.ModeSticky)
}

// hasDevShm tells whether the checkpoint tells what was in /dev/shm.
func hasDevShm(root *os.Root) bool {
	info, err := root.Lstat(layout.EmbeddedDevShm)
	return err == nil && info.Mode().IsRegular()
}

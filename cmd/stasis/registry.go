package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/log"
	dockerconfig "github.com/docker/cli/cli/config"
	"github.com/docker/cli/cli/config/types"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/stasis-run/stasis/checkpoint/image"
)

// hostsDir is where containerd keeps what it knows of registries: mirrors,
// certificates.
const hostsDir = "/etc/containerd/certs.d"

// resolver talks to registries. With plainHTTP without TLS; to one on localhost
// with a port it does so by itself if that has no TLS. tracker may be nil.
func resolver(ctx context.Context, plainHTTP bool, tracker docker.StatusTracker) remotes.Resolver {
	// It tells on stderr that it tries TLS first.
	_ = log.SetLevel("error")
	o := config.HostOptions{HostDir: config.HostDirFromRoot(hostsDir), Credentials: credentials}
	if plainHTTP {
		o.DefaultScheme = "http"
	}
	return docker.NewResolver(docker.ResolverOptions{Hosts: config.ConfigureHosts(ctx, o), Tracker: tracker})
}

// credentials returns user and password, or "" and a token, for a registry, from
// the files of Docker and Podman or the credential helpers that they name. There
// may be none.
func credentials(host string) (user, secret string, err error) {
	if host == "registry-1.docker.io" {
		host = "https://index.docker.io/v1/" // Docker Hub's name in those files
	}
	for _, path := range credentialFiles() {
		found, err := credentialsIn(path, host)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue
		case err != nil:
			return "", "", fmt.Errorf("look in %s for credentials for %s: %w", path, host, err)
		case found.IdentityToken != "":
			return "", found.IdentityToken, nil
		case found.Username != "":
			return found.Username, found.Password, nil
		}
	}
	return "", "", nil
}

// credentialFiles are where Docker and Podman keep credentials; see docker-login
// and containers-auth.json(5).
func credentialFiles() (paths []string) {
	if path := os.Getenv("REGISTRY_AUTH_FILE"); path != "" {
		paths = append(paths, path)
	}
	home, _ := os.UserHomeDir()
	paths = append(paths, filepath.Join(env("DOCKER_CONFIG", filepath.Join(home, ".docker")), "config.json"))
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		paths = append(paths, filepath.Join(dir, "containers", "auth.json"))
	}
	return append(paths,
		fmt.Sprintf("/run/containers/%d/auth.json", os.Getuid()),
		filepath.Join(env("XDG_CONFIG_HOME", filepath.Join(home, ".config")), "containers", "auth.json"),
	)
}

func credentialsIn(path, host string) (types.AuthConfig, error) {
	f, err := os.Open(path)
	if err != nil {
		return types.AuthConfig{}, err
	}
	defer f.Close()
	file, err := dockerconfig.LoadFromReader(f)
	if err != nil {
		return types.AuthConfig{}, err
	}
	return file.GetAuthConfig(host)
}

// uploads is a docker.StatusTracker that moves a bar.
type uploads struct {
	docker.StatusTracker
	bar *progress

	mu   sync.Mutex
	sent map[string]docker.Status
}

func trackUploads(bar *progress) *uploads {
	return &uploads{StatusTracker: docker.NewInMemoryTracker(), bar: bar, sent: map[string]docker.Status{}}
}

// SetStatus implements docker.StatusTracker.
func (u *uploads) SetStatus(ref string, s docker.Status) {
	u.StatusTracker.SetStatus(ref, s)
	u.mu.Lock()
	defer u.mu.Unlock()
	u.sent[ref] = s
	var done, total int64
	for _, s := range u.sent {
		if s.Exists {
			continue // the registry has it
		}
		done += s.Offset
		total += s.Total
	}
	u.bar.Set(done, total)
}

// push sends the image called ref to a registry as target, which may be the
// same name. Only what the registry lacks is sent.
func (a *app) push(ctx context.Context, c *client.Client, ref, target string, plainHTTP bool, bar *progress) error {
	img, err := c.ImageService().Get(ctx, ref)
	if err != nil {
		return fmt.Errorf("push %s: %w", ref, err)
	}
	bar.Stage("push")
	r := resolver(ctx, plainHTTP, trackUploads(bar))
	if err := c.Push(ctx, target, img.Target, client.WithResolver(r)); err != nil {
		return fmt.Errorf("push %s to %s: %w", ref, target, err)
	}
	return nil
}

// pull fetches an image from a registry, and names it. ctx may have a lease.
func (a *app) pull(ctx context.Context, c *client.Client, ref string, plainHTTP bool, bar *progress) (images.Image, error) {
	// containerd's client would make one, and not remove it if it is interrupted.
	ctx, done, err := image.WithLease(ctx, c.LeasesService())
	if err != nil {
		return images.Image{}, err
	}
	defer done()
	bar.Stage("pull")
	d := &downloads{store: c.ContentStore(), bar: bar}
	stop := d.watch(ctx)
	defer stop()
	// Fetch rather than Pull: that takes one manifest of an index, and the
	// checkpoints of containerd's clients are an index of several parts.
	img, err := c.Fetch(ctx, ref, client.WithResolver(resolver(ctx, plainHTTP, nil)),
		client.WithImageHandler(image.Bounded()), client.WithImageHandler(images.HandlerFunc(d.found)))
	if err != nil {
		return images.Image{}, fmt.Errorf("pull %s: %w", ref, err)
	}
	form, err := image.Detect(ctx, c.ContentStore(), img.Target)
	if err != nil {
		return images.Image{}, fmt.Errorf("pull %s: %w", ref, err)
	}
	if form == image.None {
		return img, nil
	}
	// Only now it has the labels of a checkpoint.
	return image.Save(ctx, c.ContentStore(), c.ImageService(), ref, img.Target, nil)
}

// downloads moves a bar while containerd's client downloads. The client does not
// tell how far it is; the store does.
type downloads struct {
	store content.Store
	bar   *progress

	mu    sync.Mutex
	blobs map[digest.Digest]int64 // that belong to the image; sizes
}

func (d *downloads) found(_ context.Context, desc ocispec.Descriptor) ([]ocispec.Descriptor, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.blobs == nil {
		d.blobs = map[digest.Digest]int64{}
	}
	d.blobs[desc.Digest] = desc.Size
	return nil, nil
}

// watch looks how far it is until the function that it returns is called.
func (d *downloads) watch(ctx context.Context) (stop func()) {
	if d.bar.silent() {
		return func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for t := time.NewTicker(200 * time.Millisecond); ; {
			select {
			case <-ctx.Done():
				t.Stop()
				return
			case <-t.C:
				d.look(ctx)
			}
		}
	}()
	return func() { cancel(); <-done }
}

func (d *downloads) look(ctx context.Context) {
	active, err := d.store.ListStatuses(ctx)
	if err != nil {
		return // the bar stays where it is
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	var have, total int64
	for blob, size := range d.blobs {
		total += size
		if _, err := d.store.Info(ctx, blob); err == nil {
			have += size
		}
	}
	for _, s := range active {
		if _, ok := d.blobs[s.Expected]; ok {
			have += s.Offset
		}
	}
	d.bar.Set(min(have, total), total)
}

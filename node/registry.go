package node

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/log"
	"github.com/distribution/reference"
	dockerconfig "github.com/docker/cli/cli/config"
	"github.com/docker/cli/cli/config/types"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sirupsen/logrus"

	"github.com/stasis-run/stasis/checkpoint/oci"
)

// HostsDir is where containerd keeps what it knows of registries: mirrors,
// certificates.
const HostsDir = "/etc/containerd/certs.d"

// quiet is a context in which containerd's packages log nothing: the resolver would tell
// on stderr that it tries TLS first. What fails is in the error.
func quiet(ctx context.Context) context.Context {
	l := logrus.New()
	l.SetOutput(io.Discard)
	return log.WithLogger(ctx, logrus.NewEntry(l))
}

// Registry says how to talk to registries.
type Registry struct {
	PlainHTTP bool // without TLS, which one on localhost may be without anyway
	// Login is for one registry. Others, or all if it is nil, get the credentials of
	// "docker login" and "podman login" of this process's user.
	Login *Login
}

// Login is how to log in to a registry.
type Login struct {
	Registry           string // host, or host:port, as in the names of its images
	Username, Password string // without a username, the password is an identity token
}

// String implements fmt.Stringer, so that no log or error has the password.
func (l *Login) String() string {
	if l == nil {
		return "none"
	}
	return l.Username + " at " + l.Registry
}

// check refuses a login that is not one, or not for the registry of the image ref, which
// would get other credentials.
func (r Registry) check(ref string) error {
	l := r.Login
	if l == nil {
		return nil
	}
	if l.Registry == "" || strings.ContainsAny(l.Registry, "/@ ") {
		return requestError("login: registry %q: give the host, or host:port, as in the names of its images", l.Registry)
	}
	if l.Password == "" {
		return requestError("login: there is no password for %s", l.Registry)
	}
	if named, err := reference.ParseDockerRef(ref); err == nil && apiHost(reference.Domain(named)) != apiHost(l.Registry) {
		return requestError("login: it is for %s, and %s is of registry %s", l.Registry, ref, reference.Domain(named))
	}
	return nil
}

// credentials are for a host: the name of a registry, or of a mirror, which are not given
// the login of another.
func (r Registry) credentials(host string) (user, secret string, err error) {
	if l := r.Login; l != nil && host == apiHost(l.Registry) {
		return l.Username, l.Password, nil
	}
	return credentials(host)
}

// apiHost is where a registry is: Docker Hub is not where its images' names say.
func apiHost(registry string) string {
	if registry == "index.docker.io" { // its name in Docker's own files
		registry = "docker.io"
	}
	if host, err := docker.DefaultHost(registry); err == nil {
		return host
	}
	return registry
}

// resolver talks to registries. One on localhost with a port it talks to without TLS if
// that has none. tracker may be nil.
func (r Registry) resolver(ctx context.Context, tracker docker.StatusTracker) remotes.Resolver {
	o := config.HostOptions{HostDir: config.HostDirFromRoot(HostsDir), Credentials: r.credentials}
	if r.PlainHTTP {
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
	paths = append(paths, filepath.Join(cmp.Or(os.Getenv("DOCKER_CONFIG"), filepath.Join(home, ".docker")), "config.json"))
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		paths = append(paths, filepath.Join(dir, "containers", "auth.json"))
	}
	return append(paths,
		fmt.Sprintf("/run/containers/%d/auth.json", os.Getuid()),
		filepath.Join(cmp.Or(os.Getenv("XDG_CONFIG_HOME"), filepath.Join(home, ".config")), "containers", "auth.json"),
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
	bar *stages

	mu   sync.Mutex
	sent map[string]docker.Status
}

func trackUploads(bar *stages) *uploads {
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
	u.bar.set(done, total)
}

// PushRequest says what image to send to a registry.
type PushRequest struct {
	Ref string
	// Target is its name there; empty: its own.
	Target   string
	Registry Registry
	Progress Progress
}

// Push sends a checkpoint to a registry: what that lacks.
func (n *Node) Push(ctx context.Context, r PushRequest) (*Image, error) {
	if err := r.Registry.check(cmp.Or(r.Target, r.Ref)); err != nil {
		return nil, err
	}
	c, err := n.Client(ctx)
	if err != nil {
		return nil, err
	}
	img, err := findCheckpoint(ctx, c, r.Ref)
	if err != nil {
		return nil, err
	}
	target := img.Name
	if r.Target != "" {
		if target, err = fullName(r.Target); err != nil {
			return nil, err
		}
	}
	bar := r.Progress.of(target)
	defer bar.end()
	if err := push(ctx, c, img.Name, target, r.Registry, bar); err != nil {
		return nil, err
	}
	return &Image{target, img.Target.Digest.String()}, nil
}

// push sends the image called ref to a registry as target, which may be the
// same name. Only what the registry lacks is sent.
func push(ctx context.Context, c *client.Client, ref, target string, registry Registry, bar *stages) error {
	img, err := c.ImageService().Get(ctx, ref)
	if err != nil {
		return fmt.Errorf("push %s: %w", ref, err)
	}
	bar.begin("push")
	ctx = quiet(ctx)
	if err := c.Push(ctx, target, img.Target, client.WithResolver(registry.resolver(ctx, trackUploads(bar)))); err != nil {
		return fmt.Errorf("push %s to %s: %w", ref, target, err)
	}
	return nil
}

// PullRequest says what image to fetch from a registry.
type PullRequest struct {
	Ref      string
	Registry Registry
	Progress Progress
}

// Pull fetches a checkpoint, or any other image, from a registry.
func (n *Node) Pull(ctx context.Context, r PullRequest) (*Image, error) {
	if err := r.Registry.check(r.Ref); err != nil {
		return nil, err
	}
	ref, err := fullName(r.Ref)
	if err != nil {
		return nil, err
	}
	c, err := n.Client(ctx)
	if err != nil {
		return nil, err
	}
	bar := r.Progress.of(ref)
	defer bar.end()
	img, err := n.pull(ctx, c, ref, r.Registry, bar)
	if err != nil {
		return nil, err
	}
	return &Image{img.Name, img.Target.Digest.String()}, nil
}

// pull fetches an image from a registry, and names it. ctx may have a lease.
func (n *Node) pull(ctx context.Context, c *client.Client, ref string, registry Registry, bar *stages) (images.Image, error) {
	// containerd's client would make one, and not remove it if it is interrupted.
	ctx, done, err := n.lease(ctx, c.LeasesService())
	if err != nil {
		return images.Image{}, err
	}
	defer done()
	bar.begin("pull")
	ctx = quiet(ctx)
	d := &downloads{store: c.ContentStore(), bar: bar}
	stop := d.watch(ctx)
	defer stop()
	// Fetch rather than Pull: that takes one manifest of an index, and the
	// checkpoints of containerd's clients are an index of several parts.
	img, err := c.Fetch(ctx, ref, client.WithResolver(registry.resolver(ctx, nil)),
		client.WithImageHandler(oci.Bounded()), client.WithImageHandler(images.HandlerFunc(d.found)))
	if err != nil {
		return images.Image{}, fmt.Errorf("pull %s: %w", ref, err)
	}
	format, err := oci.Detect(ctx, c.ContentStore(), img.Target)
	if err != nil {
		return images.Image{}, fmt.Errorf("pull %s: %w", ref, err)
	}
	if format == oci.None {
		return img, nil
	}
	// Only now it has the labels of a checkpoint.
	return oci.Save(ctx, c.ContentStore(), c.ImageService(), ref, img.Target, nil)
}

// downloads moves a bar while containerd's client downloads. The client does not
// tell how far it is; the store does.
type downloads struct {
	store content.Store
	bar   *stages

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
	d.bar.set(min(have, total), total)
}

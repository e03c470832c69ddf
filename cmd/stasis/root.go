package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/identifiers"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/image"
)

// app is what the commands share: the global flags, the standard streams and
// the connection to containerd.
type app struct {
	address, namespace string
	state              string
	output             choice
	quiet              bool
	maxSize            byteSize

	in  io.Reader
	out *output
	err io.Writer

	// added are images that were made under names that nobody typed, or pulled for
	// them. A restore that fails removes them again.
	added []images.Image

	// started: the command line was good, and a command is at work.
	started bool

	mu     sync.Mutex
	client *client.Client
	bars   *bars
}

const (
	defaultAddress   = "/run/containerd/containerd.sock"
	defaultNamespace = "default"
)

func newRootCommand(a *app) *cobra.Command {
	root := &cobra.Command{
		Use:   "stasis",
		Short: "Checkpoint containers, restore them, ship and look at checkpoints",
		Long: `Stasis saves a running container with its memory, open files and connections,
and starts it again, here or elsewhere. A checkpoint is an image: it lies in
containerd's image store, and travels through any registry.

Exit codes: 0 done; 1 failed; 2 wrong usage, nothing was done; 130 interrupted by a
signal; 141 whoever read the output has ended, as head does. Results go to stdout,
all else to stderr; what cannot be written to stdout is a failure. A signal
(SIGINT, SIGTERM, SIGHUP) ends a command when it has cleaned up, a second one at once.`,
		SilenceErrors: true,
		SilenceUsage:  true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			if err := identifiers.Validate(a.namespace); err != nil {
				return fmt.Errorf("--namespace: %w", err)
			}
			a.started = true
			cmd.SetContext(namespaces.WithNamespace(cmd.Context(), a.namespace))
			return nil
		},
	}
	cobra.EnableCommandSorting = false // commands has an order of its own
	root.SetIn(a.in)
	if a.out != nil {
		root.SetOut(a.out)
	}
	root.SetErr(a.err)
	a.output = choice{"table", []string{"table", "json"}}
	f := root.PersistentFlags()
	f.StringVar(&a.address, "address", env("CONTAINERD_ADDRESS", defaultAddress),
		"containerd's socket; $CONTAINERD_ADDRESS")
	f.StringVarP(&a.namespace, "namespace", "n", env("CONTAINERD_NAMESPACE", defaultNamespace),
		"containerd's namespace, k8s.io for Kubernetes; $CONTAINERD_NAMESPACE")
	// What help says shall not depend on who asks.
	f.Lookup("address").DefValue = defaultAddress
	f.Lookup("namespace").DefValue = defaultNamespace
	f.VarP(&a.output, "output", "o", "what to print: table or json")
	f.StringVar(&a.state, "state", "/var/lib/stasis", "folder for work under way")
	f.BoolVarP(&a.quiet, "quiet", "q", false, "no progress bars")
	must(root.RegisterFlagCompletionFunc("output", a.output.complete))
	must(root.RegisterFlagCompletionFunc("namespace", a.completeNamespaces))
	must(root.MarkPersistentFlagDirname("state"))
	root.AddCommand(commands(a)...)
	return root
}

func env(name, fallback string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return fallback
}

// must is for errors that only a mistake in this program can cause.
func must(err error) {
	if err != nil {
		panic(err)
	}
}

// choice is a flag that takes one of a few words.
type choice struct {
	value string
	of    []string
}

func (c *choice) String() string { return c.value }
func (c *choice) Type() string   { return strings.Join(c.of, "|") }
func (c *choice) Set(v string) error {
	if !slices.Contains(c.of, v) {
		return fmt.Errorf("it is one of %s", strings.Join(c.of, ", "))
	}
	c.value = v
	return nil
}

func (c *choice) complete(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	return c.of, cobra.ShellCompDirectiveNoFileComp
}

// json tells whether a program reads our results.
func (a *app) json() bool { return a.output.value == "json" }

// connect returns the client of containerd, which is made at the first call.
// Its calls need a context with a namespace; those of commands have one.
func (a *app) connect(ctx context.Context) (*client.Client, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.client != nil {
		return a.client, nil
	}
	address := strings.TrimPrefix(a.address, "unix://")
	// The client would connect in the background, and every call report a
	// socket that is not there in its own way.
	conn, err := (&net.Dialer{Timeout: 10 * time.Second}).DialContext(ctx, "unix", address)
	if err != nil {
		return nil, connectError(address, err)
	}
	conn.Close()
	c, err := client.New(address, client.WithTimeout(10*time.Second))
	if err != nil {
		return nil, connectError(address, err)
	}
	a.client = c
	return c, nil
}

// leased is connect with a context that keeps what is stored with it from
// containerd's garbage collector, until done is called.
func (a *app) leased(ctx context.Context) (_ context.Context, _ *client.Client, done func(), _ error) {
	c, err := a.connect(ctx)
	if err != nil {
		return ctx, nil, nil, err
	}
	ctx, done, err = image.WithLease(ctx, c.LeasesService())
	return ctx, c, done, err
}

func connectError(address string, err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("no containerd at %s: start it, or name its socket with --address: %w", address, err)
	case errors.Is(err, unix.ECONNREFUSED):
		return fmt.Errorf("containerd does not answer at %s: is it running? %w", address, err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("no permission to talk to containerd at %s: run as root: %w", address, err)
	}
	return fmt.Errorf("connect to containerd at %s: %w", address, err)
}

// close ends what the commands share.
func (a *app) close() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.stopBars()
	if a.client != nil {
		a.client.Close()
	}
}

// endProgress draws no bars any more.
func (a *app) endProgress() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.stopBars()
}

// stopBars is endProgress with mu held.
func (a *app) stopBars() {
	if a.bars != nil {
		a.bars.stop()
		a.bars = nil
	}
}

// stateDir returns the folder of that name in the state folder, which it makes
// if need be. Checkpoints hold memory, so nobody else may look into it.
func (a *app) stateDir(name string) (string, error) {
	if err := os.MkdirAll(a.state, 0o700); err != nil {
		return "", fmt.Errorf("make the state folder: %w", err)
	}
	info, err := os.Stat(a.state)
	if err != nil {
		return "", fmt.Errorf("look at the state folder: %w", err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return "", fmt.Errorf("state folder %s has mode %o, so others may read checkpoints in it: chmod 700 it, or give another with --state",
			a.state, info.Mode().Perm())
	}
	dir := filepath.Join(a.state, name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("make a folder for the work: %w", err)
	}
	return dir, nil
}

package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/pkg/identifiers"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/spf13/cobra"
	"github.com/vbauerster/mpb/v8"

	"github.com/stasis-run/stasis/node"
)

// app is what the commands share: the global flags, the standard streams and
// the node.
type app struct {
	address, namespace string
	state              string
	output             choice
	quiet              bool
	host               hostFlags
	maxSize            byteSize

	in  io.Reader
	out *output
	err io.Writer

	// started: the command line was good, and a command is at work.
	started bool

	// remote is the node of --host; nil: this one.
	remote *remote

	mu sync.Mutex
	n  *node.Node // see node
	// bars are drawn on the terminal; nil: none has begun. barsEnded: none will.
	bars      *mpb.Progress
	barsEnded bool
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
			if err := a.setHost(cmd); err != nil {
				return err
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
	a.host.add(root)
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

// node returns what does the work, which is made at the first call.
func (a *app) node() *node.Node {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.n == nil {
		a.n = node.Dial(a.address, node.Options{State: a.state, Version: version, Logger: slog.New(&notes{a}), IdleCPUs: idleCPUs})
	}
	return a.n
}

// notes prints what the node has to tell as commands do: as a line on stderr.
type notes struct{ a *app }

// Enabled implements slog.Handler. With --quiet, only what went wrong is told.
func (n *notes) Enabled(_ context.Context, level slog.Level) bool {
	return level >= slog.LevelWarn || level >= slog.LevelInfo && !n.a.quiet
}

// Handle implements slog.Handler.
func (n *notes) Handle(_ context.Context, r slog.Record) error {
	_, err := fmt.Fprintf(n.a.err, "stasis: %s\n", r.Message)
	return err
}

// WithAttrs and WithGroup implement slog.Handler; the node's messages say all.
func (n *notes) WithAttrs([]slog.Attr) slog.Handler { return n }
func (n *notes) WithGroup(string) slog.Handler      { return n }

// close ends what the commands share.
func (a *app) close() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.stopBars()
	if a.n != nil {
		a.n.Close()
	}
	if a.remote != nil {
		a.remote.c.Close()
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
	a.barsEnded = true
	if a.bars != nil {
		a.bars.Shutdown()
		a.bars = nil
	}
}

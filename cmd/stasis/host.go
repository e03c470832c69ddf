package main

import (
	"context"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/stasis-run/stasis/node"
	"github.com/stasis-run/stasis/node/rest/v1"
)

// operations are what commands have done on a node: this one (node.Node), or that of
// --host (remote).
type operations interface {
	Checkpoint(context.Context, node.CheckpointRequest) ([]node.CheckpointResult, error)
	Restore(context.Context, node.RestoreRequest) (*node.RestoreResult, error)
	List(context.Context, node.ListRequest) ([]node.Listed, error)
	Inspect(context.Context, node.InspectRequest) (*node.Inspection, error)
	Diff(context.Context, node.DiffRequest) (*node.Difference, error)
	Verify(ctx context.Context, ref string) (*node.Verification, error)
	Remove(ctx context.Context, refs ...string) ([]string, error)
	Push(context.Context, node.PushRequest) (*node.Image, error)
	Pull(context.Context, node.PullRequest) (*node.Image, error)
	Export(context.Context, node.ExportRequest) error
	Import(context.Context, node.ImportRequest) (*node.ImportResult, error)
	Check(context.Context) []node.Finding
}

// operations returns those of this node, or of --host.
func (a *app) operations() operations {
	if a.remote != nil {
		return a.remote
	}
	return a.node()
}

// hostFlags say which stasisd does the work.
type hostFlags struct {
	url       string
	tokenFile string
	tls       v1.Options
}

func (h *hostFlags) add(root *cobra.Command) {
	f := root.PersistentFlags()
	f.StringVar(&h.url, "host", env("STASIS_HOST", ""), "work on another node, by its stasisd: https://HOST:PORT or unix:///PATH; $STASIS_HOST")
	f.StringVar(&h.tokenFile, "token-file", env("STASIS_TOKEN_FILE", ""), "file with the token for --host; $STASIS_TOKEN_FILE, or the token itself in $STASIS_TOKEN")
	f.StringVar(&h.tls.CA, "tls-ca", "", "PEM file with the authority of the certificate of --host; default: the system's")
	f.StringVar(&h.tls.Cert, "tls-cert", "", "PEM file with a certificate to show to --host")
	f.StringVar(&h.tls.Key, "tls-key", "", "PEM file with its key")
	for _, name := range []string{"host", "token-file"} {
		f.Lookup(name).DefValue = ""
	}
	must(root.RegisterFlagCompletionFunc("host", cobra.NoFileCompletions))
}

// connect makes the client of --host; nil without it.
func (h *hostFlags) connect(namespace string) (*remote, error) {
	if h.url == "" {
		return nil, nil
	}
	o := h.tls
	o.Namespace, o.Token = namespace, os.Getenv("STASIS_TOKEN")
	if h.tokenFile != "" {
		data, err := os.ReadFile(h.tokenFile)
		if err != nil {
			return nil, fmt.Errorf("--token-file: %w", err)
		}
		o.Token = strings.TrimSpace(string(data))
	}
	c, err := v1.New(h.url, o)
	if err != nil {
		return nil, fmt.Errorf("--host: %w", err)
	}
	return &remote{c}, nil
}

// onlyHere marks a command that works on this host, and by no stasisd.
func onlyHere(cmd *cobra.Command) *cobra.Command {
	cmd.Annotations = map[string]string{annotationOnlyHere: ""}
	return cmd
}

const annotationOnlyHere = "only here"

// checkHost refuses what is for this host beside --host. $STASIS_HOST does not count beside
// it: the shim calls `stasis stage --address …`, and has the environment of containerd.
func (a *app) checkHost(cmd *cobra.Command) error {
	for _, name := range []string{"address", "state"} {
		switch {
		case !cmd.Flags().Changed(name):
		case cmd.Flags().Changed("host"):
			return usageError("--%s is of this host, and --host of another", name)
		default:
			a.host.url = ""
		}
	}
	if a.host.url == "" {
		return nil
	}
	for c := cmd; c != nil; c = c.Parent() {
		if _, only := c.Annotations[annotationOnlyHere]; only {
			return usageError("stasis %s works on this host alone: run it there, or without --host", c.Name())
		}
	}
	return nil
}

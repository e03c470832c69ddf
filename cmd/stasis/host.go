package main

import (
	"cmp"
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
	f.StringVar(&h.tokenFile, "token-file", "", "file with the token for --host; $STASIS_TOKEN_FILE, or the token itself in $STASIS_TOKEN")
	f.StringVar(&h.tls.CA, "tls-ca", "", "PEM file with the authority of the certificate of --host; default: the system's")
	f.StringVar(&h.tls.Cert, "tls-cert", "", "PEM file with a certificate to show to --host")
	f.StringVar(&h.tls.Key, "tls-key", "", "PEM file with its key")
	f.Lookup("host").DefValue = ""
	must(root.RegisterFlagCompletionFunc("host", cobra.NoFileCompletions))
}

// connect makes the client of --host; nil without it.
func (h *hostFlags) connect(namespace string) (*remote, error) {
	if h.url == "" {
		return nil, nil
	}
	o := h.tls
	o.Namespace = namespace
	file := h.tokenFile
	// What is in the environment is for the host there.
	if of := os.Getenv("STASIS_HOST"); of == "" || of == h.url {
		o.Token, file = os.Getenv("STASIS_TOKEN"), cmp.Or(file, os.Getenv("STASIS_TOKEN_FILE"))
	}
	if file != "" {
		data, err := os.ReadFile(file)
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

// Where a command works: what has neither annotation is about no node.
const (
	annotationAnywhere = "anywhere"
	annotationOnlyHere = "only here"
)

// anywhere marks a command that works on the node of --host, too.
func anywhere(cmd *cobra.Command) *cobra.Command { return annotated(cmd, annotationAnywhere) }

// onlyHere marks a command that works on this node, and by no stasisd.
func onlyHere(cmd *cobra.Command) *cobra.Command { return annotated(cmd, annotationOnlyHere) }

func annotated(cmd *cobra.Command, annotation string) *cobra.Command {
	cmd.Annotations = map[string]string{annotation: ""}
	return cmd
}

// setHost connects to --host if the command is to work there, and refuses what does not go
// with it. $STASIS_HOST does not count beside flags of this host.
func (a *app) setHost(cmd *cobra.Command) (err error) {
	typed := cmd.Flags().Changed("host")
	for _, name := range []string{"address", "state"} {
		switch {
		case !cmd.Flags().Changed(name):
		case typed:
			return usageError("--%s is of this host, and --host of another", name)
		default:
			a.host.url = ""
		}
	}
	if a.host.url == "" {
		for _, name := range []string{"token-file", "tls-ca", "tls-cert", "tls-key"} {
			if cmd.Flags().Changed(name) {
				return usageError("--%s is for --host, which is missing", name)
			}
		}
		return nil
	}
	for c := cmd; c != nil; c = c.Parent() {
		if _, is := c.Annotations[annotationAnywhere]; is {
			a.remote, err = a.host.connect(a.namespace)
			return err
		}
		if _, is := c.Annotations[annotationOnlyHere]; is {
			return usageError("stasis %s works on this host alone: run it there, or here without --host (and $STASIS_HOST)", c.Name())
		}
	}
	if typed {
		return usageError("stasis %s does not go with --host", cmd.Name())
	}
	return nil
}

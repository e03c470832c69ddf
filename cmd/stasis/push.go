package main

import (
	"github.com/spf13/cobra"

	"github.com/stasis-run/stasis/node"
)

const registryHelp = `

Credentials are those of "docker login" and "podman login"; what containerd knows
of the registry in ` + node.HostsDir + ` applies. A registry on localhost may be without
TLS, others with --plain-http.`

func newPushCommand(a *app) *cobra.Command {
	var plainHTTP bool
	cmd := &cobra.Command{
		Use:   "push REF [TARGET]",
		Short: "Send a checkpoint to a registry",
		Long: `Send a checkpoint to a registry, under its own name or as TARGET. Only what the
registry lacks is sent.` + registryHelp,
		Example: `  stasis push registry.example.com/backup/db:1
  stasis push localhost/db:20260102-030405 registry.example.com/backup/db:1`,
		Args:              cobra.RangeArgs(1, 2),
		ValidArgsFunction: firstArgs(1, a.completeCheckpoints()),
		RunE: func(cmd *cobra.Command, args []string) error {
			r := node.PushRequest{Ref: args[0], Registry: node.Registry{PlainHTTP: plainHTTP}, Progress: a.progress()}
			if len(args) > 1 {
				r.Target = args[1]
			}
			img, err := a.operations().Push(cmd.Context(), r)
			if err != nil {
				return err
			}
			return a.printImage(*img)
		},
	}
	cmd.Flags().BoolVar(&plainHTTP, "plain-http", false, "without TLS")
	return cmd
}

func newPullCommand(a *app) *cobra.Command {
	var plainHTTP bool
	cmd := &cobra.Command{
		Use:   "pull REF",
		Short: "Fetch a checkpoint from a registry",
		Long: `Fetch a checkpoint from a registry. Other images can be fetched as well, such as
the one that a container was made from.` + registryHelp,
		Example:           `  stasis pull registry.example.com/backup/db:1`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			img, err := a.operations().Pull(cmd.Context(), node.PullRequest{Ref: args[0], Registry: node.Registry{PlainHTTP: plainHTTP}, Progress: a.progress()})
			if err != nil {
				return err
			}
			return a.printImage(*img)
		},
	}
	cmd.Flags().BoolVar(&plainHTTP, "plain-http", false, "without TLS")
	return cmd
}

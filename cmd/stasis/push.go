package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

const registryHelp = `

Credentials are those of "docker login" and "podman login"; what containerd knows
of the registry in ` + hostsDir + ` applies. A registry on localhost may be without
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
			ctx := cmd.Context()
			c, err := a.connect(ctx)
			if err != nil {
				return err
			}
			img, err := findCheckpoint(ctx, c, args[0])
			if err != nil {
				return err
			}
			target := img.Name
			if len(args) > 1 {
				if target, err = fullName(args[1]); err != nil {
					return err
				}
			}
			bar := a.progress(target)
			defer bar.Done()
			if err := a.push(ctx, c, img.Name, target, plainHTTP, bar); err != nil {
				return err
			}
			if a.json() {
				return printJSON(a.out, stored{target, img.Target.Digest.String()})
			}
			fmt.Fprintln(a.out, target)
			return nil
		},
	}
	cmd.Flags().BoolVar(&plainHTTP, "plain-http", false, "without TLS")
	return cmd
}

// stored is an image that a command made, or sent.
type stored struct {
	Ref    string `json:"ref"`
	Digest string `json:"digest"`
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
			ctx := cmd.Context()
			ref, err := fullName(args[0])
			if err != nil {
				return err
			}
			c, err := a.connect(ctx)
			if err != nil {
				return err
			}
			bar := a.progress(ref)
			defer bar.Done()
			img, err := a.pull(ctx, c, ref, plainHTTP, bar)
			if err != nil {
				return err
			}
			if a.json() {
				return printJSON(a.out, stored{img.Name, img.Target.Digest.String()})
			}
			fmt.Fprintln(a.out, img.Name)
			return nil
		},
	}
	cmd.Flags().BoolVar(&plainHTTP, "plain-http", false, "without TLS")
	return cmd
}

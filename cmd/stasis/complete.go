package main

import (
	"context"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/spf13/cobra"

	"github.com/stasis-run/stasis/node/rest/v1"
)

// completion is a function for cobra that proposes words.
type completion = func(cmd *cobra.Command, args []string, toComplete string) ([]string, cobra.ShellCompDirective)

// proposing makes a completion of what containerd knows. A shell waits for it,
// and has nowhere to print an error: it is brief, and fails with no proposals. words is
// called with no client if there is --host.
func (a *app) proposing(words func(ctx context.Context, c *client.Client) ([]string, error)) completion {
	return func(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
		parent := cmd.Context()
		if parent == nil {
			parent = context.Background()
		}
		ctx, cancel := context.WithTimeout(namespaces.WithNamespace(parent, a.namespace), 2*time.Second)
		defer cancel()
		var c *client.Client
		var err error
		if a.remote, err = a.host.connect(a.namespace); err == nil && a.remote == nil {
			c, err = a.node().Client(ctx)
		}
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		found, err := words(ctx, c)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return found, cobra.ShellCompDirectiveNoFileComp
	}
}

// completeContainers proposes IDs of containers.
func (a *app) completeContainers() completion {
	return a.proposing(func(ctx context.Context, c *client.Client) (ids []string, err error) {
		if c == nil {
			all, err := a.remote.c.Containers(ctx)
			for _, container := range all {
				ids = append(ids, container.ID)
			}
			return ids, err
		}
		all, err := c.ContainerService().List(ctx)
		for _, container := range all {
			ids = append(ids, container.ID)
		}
		return ids, err
	})
}

func (a *app) completeNamespaces(cmd *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
	return a.proposing(func(ctx context.Context, c *client.Client) ([]string, error) {
		if c == nil {
			return nil, nil // stasisd does not tell
		}
		return c.NamespaceService().List(ctx)
	})(cmd, args, word)
}

// firstArgs is a completion of the first n arguments; there are no more.
func firstArgs(n int, then completion) completion {
	return func(cmd *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
		if len(args) >= n {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return then(cmd, args, word)
	}
}

// completeCheckpoints proposes names of images that are checkpoints; a shell
// adds files by itself.
func (a *app) completeCheckpoints() completion {
	names := a.proposing(func(ctx context.Context, c *client.Client) (names []string, err error) {
		if c == nil {
			all, err := a.remote.c.Checkpoints(ctx, v1.ListQuery{})
			for _, one := range all {
				names = append(names, one.Ref)
			}
			return names, err
		}
		all, err := c.ImageService().List(ctx, checkpointFilters()...)
		for _, i := range all {
			names = append(names, i.Name)
		}
		return names, err
	})
	return func(cmd *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
		found, _ := names(cmd, args, word)
		return found, cobra.ShellCompDirectiveDefault
	}
}

// checkpointFilters select the images that are checkpoints: ours, and those that
// containerd's own clients make.
func checkpointFilters() []string {
	return []string{`labels."stasis.run/checkpoint"`, `labels."containerd.io/checkpoint"`}
}

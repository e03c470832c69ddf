package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/stasis-run/stasis/node"
)

// pruneFlags say which checkpoints to remove: those that all of them allow.
type pruneFlags struct {
	keep      int // of each container; -1: does not matter
	olderThan age
	container string
	dryRun    bool
}

func newPruneCommand(a *app) *cobra.Command {
	f := pruneFlags{keep: -1}
	cmd := &cobra.Command{
		Use:   "prune",
		Short: "Remove old checkpoints, and what crashes left behind",
		Long: `Remove old checkpoints from containerd's image store: of each container all but
the newest (--keep), and of those only what is older than a time (--older-than).
Without either, no checkpoint is removed.

Always removed is what operations on this host that crashed have left in the state
folder, and in any namespace of containerd, which would keep it for a day else. If a
container ended with a checkpoint that could then not be stored, that is where
it is; --dry-run lists it.`,
		Example: `  stasis prune --dry-run
  stasis prune --keep 3 --older-than 7d
  stasis prune --keep 1 --container db`,
		Args:              cobra.NoArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if cmd.Flags().Changed("keep") && f.keep < 0 {
				return usageError("--keep %d: it is a number of checkpoints", f.keep)
			}
			return a.prune(cmd.Context(), f)
		},
	}
	flags := cmd.Flags()
	flags.IntVar(&f.keep, "keep", -1, "keep the newest `N` of each container, remove the others")
	flags.Lookup("keep").DefValue = ""
	flags.Var(&f.olderThan, "older-than", "remove only what is older: 90m, 12h, 7d")
	flags.StringVar(&f.container, "container", "", "only checkpoints of this container")
	flags.BoolVar(&f.dryRun, "dry-run", false, "remove nothing, say what would be")
	must(cmd.RegisterFlagCompletionFunc("container", a.completeContainers()))
	return cmd
}

func (a *app) prune(ctx context.Context, f pruneFlags) error {
	r := node.PruneRequest{OlderThan: time.Duration(f.olderThan), Container: f.container, DryRun: f.dryRun}
	if f.keep >= 0 {
		r.Keep = &f.keep
	}
	result, err := a.node().Prune(ctx, r)
	if result == nil {
		return err
	}
	if a.json() {
		return errors.Join(err, printJSON(a.out, result))
	}
	for _, l := range result.Checkpoints {
		fmt.Fprintln(a.out, node.Printable(l.Ref))
	}
	for _, dir := range result.Leftovers {
		fmt.Fprintln(a.out, dir)
	}
	for _, l := range result.Leases {
		fmt.Fprintln(a.out, "lease "+node.Printable(l))
	}
	return err
}

// age is a flag: a duration, that may also be in days.
type age time.Duration

func (a *age) Type() string { return "DURATION" }
func (a *age) String() string {
	if *a == 0 {
		return ""
	}
	return time.Duration(*a).String()
}

func (a *age) Set(s string) error {
	d, err := time.ParseDuration(s)
	if days, ok := strings.CutSuffix(s, "d"); ok {
		var n float64
		if n, err = strconv.ParseFloat(days, 64); err == nil {
			d = time.Duration(n * 24 * float64(time.Hour))
		}
	}
	if err != nil || d <= 0 {
		return errors.New("it is a time such as 90m, 12h or 7d")
	}
	*a = age(d)
	return nil
}

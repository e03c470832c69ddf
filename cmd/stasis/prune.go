package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"github.com/stasis-run/stasis/checkpoint/image"
)

// pruned is what `stasis prune -o json` prints.
type pruned struct {
	Checkpoints []listed `json:"checkpoints"`
	// Leftovers are folders of operations that did not end.
	Leftovers []string `json:"leftovers"`
	// Leases are those of such operations in containerd, as NAMESPACE/ID.
	Leases []string `json:"leases"`
}

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
	result := pruned{Checkpoints: []listed{}, Leftovers: []string{}, Leases: []string{}}
	var failed []error
	choosing := f.keep >= 0 || f.olderThan > 0
	c, err := a.connect(ctx)
	if err != nil && choosing {
		return err
	}
	if choosing {
		all, err := checkpoints(ctx, c)
		if err != nil {
			return err
		}
		for _, l := range f.choose(all, time.Now()) {
			if err := f.remove(ctx, c, l); err != nil {
				failed = append(failed, fmt.Errorf("remove %s: %w", l.Ref, err))
				continue
			}
			result.Checkpoints = append(result.Checkpoints, l)
		}
	}
	failed = append(failed, a.leftovers(func(w *work) error {
		result.Leftovers = append(result.Leftovers, w.dir)
		if f.dryRun {
			w.release()
			return nil
		}
		return w.remove()
	}))
	if err != nil {
		// The folders do not need it.
		fmt.Fprintf(a.err, "stasis: what is left in containerd is not removed: %v\n", err)
	} else {
		result.Leases, err = a.endLeases(ctx, c, f.dryRun)
		failed = append(failed, err)
	}
	if a.json() {
		return errors.Join(append(failed, printJSON(a.out, result))...)
	}
	for _, l := range result.Checkpoints {
		fmt.Fprintln(a.out, printable(l.Ref))
	}
	for _, dir := range result.Leftovers {
		fmt.Fprintln(a.out, dir)
	}
	for _, l := range result.Leases {
		fmt.Fprintln(a.out, "lease "+printable(l))
	}
	return errors.Join(failed...)
}

// endLeases ends the leases, in all namespaces, of commands that were killed.
func (a *app) endLeases(ctx context.Context, c *client.Client, look bool) ([]string, error) {
	// The rest of prune needs no containerd, and has something to say.
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	ended := []string{}
	all, err := c.NamespaceService().List(ctx)
	if err != nil {
		return ended, fmt.Errorf("list the namespaces of containerd: %w", err)
	}
	var failed []error
	for _, namespace := range all {
		ids, err := image.EndLeases(namespaces.WithNamespace(ctx, namespace), c.LeasesService(), look)
		failed = append(failed, err)
		for _, id := range ids {
			ended = append(ended, namespace+"/"+id)
		}
	}
	return ended, errors.Join(failed...)
}

func (f pruneFlags) remove(ctx context.Context, c *client.Client, l listed) error {
	if f.dryRun {
		return nil
	}
	return removeImage(ctx, c, l.Ref, digest.Digest(l.Digest))
}

// choose returns those of a list, sorted with the newest first, that go.
func (f pruneFlags) choose(all []listed, now time.Time) (gone []listed) {
	if f.keep < 0 && f.olderThan == 0 {
		return nil
	}
	kept := map[string]int{}
	for _, l := range all {
		if f.container != "" && !l.of(f.container) {
			continue
		}
		// The same container in two of containerd's namespaces is two, but only
		// one of those is looked at.
		young := f.olderThan > 0 && now.Sub(l.Created) < time.Duration(f.olderThan)
		if owner := l.owner(); young || kept[owner] < f.keep {
			kept[owner]++
			continue
		}
		gone = append(gone, l)
	}
	return gone
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

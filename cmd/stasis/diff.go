package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/stasis-run/stasis/checkpoint/inspect"
	"github.com/stasis-run/stasis/node"
)

func newDiffCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "diff FIRST SECOND",
		Short: "Show what changed between two checkpoints",
		Long: `Show what changed between two checkpoints of a container: files of its root
filesystem, and pages of its memory. Both may be in any format.`,
		Example: `  stasis diff backup/db:1 backup/db:2
  stasis diff backup/db:1 backup/db:2 -o json | jq '.files[].path'`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: firstArgs(2, a.completeCheckpoints()),
		RunE: func(cmd *cobra.Command, args []string) error {
			d, err := a.operations().Diff(cmd.Context(), node.DiffRequest{First: args[0], Second: args[1], MaxSize: int64(a.maxSize)})
			if err != nil {
				return err
			}
			if a.json() {
				return printJSON(a.out, d)
			}
			return printDiff(a.out, d)
		},
	}
	a.addMaxSize(cmd)
	return cmd
}

func printDiff(out io.Writer, d *node.Difference) error {
	fmt.Fprintln(out, "MEMORY")
	t := newTable(out, "PID", "PROCESS", "CHANGED", "ADDED", "REMOVED", "SAME", "WHERE")
	for _, p := range d.Processes {
		where := ""
		switch p.In {
		case "first":
			where = "ended"
		case "second":
			where = "new"
		}
		t.row(fmt.Sprint(p.PID), p.Comm, size(p.Changed), size(p.Added), size(p.Removed), size(p.Same), where)
		for _, m := range p.Mappings {
			t.row("", "", size(m.Changed), size(m.Added), "", "", m.Start.String()+" "+(inspect.Mapping{File: m.File, Kind: m.Kind}).What())
		}
	}
	if err := t.end(); err != nil {
		return err
	}
	heading(out, "FILES")
	if d.Files == nil {
		_, err := fmt.Fprintln(out, "one of the two does not tell what files the container changed")
		return err
	}
	t = newTable(out)
	for _, f := range d.Files {
		t.row(f.Change, size(f.Size), f.Path)
	}
	return t.end()
}

package main

import (
	"github.com/spf13/cobra"

	"github.com/stasis-run/stasis/node"
)

func newCheckCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "check",
		Short: "Tell whether this host can checkpoint and restore",
		Long: `Tell whether this host can checkpoint and restore containers, what is missing, and
how to get it. Run it as the user who checkpoints: root.

Exit codes: 0 fit; 1 something is missing.`,
		Example: `  stasis check
  stasis check -o json | jq '.findings[] | select(.state != "ok")'`,
		Args:              cobra.NoArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			found := a.operations().Check(cmd.Context())
			fit := true
			for _, f := range found {
				fit = fit && f.State != "missing"
			}
			if a.json() {
				if err := printJSON(a.out, struct {
					Fit      bool           `json:"fit"`
					Findings []node.Finding `json:"findings"`
				}{fit, found}); err != nil {
					return err
				}
			} else {
				t := newTable(a.out)
				for _, f := range found {
					detail := f.Detail
					if f.Fix != "" {
						detail += ": " + f.Fix
					}
					t.row(f.State, f.Name, detail)
				}
				if err := t.end(); err != nil {
					return err
				}
			}
			if !fit {
				return exitCode(exitFailed)
			}
			return nil
		},
	}
}

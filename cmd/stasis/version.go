package main

import (
	"runtime"

	"github.com/containerd/containerd/v2/client"
	"github.com/spf13/cobra"
)

// versions is what `stasis version` tells.
type versions struct {
	Version string `json:"version"`
	Commit  string `json:"commit"`
	Date    string `json:"date"`
	Go      string `json:"go"`
	// Containerd is nil if it cannot be reached; Error says why.
	Containerd *serverVersion `json:"containerd,omitempty"`
	Error      string         `json:"error,omitempty"`
}

type serverVersion struct {
	Version  string `json:"version"`
	Revision string `json:"revision"`
}

func newVersionCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Show the versions of stasis and of containerd",
		Long: `Show the versions of stasis and of containerd. That containerd cannot be reached
is no failure: its line says why.`,
		Example: `  stasis version
  stasis version -o json`,
		Args:              cobra.NoArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			v := versions{Version: version, Commit: commit, Date: date, Go: runtime.Version()}
			c, err := a.node().Client(cmd.Context())
			if err == nil {
				var server client.Version
				if server, err = c.Version(cmd.Context()); err == nil {
					v.Containerd = &serverVersion{server.Version, server.Revision}
				}
			}
			if err != nil {
				v.Error = err.Error()
			}
			if a.json() {
				return printJSON(a.out, v)
			}
			t := newTable(a.out)
			t.row("stasis", v.Version, v.Commit, v.Date, v.Go)
			if v.Containerd != nil {
				t.row("containerd", v.Containerd.Version, v.Containerd.Revision)
			} else {
				t.row("containerd", v.Error)
			}
			return t.end()
		},
	}
}

// Command containerd-shim-stasis-v1 is the containerd shim of the Stasis
// runtime. It is wiring only: package shim talks to containerd, package task
// runs containers.
package main

import (
	"os"

	"github.com/stasis-run/stasis/shim"
	"github.com/stasis-run/stasis/task"
)

// Set by the build, with -ldflags "-X main.version=...".
var (
	version = "dev"
	commit  = "unknown"
	date    = "unknown"
)

func main() {
	os.Exit(shim.Main(shim.Build{Version: version, Commit: commit, Date: date}, shim.Runtime{
		NewService: func(cfg shim.Config) (shim.Service, error) {
			return task.NewService(task.Config(cfg)), nil
		},
		Cleanup:       task.Cleanup,
		DecodeOptions: task.DecodeOptions,
	}))
}

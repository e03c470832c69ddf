package task

import (
	"os"
	"path/filepath"
	"sync"
	"testing"

	runc "github.com/containerd/go-runc"

	"github.com/stasis-run/stasis/checkpoint/criu"
	"github.com/stasis-run/stasis/process"
	"github.com/stasis-run/stasis/process/processtest"
)

func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == criu.Name {
		// The shim's binary stands in for CRIU, and returns if it was not called as
		// that, but as CRIU itself.
		_ = criu.Exec(os.Args)
	}
	processtest.Main()
	os.Exit(m.Run())
}

// testReaper is the only one of this process.
var testReaper = sync.OnceValue(func() *process.Reaper {
	r := process.NewReaper()
	runc.Monitor = r
	return r
})

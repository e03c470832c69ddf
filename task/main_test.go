package task

import (
	"os"
	"sync"
	"testing"

	runc "github.com/containerd/go-runc"

	"github.com/stasis-run/stasis/process"
	"github.com/stasis-run/stasis/process/processtest"
)

func TestMain(m *testing.M) {
	processtest.Main()
	os.Exit(m.Run())
}

// testReaper is the only one of this process.
var testReaper = sync.OnceValue(func() *process.Reaper {
	r := process.NewReaper()
	runc.Monitor = r
	return r
})

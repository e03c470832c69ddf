package img

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	inet "github.com/checkpoint-restore/go-criu/v8/crit/images/sk-inet"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/timerfd"
	"google.golang.org/protobuf/proto"

	"github.com/stasis-run/stasis/checkpoint/criu/img/imgtest"
	"github.com/stasis-run/stasis/checkpoint/layout"
)

func TestRepairTimers(t *testing.T) {
	timer := func(ticks, vsec, vnsec, isec, insec uint64) *fdinfo.FileEntry {
		return &fdinfo.FileEntry{Type: fdinfo.FdTypes_TIMERFD.Enum(), Tfd: &timerfd.TimerfdEntry{
			Ticks: &ticks, Vsec: &vsec, Vnsec: &vnsec, Isec: &isec, Insec: &insec,
		}}
	}
	socket := &fdinfo.FileEntry{Type: fdinfo.FdTypes_INETSK.Enum(), Isk: &inet.InetSkEntry{Id: proto.Uint32(7)}}
	for name, c := range map[string]struct{ written, want *fdinfo.FileEntry }{
		"expired":         {timer(3, 0, 0, 0, 5), timer(3, 0, 5, 0, 5)},
		"expired, slow":   {timer(1, 0, 0, 2, 5), timer(1, 2, 5, 2, 5)},
		"running":         {timer(0, 0, 1, 0, 5), timer(0, 0, 1, 0, 5)},
		"running, late":   {timer(1, 0, 1, 0, 5), timer(1, 0, 1, 0, 5)},
		"stopped":         {timer(0, 0, 0, 0, 5), timer(0, 0, 0, 0, 5)},
		"once, expired":   {timer(1, 0, 0, 0, 0), timer(1, 0, 0, 0, 0)},
		"something other": {socket, socket},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, layout.Files)
			must(t, os.WriteFile(path, imgtest.Encode(t, "FILES", socket, c.written, socket), 0o600))
			must(t, RepairTimers(dir))
			got, err := os.ReadFile(path)
			must(t, err)
			if !bytes.Equal(got, imgtest.Encode(t, "FILES", socket, c.want, socket)) {
				t.Errorf("got %q", got)
			}
		})
	}
}

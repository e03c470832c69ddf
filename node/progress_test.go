package node

import (
	"slices"
	"testing"

	"github.com/stasis-run/stasis/checkpoint/api"
)

// Stages are told in order, and nothing when the work has ended.
func TestStages(t *testing.T) {
	var told []Update
	s := Progress(func(u Update) { told = append(told, u) }).of("db")
	s.set(1, 2) // nothing has begun
	s.begin("dump")
	s.begin("dump") // changes nothing
	s.set(1, 2)
	s.begin("store")
	s.end()
	s.set(3, 4)
	want := []Update{{Of: "db", Stage: "dump"}, {"db", "dump", 1, 2}, {Of: "db", Stage: "store"}, {Of: "db"}}
	if !slices.Equal(told, want) {
		t.Errorf("%+v, want %+v", told, want)
	}
	nobody := Progress(nil).of("db")
	nobody.begin("dump")
	nobody.set(1, 2)
	nobody.end()
	if !nobody.silent() || s.silent() {
		t.Error("silent")
	}
}

// What the dump and the copy of the writable layer have done is one sum, and no
// stage takes the other's place.
func TestDumpProgress(t *testing.T) {
	var sum dumpProgress
	for _, step := range []struct {
		stage                   string
		done, total             uint64
		wantedDone, wantedTotal int64
	}{
		{"dump", 10, 100, 10, 100},
		{"rootfs", 5, 0, 15, 105},
		{"dump", 90, 100, 95, 105},
		{"rootfs", 20, 0, 110, 120},
		{"dump", 130, 100, 150, 150}, // the total was an estimate
	} {
		done, total := sum.add(&api.Progress{Stage: step.stage, DoneBytes: step.done, TotalBytes: step.total})
		if done != step.wantedDone || total != step.wantedTotal {
			t.Errorf("%+v: %d of %d", step, done, total)
		}
	}
}

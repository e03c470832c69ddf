package criu

import (
	"os"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/stats"

	"github.com/stasis-run/stasis/checkpoint/criu/img"
)

// DumpStats are CRIU's figures of a dump: times are in microseconds, and a page
// is one of the host's.
type DumpStats = stats.DumpStatsEntry

// ReadDumpStats reads a file stats-dump. It returns nil if there are no figures
// in it.
func ReadDumpStats(path string) *DumpStats {
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil
	}
	in, err := img.NewReader(f, st.Size())
	if err != nil || in.Kind() != "STATS" {
		return nil
	}
	msg, err := in.Next()
	if err != nil {
		return nil
	}
	var entry stats.StatsEntry
	if img.Decode(msg, &entry) != nil {
		return nil
	}
	return entry.Dump
}

package checkpoint

import (
	"os"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/stats"
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
	in, err := newFrames(f, st.Size())
	if err != nil || in.kind != "STATS" {
		return nil
	}
	msg, err := in.next()
	if err != nil {
		return nil
	}
	var entry stats.StatsEntry
	if decode(msg, &entry) != nil {
		return nil
	}
	return entry.Dump
}

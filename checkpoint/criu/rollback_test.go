package criu

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stasis-run/stasis/checkpoint/layout"
)

func TestStagesOfDump(t *testing.T) {
	const (
		begin   = "(00.04) CRIU run id = f33df00f-00df-4763-b3d6-ebf6a3737b7f\n(00.05) Seized task 7, state 1\n"
		infect  = "(00.06) Parasite syscall_ip at 0x400000\n"
		daemon  = "(00.07) Parasite 7 has been switched to daemon mode\n"
		pages   = "(00.08) page-xfer: Transferring pages:\n"
		cure    = "(00.09) Waiting for 7 to trap\n"
		threads = "(00.10) Dumping core for thread (pid: 8)\n"
		done    = "(00.11) Dumping mm (pid: 7)\n"
		alive   = "(00.12) Unfreezing tasks into 1\n"
		dead    = "(00.12) Unfreezing tasks into 2\n"
		end     = "(00.13) Dumping finished successfully\n"
		failed  = "(00.13) Error (criu/cr-dump.c:2111): Dumping FAILED.\n"
	)
	task := infect + daemon + pages + cure + threads + done
	for _, c := range []struct {
		log                             string
		killable, finished, interrupted bool
	}{
		{begin, true, false, true},
		{begin + infect, false, false, true},
		{begin + infect + daemon, true, false, true},
		{begin + infect + daemon + pages, true, false, true},
		{begin + infect + daemon + pages + cure, false, false, true},
		{begin + infect + daemon + pages + cure + threads, false, false, true},
		{begin + task, true, false, true},
		{begin + task + infect, false, false, true}, // the next process
		{begin + task + task, true, false, true},
		{begin + task + dead, true, true, true},
		{begin + task + alive + failed, true, false, false},
		{begin + task + dead + end, true, true, false},
	} {
		path := filepath.Join(t.TempDir(), layout.DumpLog)
		must(t, os.WriteFile(path, []byte(c.log), 0o600))
		if got := killable(path); got != c.killable {
			t.Errorf("killable is %v after %q", got, c.log)
		}
		if got := finished(path); got != c.finished {
			t.Errorf("finished is %v after %q", got, c.log)
		}
		if got := Interrupted(path); got != c.interrupted {
			t.Errorf("interrupted is %v after %q", got, c.log)
		}
		if ids := runIDs(path); !slices.Equal(ids, []string{"f33df00f-00df-4763-b3d6-ebf6a3737b7f"}) {
			t.Errorf("run IDs %q", ids)
		}
	}
	if none := filepath.Join(t.TempDir(), layout.DumpLog); !killable(none) || finished(none) || Interrupted(none) || runIDs(none) != nil {
		t.Error("a log that is not there says something")
	}
}

func TestRemoveLeftovers(t *testing.T) {
	dir := t.TempDir()
	yard := filepath.Join(dir, ".criu.cgyard.AbCdEf")
	root := "/tmp/.criu.mntns." + strings.Repeat("T", 6)
	must(t, os.Mkdir(yard, 0o700))
	must(t, os.MkdirAll(root, 0o700))
	must(t, os.WriteFile(filepath.Join(dir, layout.RestoreLog), []byte("1: mnt: Move the root to "+root+"\n"), 0o600))
	must(t, RemoveLeftovers(dir, layout.RestoreLog))
	for _, path := range []string{yard, root} {
		if _, err := os.Stat(path); !os.IsNotExist(err) {
			t.Errorf("%s is left: %v", path, err)
		}
	}
	must(t, RemoveLeftovers(filepath.Join(dir, "none"), layout.RestoreLog))
}

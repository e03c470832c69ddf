package process

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// SetOOMScore gives the restored processes of a control group the OOM score that
// the spec of the new container has: those that had their init's, as processes
// inherit it, and those below it. CRIU brings back the score of then, which on
// another node, or for another pod, may be another.
func (c *Cgroup) SetOOMScore(init, want int) error {
	old, err := oomScore(uint32(init))
	if err != nil || old == want {
		return ended(err)
	}
	pids, err := c.Pids()
	if err != nil {
		return fmt.Errorf("list the processes: %w", err)
	}
	var failed error
	for _, pid := range pids {
		have, err := oomScore(pid)
		if err == nil && (have == old || have < want) {
			err = os.WriteFile(oomScoreFile(pid), []byte(strconv.Itoa(want)), 0)
		}
		if ended(err) != nil && failed == nil {
			failed = fmt.Errorf("set the OOM score of process %d to %d: %w", pid, want, err)
		}
	}
	return failed
}

func oomScoreFile(pid uint32) string { return fmt.Sprintf("/proc/%d/oom_score_adj", pid) }

func oomScore(pid uint32) (int, error) {
	data, err := os.ReadFile(oomScoreFile(pid))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(data)))
}

// ended leaves out the error that a process is gone.
func ended(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return nil
	}
	return err
}

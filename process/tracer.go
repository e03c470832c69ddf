package process

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// TracerOf returns the process that traces pid, which in a dump is CRIU; 0 if
// none does.
func TracerOf(pid int) int {
	tracer, _ := strconv.Atoi(statusOf(pid, "TracerPid"))
	return tracer
}

// ParentOf returns a process's parent, 0 if there is no such process.
func ParentOf(pid int) int {
	parent, _ := strconv.Atoi(statusOf(pid, "PPid"))
	return parent
}

// IsStopped tells whether a process is stopped by a signal. The state that the
// kernel shows is another one while the process is frozen too, but not the place
// in which it sleeps.
func IsStopped(pid int) bool {
	if strings.HasPrefix(statusOf(pid, "State"), "T") {
		return true
	}
	wchan, _ := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "wchan"))
	return string(wchan) == "do_signal_stop"
}

// statusOf returns a value of a process's /proc/<pid>/status, "" if there is
// none.
func statusOf(pid int, key string) string {
	f, err := os.Open(filepath.Join("/proc", strconv.Itoa(pid), "status"))
	if err != nil {
		return ""
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if value, ok := strings.CutPrefix(lines.Text(), key+":"); ok {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// childrenOf returns the pids of a process's children, unreaped ones included.
func childrenOf(pid int) []int {
	var pids []int
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, t := range tasks {
		data, _ := os.ReadFile(t)
		for field := range strings.FieldsSeq(string(data)) {
			if child, err := strconv.Atoi(field); err == nil {
				pids = append(pids, child)
			}
		}
	}
	return pids
}

// procStat is what matters of /proc/<pid>/stat.
type procStat struct {
	pid     int
	state   byte
	started int64 // clock ticks after boot
}

func statOf(pid int) *procStat {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil
	}
	// The name in parentheses may contain anything.
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	if len(fields) < 20 {
		return nil
	}
	started, err := strconv.ParseInt(fields[19], 10, 64)
	if err != nil {
		return nil
	}
	return &procStat{pid, fields[0][0], started}
}

package process

import (
	"bufio"
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

// IsStopped tells whether a process is stopped by a signal.
func IsStopped(pid int) bool { return strings.HasPrefix(statusOf(pid, "State"), "T") }

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

// children returns the pids of this process's children.
func children() []int {
	var pids []int
	tasks, _ := filepath.Glob("/proc/self/task/*/children")
	for _, t := range tasks {
		data, _ := os.ReadFile(t)
		for field := range strings.FieldsSeq(string(data)) {
			if pid, err := strconv.Atoi(field); err == nil {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

package process

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
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

// Program is what a process executes: the file's device and inode. The zero value is
// that of no process.
type Program struct{ device, inode uint64 }

// ProgramOf returns the program of a process, the zero value if it has none: it has
// ended.
func ProgramOf(pid int) Program {
	var st unix.Stat_t
	if err := unix.Stat(fmt.Sprintf("/proc/%d/exe", pid), &st); err != nil {
		return Program{}
	}
	return Program{st.Dev, st.Ino}
}

// WaitExec returns when a process executes another program than that, or none, or
// ctx ends.
func WaitExec(ctx context.Context, pid int, program Program) {
	for program != (Program{}) && ProgramOf(pid) == program {
		if pause(ctx, execInterval) != nil {
			return
		}
	}
}

// execInterval is how often WaitExec looks.
const execInterval = 2 * time.Millisecond

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

// Tree returns a process and its descendants, parents before children: all of a
// container that has just been restored, as each process is made by its parent.
func Tree(pid int) []int {
	if pid <= 0 {
		return nil
	}
	pids := []int{pid}
	for i := 0; i < len(pids); i++ {
		pids = append(pids, childrenOf(pids[i])...)
	}
	return pids
}

// AllTraced returns an error unless every thread of the processes is held by the
// tracer in a stop of ptrace's. Zombies are as good.
func AllTraced(pids []int, tracer int) error {
	if len(pids) == 0 {
		return errors.New("there is no process")
	}
	for _, pid := range pids {
		threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
		if err != nil {
			return err
		}
		for _, thread := range threads {
			status, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/status", pid, thread.Name()))
			if err != nil {
				return err
			}
			state, by := valueIn(status, "State"), valueIn(status, "TracerPid")
			if !strings.HasPrefix(state, "Z") && (!strings.HasPrefix(state, "t") || by != strconv.Itoa(tracer)) {
				return fmt.Errorf("thread %s of process %d is not held by CRIU: state %s, tracer %s", thread.Name(), pid, state, by)
			}
		}
	}
	return nil
}

// valueIn returns a value of a status file, "" if it has none.
func valueIn(status []byte, key string) string {
	for line := range strings.Lines(string(status)) {
		if value, ok := strings.CutPrefix(line, key+":"); ok {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// procStat is what matters of /proc/<pid>/stat.
type procStat struct {
	pid     int
	state   byte
	started int64 // clock ticks after boot
	// killed is set for a zombie that a signal has ended.
	killed bool
}

func statOf(pid int) *procStat {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil
	}
	// The name in parentheses may contain anything.
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	if len(fields) < 50 {
		return nil
	}
	started, err := strconv.ParseInt(fields[19], 10, 64)
	if err != nil {
		return nil
	}
	status, err := strconv.ParseUint(fields[49], 10, 32)
	if err != nil {
		return nil
	}
	return &procStat{pid, fields[0][0], started, unix.WaitStatus(status).Signaled()}
}

// Command faultrunc is an OCI runtime for tests. It runs another, runc or crun,
// and goes wrong on request.
//
// What runs it must not notice it. Where it has nothing to do after the real
// runtime, it becomes that by exec; else it is a parent that passes on the
// descriptors, signals and exit code. It never becomes a subreaper, so a
// container's process goes to the shim when the runtime exits, as ever.
//
// The folder of the path that it is called by holds `real`, a link to the real
// runtime, and the requests, which are files that tests make:
//
//	<command>.<phase>.hold          wait until the file is gone
//	<command>.<phase>.fail          fail, with the file's text as the message
//	<command>.<phase>.kill-parent   kill the process that called us: the shim
//	<command>.during.kill-criu      kill CRIU
//
// The phase is before or after the real runtime has run, or during: when CRIU's
// log contains the file's text. To hold CRIU is to stop it. Once at a
// hold, faultrunc makes <command>.<phase>.reached. It notes all that it was
// called for in the file calls. The package stack has an API for this.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// commands are those of runc and crun that shims use.
var commands = []string{
	"checkpoint", "create", "delete", "events", "exec", "features", "kill", "list", "pause",
	"ps", "restore", "resume", "run", "spec", "start", "state", "update",
}

// pollInterval is that of looking for a test's next request.
const pollInterval = 500 * time.Microsecond

func main() {
	c := newCall()
	if c.command == "" {
		c.exec()
	}
	c.note()
	c.hold("before")
	c.killParent("before")
	c.fail("before")
	if !c.requested("during") && !c.requested("after") {
		c.exec()
	}
	code := c.run()
	c.hold("after")
	c.killParent("after")
	if code == 0 {
		c.fail("after")
	}
	os.Exit(code)
}

// A call is one call of the runtime.
type call struct {
	dir     string
	command string
	args    []string
}

func newCall() *call {
	c := &call{dir: filepath.Dir(os.Args[0]), args: os.Args[1:]}
	// Not simply the first without a dash: it could be a flag's value.
	if i := slices.IndexFunc(c.args, func(a string) bool { return slices.Contains(commands, a) }); i >= 0 {
		c.command = c.args[i]
	}
	return c
}

// file returns the path of a file of the protocol.
func (c *call) file(phase, name string) string {
	return filepath.Join(c.dir, c.command+"."+phase+"."+name)
}

// text returns the text of a request, if there is one.
func (c *call) text(phase, action string) (string, bool) {
	b, err := os.ReadFile(c.file(phase, action))
	return strings.TrimSpace(string(b)), err == nil
}

// requested tells if there is any request for the phase.
func (c *call) requested(phase string) bool {
	files, _ := filepath.Glob(c.file(phase, "*"))
	return len(files) > 0
}

func (c *call) real() string { return filepath.Join(c.dir, "real") }

func (c *call) exec() {
	real, err := filepath.EvalSymlinks(c.real())
	if err == nil {
		err = syscall.Exec(real, append([]string{real}, c.args...), os.Environ())
	}
	c.die(fmt.Sprintf("faultrunc: %v", err))
}

func (c *call) note() {
	f, err := os.OpenFile(filepath.Join(c.dir, "calls"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return
	}
	defer f.Close()
	fmt.Fprintln(f, strings.Join(c.args, " "))
}

func (c *call) hold(phase string) {
	hold := c.file(phase, "hold")
	if !exists(hold) {
		return
	}
	os.WriteFile(c.file(phase, "reached"), nil, 0o600)
	for exists(hold) {
		time.Sleep(pollInterval)
	}
	os.Remove(c.file(phase, "reached"))
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func (c *call) killParent(phase string) {
	if _, ok := c.text(phase, "kill-parent"); ok {
		syscall.Kill(os.Getppid(), syscall.SIGKILL)
	}
}

func (c *call) fail(phase string) {
	if message, ok := c.text(phase, "fail"); ok {
		c.die(message)
	}
}

// die fails as runc does: with an error in its log, and on stderr.
func (c *call) die(message string) {
	if path := c.flag("--log"); path != "" {
		line, _ := json.Marshal(map[string]string{
			"level": "error", "msg": message, "time": time.Now().Format(time.RFC3339),
		})
		if f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND|os.O_SYNC, 0o644); err == nil {
			f.Write(append(line, '\n'))
			f.Close()
		}
	}
	fmt.Fprintln(os.Stderr, message)
	os.Exit(1)
}

// flag returns the value of a flag of the command line.
func (c *call) flag(name string) string {
	for i, a := range c.args {
		if v, ok := strings.CutPrefix(a, name+"="); ok {
			return v
		} else if a == name && i+1 < len(c.args) {
			return c.args[i+1]
		}
	}
	return ""
}

// run runs the real runtime and returns its exit code.
func (c *call) run() int {
	real, err := filepath.EvalSymlinks(c.real())
	if err != nil {
		c.die(fmt.Sprintf("faultrunc: %v", err))
	}
	logs := c.criuLogs()
	signals := make(chan os.Signal, 32)
	signal.Notify(signals)
	// The death signal is sent when the thread dies that forked.
	runtime.LockOSThread()
	pid, err := syscall.ForkExec(real, append([]string{real}, c.args...), &syscall.ProcAttr{
		Env: os.Environ(),
		// Those above are inherited as they are.
		Files: []uintptr{0, 1, 2},
		Sys:   &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL},
	})
	if err != nil {
		c.die(fmt.Sprintf("faultrunc: %v", err))
	}
	go func() {
		for s := range signals {
			// SIGURG is how Go's scheduler talks to itself.
			if s != syscall.SIGCHLD && s != syscall.SIGURG {
				syscall.Kill(pid, s.(syscall.Signal))
			}
		}
	}()
	if c.requested("during") {
		go c.watchCRIU(pid, logs)
	}
	var status syscall.WaitStatus
	for {
		if _, err := syscall.Wait4(pid, &status, 0, nil); !errors.Is(err, syscall.EINTR) {
			break
		}
	}
	if status.Signaled() {
		signal.Reset()
		syscall.Kill(os.Getpid(), status.Signal())
		return 128 + int(status.Signal())
	}
	return status.ExitStatus()
}

// criuLogs returns the files where CRIU may log, with what is in them already.
func (c *call) criuLogs() map[string]string {
	dirs := []string{c.flag("--work-path"), c.flag("--image-path")}
	if root := c.flag("--root"); root != "" {
		dirs = append(dirs, filepath.Join(root, c.args[len(c.args)-1], "criu.work"))
	}
	logs := map[string]string{}
	for _, dir := range dirs {
		if dir != "" {
			path := filepath.Join(dir, map[string]string{"checkpoint": "dump", "restore": "restore"}[c.command]+".log")
			b, _ := os.ReadFile(path)
			logs[path] = string(b)
		}
	}
	return logs
}

// watchCRIU does what is to be done when CRIU's log contains a text. A small
// dump takes a few milliseconds, so it must not be left waiting for a CPU.
func (c *call) watchCRIU(runtimePid int, logs map[string]string) {
	runtime.LockOSThread()
	unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Priority: 1}, 0)
	criu := 0
	for ; ; unix.Nanosleep(&unix.Timespec{Nsec: 100_000}, nil) {
		var log string
		for path, old := range logs {
			if b, err := os.ReadFile(path); err == nil && string(b) != old {
				log += string(b)
			}
		}
		if log == "" {
			continue
		}
		if criu == 0 {
			criu = criuPid(runtimePid)
		}
		seen := func(action string) bool {
			text, ok := c.text("during", action)
			return ok && criu != 0 && strings.Contains(log, text)
		}
		switch {
		case seen("hold"):
			syscall.Kill(criu, syscall.SIGSTOP)
			c.hold("during")
			syscall.Kill(criu, syscall.SIGCONT)
		case seen("kill-criu"):
			syscall.Kill(criu, syscall.SIGKILL)
			return
		case seen("kill-parent"):
			syscall.Kill(os.Getppid(), syscall.SIGKILL)
			return
		}
	}
}

// criuPid returns the pid of the `criu swrk` that the runtime has started, which
// then calls itself `criu: dump ...`, or 0. It is the first such child, for
// restored processes look the same for a while.
func criuPid(runtimePid int) int {
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", runtimePid))
	first := 0
	for _, t := range tasks {
		b, _ := os.ReadFile(t)
		for f := range strings.FieldsSeq(string(b)) {
			pid, _ := strconv.Atoi(f)
			cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
			if bytes.Contains(cmdline, []byte("\x00swrk\x00")) || bytes.Contains(cmdline, []byte("criu: ")) {
				if first == 0 || pid < first {
					first = pid
				}
			}
		}
	}
	return first
}

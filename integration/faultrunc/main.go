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
// The phase is before or after the real runtime has run, or during: when CRIU
// has written a line to its log that contains the file's text, and before it does
// anything else, which criulog sees to. A request for that has to be there
// when the command begins. To hold CRIU is to stop it. Once at a hold, faultrunc
// makes <command>.<phase>.reached. It notes all that it was called for in the
// file calls. The package stack has an API for this.
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
	env := os.Environ()
	var page *page
	lines := map[string]*line{}
	if c.requested("during") {
		path, library := filepath.Join(c.dir, "page"), filepath.Join(c.dir, "criulog")
		if _, err = os.Stat(library); err == nil {
			page, err = newPage(path)
		}
		if err != nil {
			c.die(fmt.Sprintf("faultrunc: %v", err))
		}
		for _, action := range []string{"hold", "kill-criu", "kill-parent"} {
			if text, ok := c.text("during", action); ok {
				lines[action] = page.ask(text)
			}
		}
		env = append(env, "CRIULOG_PAGE="+path, "LD_PRELOAD="+library)
	}
	signals := make(chan os.Signal, 32)
	signal.Notify(signals)
	// The death signal is sent when the thread dies that forked.
	runtime.LockOSThread()
	pid, err := syscall.ForkExec(real, append([]string{real}, c.args...), &syscall.ProcAttr{
		Env: env,
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
	if len(lines) > 0 {
		go c.watchCRIU(pid, lines)
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

// watchCRIU does what is to be done at lines of CRIU's log: by action, what
// criulog is asked for.
func (c *call) watchCRIU(runtimePid int, lines map[string]*line) {
	for ; ; time.Sleep(pollInterval) {
		for action, l := range lines {
			if l.state.Load() != reached {
				continue
			}
			criu := criuPid(runtimePid)
			if criu == 0 {
				c.die("faultrunc: CRIU has written to its log, and is not there")
			}
			switch action {
			case "hold":
				c.holdCRIU(criu, l)
			case "kill-criu":
				syscall.Kill(criu, syscall.SIGKILL)
			case "kill-parent":
				syscall.Kill(os.Getppid(), syscall.SIGKILL)
			}
			l.state.Store(passed)
		}
	}
}

// holdCRIU stops CRIU, as it is at a line, until it is released. Where it is a
// child of CRIU that has written the line, that waits too.
func (c *call) holdCRIU(criu int, l *line) {
	syscall.Kill(criu, syscall.SIGSTOP)
	if int(l.writer.Load()) == criu {
		l.state.Store(passed) // and is stopped; SIGCONT lets it go on
	}
	c.hold("during")
	syscall.Kill(criu, syscall.SIGCONT)
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

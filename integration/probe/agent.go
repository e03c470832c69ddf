package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// An agent is a child of the probe, which does what it is told over two pipes.
type agent struct {
	pid     int
	request *os.File
	answer  *bufio.Reader
}

// startAgent starts an agent that has the files as its descriptors 5 and up.
// It does not use os/exec, which would hold the child by a pidfd.
func startAgent(sys *syscall.SysProcAttr, files ...uintptr) (*agent, error) {
	var request, answer [2]int
	if err := unix.Pipe2(request[:], unix.O_CLOEXEC); err != nil {
		return nil, err
	}
	if err := unix.Pipe2(answer[:], unix.O_CLOEXEC); err != nil {
		return nil, err
	}
	pid, err := syscall.ForkExec("/proc/self/exe", []string{"probe", "agent"}, &syscall.ProcAttr{
		Env:   os.Environ(),
		Files: append([]uintptr{0, 1, 2, uintptr(request[0]), uintptr(answer[1])}, files...),
		Sys:   sys,
	})
	unix.Close(request[0])
	unix.Close(answer[1])
	if err != nil {
		return nil, err
	}
	a := &agent{
		pid:     pid,
		request: os.NewFile(uintptr(request[1]), "request"),
		answer:  bufio.NewReader(os.NewFile(uintptr(answer[0]), "answer")),
	}
	// It has started when it answers.
	_, err = a.ask("ids")
	return a, err
}

// ask makes the agent do something and returns its answer.
func (a *agent) ask(format string, args ...any) (string, error) {
	if _, err := fmt.Fprintf(a.request, format+"\n", args...); err != nil {
		return "", err
	}
	answer, err := a.answer.ReadString('\n')
	if err != nil {
		return "", fmt.Errorf("agent: %w", err)
	}
	answer = strings.TrimSuffix(answer, "\n")
	if e, failed := strings.CutPrefix(answer, "error: "); failed {
		return "", fmt.Errorf("agent: %s", e)
	}
	return answer, nil
}

// expect is ask for an answer that is known.
func (a *agent) expect(want, format string, args ...any) error {
	got, err := a.ask(format, args...)
	if err == nil && got != want {
		err = fmt.Errorf("agent: %s: got %.100q, want %.100q", fmt.Sprintf(format, args...), got, want)
	}
	return err
}

// agentMain is the agent itself.
func agentMain() {
	answers := os.NewFile(4, "answers")
	var child *agent
	for lines := bufio.NewScanner(os.NewFile(3, "requests")); lines.Scan(); {
		answer, err := obey(lines.Text(), &child)
		if err != nil {
			answer = "error: " + err.Error()
		}
		fmt.Fprintln(answers, answer)
	}
}

func obey(request string, child **agent) (string, error) {
	command, rest, _ := strings.Cut(request, " ")
	var fd, n int
	fmt.Sscan(rest, &fd, &n)
	switch command {
	case "ids":
		return ids(), nil
	case "spawn":
		var err error
		if *child, err = startAgent(nil); err != nil {
			return "", err
		}
		return "ok", nil
	case "child":
		return (*child).ask("%s", rest)
	case "read":
		buf := make([]byte, n)
		_, err := io.ReadFull(fdReader(fd), buf)
		return string(buf), err
	case "echo":
		buf := make([]byte, n)
		if _, err := io.ReadFull(fdReader(fd), buf); err != nil {
			return "", err
		}
		_, err := unix.Write(fd, buf)
		return "ok", err
	case "write":
		_, data, _ := strings.Cut(rest, " ")
		_, err := unix.Write(fd, []byte(data))
		return "ok", err
	case "dequeue":
		return dequeue(queued)
	case "upper":
		mem, err := unix.Mmap(fd, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			return "", err
		}
		defer unix.Munmap(mem)
		copy(mem, bytes.ToUpper(mem))
		return "ok", nil
	case "trylock":
		kind, path, _ := strings.Cut(rest, " ")
		return tryLock(kind, path)
	}
	return "", fmt.Errorf("no command %q", command)
}

// ids returns what tells a process's place in the tree.
func ids() string {
	sid, _ := unix.Getsid(0)
	return fmt.Sprintf("pid %d, parent %d, group %d, session %d", os.Getpid(), os.Getppid(), unix.Getpgrp(), sid)
}

// fdReader reads a descriptor without the runtime's poller.
type fdReader int

func (fd fdReader) Read(p []byte) (int, error) {
	for {
		n, err := unix.Read(int(fd), p)
		if err == unix.EINTR {
			continue
		}
		if n == 0 && err == nil {
			err = io.EOF
		}
		return max(n, 0), err
	}
}

// blocked calls f with a signal blocked in the thread, which a process that f
// starts inherits.
func blocked(sig syscall.Signal, f func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	set := sigset(sig)
	if err := unix.PthreadSigmask(unix.SIG_BLOCK, &set, nil); err != nil {
		return err
	}
	defer unix.PthreadSigmask(unix.SIG_UNBLOCK, &set, nil)
	return f()
}

func sigset(sig syscall.Signal) unix.Sigset_t {
	var set unix.Sigset_t
	set.Val[0] = 1 << (sig - 1)
	return set
}

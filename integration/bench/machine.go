package main

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/integration/stack"
)

// machine says what the figures were measured on.
type machine struct {
	Time     time.Time `json:"time"`
	Kernel   string    `json:"kernel"`
	CPU      string    `json:"cpu"`
	Cores    int       `json:"cores"`
	Memory   string    `json:"memory"`
	Versions []version `json:"versions"`
}

type version struct {
	Program string `json:"program"`
	Version string `json:"version"`
}

// describeMachine describes this one; tool finds a program of the set-up.
func describeMachine(tool func(string) string) machine {
	m := machine{
		Time:   time.Now().UTC().Truncate(time.Second),
		CPU:    "unknown",
		Cores:  runtime.NumCPU(),
		Memory: "unknown",
	}
	var uname unix.Utsname
	if unix.Uname(&uname) == nil {
		m.Kernel = unix.ByteSliceToString(uname.Release[:])
	}
	if model := field("/proc/cpuinfo", "model name"); model != "" {
		m.CPU = model
	}
	var kib int64
	if _, err := fmt.Sscan(field("/proc/meminfo", "MemTotal"), &kib); err == nil {
		m.Memory = fmt.Sprintf("%.1f GiB", float64(kib)/(1<<20))
	}
	shim, err := stack.Shim()
	if err != nil {
		shim = ""
	}
	for _, p := range []string{shim, tool("containerd-shim-runc-v2"), tool("containerd"), tool("runc"), tool("criu")} {
		m.Versions = append(m.Versions, version{filepath.Base(p), versionOf(p)})
	}
	return m
}

// field returns the first value of a key in a file of "key: value" lines.
func field(path, key string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if name, value, ok := strings.Cut(lines.Text(), ":"); ok && strings.TrimSpace(name) == key {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// versionOf asks a program for its version: what follows the word "version", or
// containerd's third word.
func versionOf(path string) string {
	out, err := exec.Command(path, "--version").Output()
	if err != nil {
		// The flag of containerd's shim.
		if out, err = exec.Command(path, "-v").Output(); err != nil {
			return "unknown"
		}
	}
	words := strings.Fields(string(out))
	for i, w := range words[:max(0, len(words)-1)] {
		switch strings.ToLower(w) {
		case "version", "version:":
			return words[i+1]
		}
	}
	if len(words) > 2 {
		return words[2]
	}
	return "unknown"
}

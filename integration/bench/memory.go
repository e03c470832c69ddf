package main

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/pkg/oci"

	"github.com/stasis-run/stasis/integration/stack"
)

const (
	// settle is how long a shim is left alone before its memory is looked at.
	// Stasis gives unused memory back after 5 seconds without a call, upstream's
	// shim every 30 seconds.
	settle = 35 * time.Second
	// group makes containers share a shim. Both know the annotation.
	group = "io.containerd.runc.v2.group"
)

// memory measures idle shims, of pods of different sizes. All are alive at the
// same time, as on a node, so PSS has each shim's share of the program's text.
func (b *bench) memory() {
	pods := b.few(5)
	sizes := []int{1, 10}
	b.logf("idle memory: %d pods of each kind, then %.0f s of silence", pods, settle.Seconds())
	type pod struct {
		shim       string
		containers int
		pid        int // of its shim
	}
	var all []pod
	var started []*stack.Container
	defer func() {
		for _, c := range started {
			b.kill(c)
		}
	}()
	for range pods {
		for _, n := range sizes {
			for _, shim := range shims {
				pid, members := b.startPod(shim, n)
				all = append(all, pod{shim, n, pid})
				started = append(started, members...)
			}
		}
	}
	select {
	case <-time.After(settle):
	case <-b.ctx.Done():
		b.tb.Fatalf("interrupted")
	}
	for _, n := range sizes {
		containers := fmt.Sprintf("%d containers", n)
		if n == 1 {
			containers = "1 container"
		}
		anon := &row{Name: "idle shim, " + containers + ": anonymous", Unit: "MiB", Target: target{upstream, 0.9}}
		pss := &row{Name: "idle shim, " + containers + ": PSS", Unit: "MiB"}
		for _, p := range all {
			if p.containers != n {
				continue
			}
			usage, err := readSmaps(p.pid)
			if err != nil {
				b.tb.Fatalf("memory of %s's shim: %v", p.shim, err)
			}
			anon.add(p.shim, usage["Anonymous"]/1024)
			pss.add(p.shim, usage["Pss"]/1024)
		}
		b.report.Rows = append(b.report.Rows, anon, pss)
	}
}

// startPod starts containers that share a shim, and returns that one's pid.
func (b *bench) startPod(shim string, n int) (pid int, members []*stack.Container) {
	pod := b.name("pod")
	for range n {
		c := b.container(shim, stack.Busybox, stack.Args("sleep", "1000"),
			oci.WithAnnotations(map[string]string{group: pod}))
		c.Start(b.ctx)
		members = append(members, c)
	}
	pid, err := parentOf(int(members[0].Task.Pid()))
	if err != nil {
		b.tb.Fatalf("find %s's shim: %v", shim, err)
	}
	return pid, members
}

func parentOf(pid int) (int, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(status)) {
		if value, ok := strings.CutPrefix(line, "PPid:"); ok {
			return strconv.Atoi(strings.TrimSpace(value))
		}
	}
	return 0, fmt.Errorf("process %d: no parent", pid)
}

// readSmaps returns the sums over all mappings of a process, in KiB.
func readSmaps(pid int) (map[string]float64, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return nil, err
	}
	sums := map[string]float64{}
	for lines := bufio.NewScanner(bytes.NewReader(data)); lines.Scan(); {
		name, value, _ := strings.Cut(lines.Text(), ":")
		var kib float64
		if _, err := fmt.Sscan(value, &kib); err == nil {
			sums[name] = kib
		}
	}
	return sums, nil
}

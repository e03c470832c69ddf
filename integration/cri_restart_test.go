package integration

import (
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/stasis-run/stasis/integration/stack"
)

// source runs the workload in a pod, makes a checkpoint of it, and removes it.
func (c *cluster) source(ref string) string {
	c.t.Helper()
	p := c.RunPod(c.ctx, "source", stack.HandlerStasis)
	id := p.RunContainer(c.ctx, "app", stack.Busybox, countingPod, c.kubelet(p, 0))
	c.goesOn(p, "app")
	c.checkpoint(id, ref)
	p.Remove(c.ctx)
	return ref
}

// again starts the container of a pod once more, as the kubelet does, and tells
// where it counts from.
func (c *cluster) again(p *stack.Pod, image string, attempt int) (id string, first int, err error) {
	c.t.Helper()
	must(c.t, os.RemoveAll(filepath.Join(p.Config.LogDirectory, "app.log")))
	id, err = p.RunContainerErr(c.ctx, "app", image, countingPod, c.kubelet(p, attempt))
	if err != nil {
		return id, 0, err
	}
	c.goesOn(p, "app")
	first, _ = logged(p, "app")
	return id, first, nil
}

// TestCRIRestartOfRestored ends restored containers, and has the kubelet start them
// again.
func TestCRIRestartOfRestored(t *testing.T) {
	t.Parallel()
	c := newCluster(t, stack.Options{})
	ref := c.source("stasis.test/restart:cp")
	for name, tc := range map[string]struct {
		image       string
		annotations []string
		again       bool // restored again
		starts      int  // in the files of the second, if it is not
	}{
		"name":           {stack.Busybox, []string{"restore-from", ref}, false, 1},
		"name, fresh":    {stack.Busybox, []string{"restore-from", ref, "restart", "fresh"}, false, 1},
		"name, restore":  {stack.Busybox, []string{"restore-from", ref, "restart", "restore"}, true, 0},
		"image":          {ref, nil, false, 2},
		"image, restore": {ref, []string{"restart", "restore"}, true, 0},
	} {
		t.Run(name, func(t *testing.T) {
			c.t = t
			p := c.RunPod(c.ctx, strings.ReplaceAll(name, ", ", "-"), stack.HandlerStasis, annotated(tc.annotations...))
			defer p.Remove(c.ctx)
			id, first, err := c.again(p, tc.image, 0)
			must(t, err)
			if first < 3 {
				t.Fatalf("it was not restored: it counts from %d", first)
			}
			for attempt := 1; attempt < 3; attempt++ {
				p.StopContainer(c.ctx, id, stopGrace)
				if id, first, err = c.again(p, tc.image, attempt); err != nil {
					t.Fatal(err)
				}
				if restored := first >= 3; restored != tc.again {
					t.Errorf("attempt %d counts from %d; want that it is restored again: %t", attempt, first, tc.again)
				}
				if !tc.again {
					checkFresh(c, p, id, tc.starts)
				}
			}
			c.nothingFetched()
			// What a shim leaves that was killed in the middle.
			p.StopContainer(c.ctx, id, stopGrace)
			folder := filepath.Join(c.Dir, "kubelet", "pods", p.Config.Metadata.Uid, "containers", "app")
			must(t, unix.Setxattr(folder, "trusted.stasis.restored", []byte("begun"), 0))
			_, first, err = c.again(p, tc.image, 3)
			if tc.again && (err != nil || first < 3) {
				t.Errorf("after a restore that was cut short: it counts from %d, %v", first, err)
			} else if !tc.again && (err == nil || !strings.Contains(err.Error(), "cut short") || !strings.Contains(err.Error(), "stasis.run/restart")) {
				t.Errorf("after a restore that was cut short: %v", err)
			}
		})
	}
}

// TestCRIRestoreTwo restores two containers of a pod, at the same time, and
// restarts containerd.
func TestCRIRestoreTwo(t *testing.T) {
	t.Parallel()
	c := newCluster(t, stack.Options{})
	source := c.RunPod(c.ctx, "source", stack.HandlerStasis)
	names := []string{"one", "two"}
	var annotations []string
	for i, name := range names {
		id := source.RunContainer(c.ctx, name, stack.Busybox, countingPod, c.kubelet(source, i))
		c.goesOn(source, name)
		annotations = append(annotations, "restore-from."+name, c.checkpoint(id, "stasis.test/"+name+":cp"))
	}
	source.Remove(c.ctx)
	p := c.RunPod(c.ctx, "both", stack.HandlerStasis, annotated(annotations...))
	// A sidecar is none of theirs.
	sidecar := p.RunContainer(c.ctx, "sidecar", stack.Busybox, countingPod)
	c.goesOn(p, "sidecar")
	ids := make([]string, len(names))
	errs := make([]error, len(names))
	var both sync.WaitGroup
	for i, name := range names {
		both.Go(func() { ids[i], errs[i] = p.RunContainerErr(c.ctx, name, stack.Busybox, countingPod, c.kubelet(p, i)) })
	}
	both.Wait()
	for i, name := range names {
		must(t, errs[i])
		c.restored(p, name, ids[i])
	}
	if first, _ := logged(p, "sidecar"); first != 1 {
		t.Errorf("the sidecar counts from %d", first)
	}
	if got := p.Exec(c.ctx, sidecar, "hostname"); got != "both\n" {
		t.Errorf("the restores have called the pod %q", got)
	}
	c.Restart()
	for i, name := range names {
		c.goesOn(p, name)
		c.restored(p, name, ids[i])
		if code := p.StopContainer(c.ctx, ids[i], stopGrace); code != 7 {
			t.Errorf("%s: stopped after a restart of containerd: exit code %d", name, code)
		}
	}
	p.Remove(c.ctx)
}

// TestCRIRestoreSharedIPC restores two containers of a pod whose checkpoints each
// have the System V IPC that they shared: that of the first is there already
// (docs/limits.md).
func TestCRIRestoreSharedIPC(t *testing.T) {
	t.Parallel()
	c := newCluster(t, stack.Options{})
	workload := func(name string) []string {
		return []string{"/probe", "run", "-items", "counter,sysv", "-socket", "/run/" + name}
	}
	source := c.RunPod(c.ctx, "source", stack.HandlerStasis)
	var annotations []string
	for i, name := range []string{"one", "two"} {
		id := source.RunContainer(c.ctx, name, stack.Probe, workload(name), c.kubelet(source, i))
		c.Poll(c.ctx, "the probe", func() bool { return strings.Contains(source.Log(name), "ready") })
		annotations = append(annotations, "restore-from."+name, c.checkpoint(id, "stasis.test/"+name+":cp"))
	}
	source.Remove(c.ctx)
	p := c.RunPod(c.ctx, "both", stack.HandlerStasis, annotated(annotations...))
	id := p.RunContainer(c.ctx, "one", stack.Probe, workload("one"), c.kubelet(p, 0))
	if _, err := p.RunContainerErr(c.ctx, "two", stack.Probe, workload("two"), c.kubelet(p, 1)); err == nil || !strings.Contains(err.Error(), "Failed to restore shm id") {
		t.Errorf("the second: %v", err)
	}
	if out := p.Exec(c.ctx, id, "/probe", "check", "-socket", "/run/one"); strings.Contains(out, "failed") {
		t.Errorf("the first: %s", out)
	}
	p.Remove(c.ctx)
}

// TestCRIRestoreKilled kills the shim in the middle of a restore: nothing is left,
// and whether the restore may be tried again depends on whether there were
// processes already.
func TestCRIRestoreKilled(t *testing.T) {
	t.Parallel()
	// What a killed shim's runtime leaves.
	c := newCluster(t, stack.Options{KnownLeaks: []string{"runc-process"}})
	ref := c.source("stasis.test/killed:cp")
	f := c.Faults()
	for name, kill := range map[string]func(p *stack.Pod){
		"while it is copied": func(p *stack.Pod) {
			shim := shimOf(c.t, p)
			go func() {
				for c.ctx.Err() == nil {
					if child := stager(c.ID); child != 0 {
						// It must not come to its end before the shim does.
						syscall.Kill(child, syscall.SIGSTOP)
						syscall.Kill(shim, syscall.SIGKILL)
						syscall.Kill(child, syscall.SIGCONT)
						return
					}
				}
			}()
		},
		"before": func(*stack.Pod) { f.KillShim("restore", stack.Before) },
		"after":  func(*stack.Pod) { f.KillShim("restore", stack.After) },
	} {
		t.Run(name, func(t *testing.T) {
			c.t = t
			pod := func(name string) *stack.Pod {
				return c.RunPod(c.ctx, name, stack.HandlerStasis, annotated("restore-from", ref), func(p *runtimeapi.PodSandboxConfig) { p.Metadata.Uid = "uid-" + strings.Fields(name)[0] })
			}
			p := pod(strings.ReplaceAll(name, " ", "-"))
			kill(p)
			if _, _, err := c.again(p, stack.Busybox, 0); err == nil {
				t.Fatal("it was restored without a shim")
			}
			f.Clear("restore")
			// The kubelet does not give up either while containerd cleans up.
			c.Poll(c.ctx, "the pod to be removed", func() bool { return p.RemoveErr(c.ctx) == nil })
			c.nothingFetched()
			// The kubelet makes another sandbox for the same pod.
			p = pod(strings.ReplaceAll(name, " ", "-"))
			_, first, err := c.again(p, stack.Busybox, 1)
			if begun := name != "while it is copied"; begun && (err == nil || !strings.Contains(err.Error(), "cut short")) {
				t.Errorf("tried again: %v; want that it was cut short", err)
			} else if !begun && (err != nil || first < 3) {
				t.Errorf("tried again: it counts from %d, %v", first, err)
			}
			p.Remove(c.ctx)
		})
	}
	c.t = t
	// A restore that fails leaves no process, so it may be tried again.
	f.Fail("restore", stack.Before, "as requested")
	p := c.RunPod(c.ctx, "fails", stack.HandlerStasis, annotated("restore-from", ref))
	_, _, err := c.again(p, stack.Busybox, 0)
	if err == nil || !strings.Contains(err.Error(), "as requested") || strings.Contains(err.Error(), "\n") {
		t.Errorf("a restore that fails: %v", err)
	}
	f.Clear("restore")
	if _, first, err := c.again(p, stack.Busybox, 1); err != nil || first < 3 {
		t.Errorf("tried again: it counts from %d, %v", first, err)
	}
	p.Remove(c.ctx)

	// In the middle, the copy is nobody else's to read.
	f.Hold("restore", stack.Before)
	p = c.RunPod(c.ctx, "held", stack.HandlerStasis, annotated("restore-from", ref))
	done := make(chan error)
	go func() { _, _, err := c.again(p, stack.Busybox, 0); done <- err }()
	f.WaitReached(c.ctx, "restore", stack.Before)
	copies, _ := filepath.Glob(filepath.Join(c.Dir, "root", "io.containerd.runtime.v2.task", "*", "*", "fetched"))
	if len(copies) != 1 {
		t.Errorf("copies of the checkpoint: %v", copies)
	}
	for _, dir := range copies {
		must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			must(t, err)
			info, err := d.Info()
			must(t, err)
			want := fs.FileMode(0o600)
			if d.IsDir() {
				want = fs.ModeDir | 0o700
			}
			if st := info.Sys().(*syscall.Stat_t); info.Mode() != want || st.Uid != 0 || st.Gid != 0 {
				t.Errorf("%s: %v, of user %d", path, info.Mode(), st.Uid)
			}
			return nil
		}))
	}
	f.Release("restore", stack.Before)
	must(t, <-done)
	c.nothingFetched()
	p.Remove(c.ctx)
}

// shimOf is the pid of a pod's shim.
func shimOf(t *testing.T, p *stack.Pod) int {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(p.Bundle(p.ID), "init.pid"))
	must(t, err)
	init, err := strconv.Atoi(string(data))
	must(t, err)
	parent, err := strconv.Atoi(procField(t, init, "PPid"))
	must(t, err)
	return parent
}

// stager is the pid of a stack's `stasis stage`, or 0.
func stager(id string) int {
	entries, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, e := range entries {
		args, _ := os.ReadFile(e)
		if strings.Contains(string(args), "\x00stage\x00") && strings.Contains(string(args), id) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(e)))
			return pid
		}
	}
	return 0
}

// TestCRIRestoreMemory restores into a pod whose memory limit the processes do not
// fit into.
func TestCRIRestoreMemory(t *testing.T) {
	t.Parallel()
	c := newCluster(t, stack.Options{})
	limited := func(mib int64) func(*runtimeapi.ContainerConfig) {
		return func(config *runtimeapi.ContainerConfig) {
			config.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: mib << 20}
		}
	}
	workload := []string{"/probe", "run", "-items", "counter,heap", "-mib", "64"}
	p := c.RunPod(c.ctx, "source", stack.HandlerStasis)
	id := p.RunContainer(c.ctx, "app", stack.Probe, workload, c.kubelet(p, 0), limited(256))
	c.Poll(c.ctx, "the probe", func() bool { return strings.Contains(p.Log("app"), "ready") })
	ref := c.checkpoint(id, "stasis.test/memory:cp")
	p.Remove(c.ctx)
	for mib, says := range map[int64]string{
		60: "MiB of memory, the container may have 60 MiB", // by the size of the images
		66: "out of memory",                                // of which the kernel needs more
	} {
		p = c.RunPod(c.ctx, "small", stack.HandlerStasis, annotated("restore-from", ref))
		id, err := p.RunContainerErr(c.ctx, "app", stack.Probe, workload, c.kubelet(p, 0), limited(mib))
		if err == nil || !strings.Contains(err.Error(), says) || strings.Contains(err.Error(), "\n") {
			t.Errorf("restored into %d MiB of memory: %v", mib, err)
		}
		p.RemoveContainer(c.ctx, id)
		p.Remove(c.ctx)
	}
	p = c.RunPod(c.ctx, "large", stack.HandlerStasis, annotated("restore-from", ref))
	id = p.RunContainer(c.ctx, "app", stack.Probe, workload, c.kubelet(p, 0), limited(256))
	p.Exec(c.ctx, id, "/probe", "check")
	p.Remove(c.ctx)
}

// TestCRIRestoreTCP closes the connections of a restored container, whose pod has
// another address, unless the annotation says otherwise.
func TestCRIRestoreTCP(t *testing.T) {
	t.Parallel()
	c := newCluster(t, stack.Options{})
	p := c.RunPod(c.ctx, "source", stack.HandlerStasis)
	network := p.IP(c.ctx)
	echo := stack.EchoServer(t, network[:strings.LastIndexByte(network, '.')]+".1")
	workload := []string{"/probe", "run", "-items", "counter,out", "-connect", echo}
	id := p.RunContainer(c.ctx, "app", stack.Probe, workload, c.kubelet(p, 0))
	c.Poll(c.ctx, "the probe", func() bool { return strings.Contains(p.Log("app"), "ready") })
	const ref = "stasis.test/tcp:cp"
	c.Stasis("--namespace", stack.CRINamespace, "checkpoint", id, ref, "--tcp-established")
	p.Remove(c.ctx)

	p = c.RunPod(c.ctx, "closed", stack.HandlerStasis, annotated("restore-from", ref))
	id = p.RunContainer(c.ctx, "app", stack.Probe, workload, c.kubelet(p, 0))
	if out := p.Exec(c.ctx, id, "sh", "-c", "/probe check; true"); !strings.Contains(out, `"failed":{"out":`) || strings.Contains(out, "timeout") {
		t.Errorf("the probe says %s", out)
	}
	p.Remove(c.ctx)
	p = c.RunPod(c.ctx, "kept", stack.HandlerStasis, annotated("restore-from", ref, "tcp", "keep"))
	if _, err := p.RunContainerErr(c.ctx, "app", stack.Probe, workload, c.kubelet(p, 0)); err == nil || !strings.Contains(err.Error(), "Can't bind inet socket") {
		t.Errorf("restored with connections of another address: %v", err)
	}
	p.Remove(c.ctx)
}

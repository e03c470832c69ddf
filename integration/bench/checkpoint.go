package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/integration/stack"
)

// size is a size of heap, and how many rounds are run of it.
type size struct{ mib, rounds int }

func (s size) String() string {
	if s.mib >= 1024 && s.mib%1024 == 0 {
		return fmt.Sprintf("%d GiB", s.mib/1024)
	}
	return fmt.Sprintf("%d MiB", s.mib)
}

// checkpoint measures dumps and restores of a process with a heap full of
// random bytes. The process itself measures for how long it stands still.
func (b *bench) checkpoint(size size) {
	b.logf("checkpoint, %v: %d times each", size, size.rounds)
	bundle := b.newBundle(stack.Probe, stack.Args(gap(size.mib)...))
	defer bundle.remove()
	bundle.start()
	b.settleProbe(bundle.pid)
	containers := map[string]*stack.Container{}
	pid := func(shim string) func() int { return func() int { return int(containers[shim].Task.Pid()) } }
	for _, shim := range shims {
		containers[shim] = b.startProbe(shim, gap(size.mib))
		defer containers[shim].Delete(b.ctx)
	}

	toFolder := func(name string) contender {
		return contender{name, func() []float64 {
			return b.dump(size, pid(name), func(dir string) { containers[name].Checkpoint(b.ctx, dir, nil) })
		}}
	}
	b.rounds(size.rounds, frozenRows(fmt.Sprintf("checkpoint %v", size), target{}),
		toFolder(stasis), toFolder(upstream),
		contender{raw, func() []float64 { return b.dump(size, bundle.pid, bundle.checkpoint) }})

	b.logf("checkpoint into containerd, %v: %d times each", size, size.rounds)
	toContent := func(name string) contender {
		return contender{name, func() []float64 {
			var image client.Image
			figures := b.dump(size, pid(name), func(string) { image = b.taskCheckpoint(containers[name]) })
			// At once, and what it consists of too.
			if err := b.s.Client().ImageService().Delete(b.ctx, image.Name(), images.SynchronousDelete()); err != nil {
				b.tb.Fatalf("remove checkpoint image: %v", err)
			}
			return figures
		}}
	}
	b.rounds(size.rounds, frozenRows(fmt.Sprintf("ctr tasks checkpoint %v", size), target{upstream, 1.0}),
		toContent(stasis), toContent(upstream))

	b.logf("restore, %v: %d times each", size, size.rounds)
	// Each restores its own: how a checkpoint was made decides what there is to do.
	dirs := map[string]string{}
	for _, name := range []string{stasis, upstream, raw} {
		dirs[name] = b.dumpFolder()
		defer os.RemoveAll(dirs[name])
	}
	for _, shim := range shims {
		containers[shim].Checkpoint(b.ctx, dirs[shim], nil)
		b.endTask(containers[shim])
	}
	bundle.checkpoint(dirs[raw])
	bundle.kill()
	restore := func(name string) contender {
		c := containers[name]
		return contender{name, func() []float64 {
			b.warm(size)
			start := time.Now()
			c.Restore(b.ctx, dirs[name])
			figures := since(start)
			b.askProbe(pid(name)())
			b.endTask(c)
			return figures
		}}
	}
	b.rounds(size.rounds, []*row{{Name: fmt.Sprintf("restore %v to running", size), Unit: "ms", Target: target{raw, 1.1}}},
		restore(stasis), restore(upstream),
		contender{raw, func() []float64 {
			b.warm(size)
			start := time.Now()
			bundle.restore(dirs[raw])
			figures := since(start)
			b.askProbe(bundle.pid())
			bundle.kill()
			return figures
		}})
}

func frozenRows(name string, t target) []*row {
	return []*row{
		{Name: name + ": total", Unit: "ms", Target: t},
		{Name: name + ": frozen", Unit: "ms", Target: t},
	}
}

// dump measures one checkpoint of a container whose init is the probe: how long
// it takes, and for how long the container was frozen.
func (b *bench) dump(size size, pid func() int, checkpoint func(dir string)) []float64 {
	dir := b.dumpFolder()
	// What others have written shall not hold this one up.
	unix.Sync()
	b.warm(size)
	b.askProbe(pid()) // forget what was before
	start := time.Now()
	checkpoint(dir)
	total := time.Since(start)
	// The probe's clock is looked at by another thread than the one that
	// answers, and must have run since the thaw.
	time.Sleep(20 * time.Millisecond)
	frozen := b.askProbe(pid())
	if err := os.RemoveAll(dir); err != nil {
		b.tb.Fatalf("%v", err)
	}
	return []float64{ms(total), ms(frozen)}
}

// warm touches more free memory than a checkpoint or a restore of size takes. A
// virtual machine's host takes free memory back after seconds, and the first to
// need it again pays for that: without this, the same dump took 1.3 s or 3.5 s,
// by what had run before it.
func (b *bench) warm(size size) {
	memory, err := unix.Mmap(-1, 0, (size.mib*5/2+256)<<20, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_ANON|unix.MAP_PRIVATE|unix.MAP_POPULATE)
	if err != nil {
		b.tb.Fatalf("warm up memory: %v", err)
	}
	unix.Munmap(memory)
}

// dumpFolder makes a new folder; all are on one file system.
func (b *bench) dumpFolder() string {
	dir := filepath.Join(b.s.Dir, b.name("dump"))
	if err := os.Mkdir(dir, 0o700); err != nil {
		b.tb.Fatalf("%v", err)
	}
	return dir
}

// taskCheckpoint does what `ctr tasks checkpoint` does.
func (b *bench) taskCheckpoint(c *stack.Container) client.Image {
	task, err := c.Container.Task(b.ctx, nil)
	if err != nil {
		b.tb.Fatalf("checkpoint: %v", err)
	}
	image, err := task.Checkpoint(b.ctx, func(info *client.CheckpointTaskInfo) error {
		info.Name = b.name("checkpoint")
		info.Options = &options.CheckpointOptions{}
		return nil
	})
	if err != nil {
		b.tb.Fatalf("checkpoint: %v\n%s", err, c.CRIULog("dump", ""))
	}
	return image
}

// gap is a probe that looks at the clock, with a heap of so many MiB.
func gap(mib int, more ...string) []string {
	return append([]string{"/probe", "gap", "-mib", fmt.Sprint(mib)}, more...)
}

// startProbe starts a container with a probe.
func (b *bench) startProbe(shim string, probe []string) *stack.Container {
	c := b.container(shim, stack.Probe, stack.Args(probe...))
	c.Start(b.ctx)
	b.settleProbe(func() int { return int(c.Task.Pid()) })
	return c
}

// settleProbe waits until a probe has filled its heap.
func (b *bench) settleProbe(pid func() int) {
	b.s.Poll(b.ctx, "the probe", func() bool {
		_, err := longestGap(pid())
		return err == nil
	})
}

func (b *bench) askProbe(pid int) time.Duration {
	gap, err := longestGap(pid)
	if err != nil {
		b.tb.Fatalf("ask the probe: %v", err)
	}
	return gap
}

// longestGap asks the probe, which is the process pid, for how long it stood
// still at most since it was last asked.
func longestGap(pid int) (time.Duration, error) {
	conn, err := net.DialTimeout("unix", fmt.Sprintf("/proc/%d/root/run/probe.sock", pid), time.Second)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := fmt.Fprintln(conn, "gap-max"); err != nil {
		return 0, err
	}
	var gap time.Duration
	in := json.NewDecoder(conn)
	if err := in.Decode(&gap); err != nil {
		return 0, err
	}
	// Wait for its end to be closed, lest it is part of the next dump.
	if err := conn.(*net.UnixConn).CloseWrite(); err != nil {
		return 0, err
	}
	var rest json.RawMessage
	if err := in.Decode(&rest); err == nil || !strings.Contains(err.Error(), "EOF") {
		return 0, errors.New("the probe says more than was asked")
	}
	return gap, nil
}

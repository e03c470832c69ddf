package main

import (
	"time"

	"github.com/stasis-run/stasis/integration/stack"
)

// latency measures what every user of a container waits for.
func (b *bench) latency() {
	n := b.few(50)
	b.logf("run --rm true, %d times each", n)
	spec := stack.Args("true")
	bundle := b.newBundle(stack.Busybox, spec)
	rows := []*row{
		{Name: "run --rm true", Unit: "ms", Target: target{upstream, 1.0}},
		{Name: "  of it the task, create to delete", Unit: "ms"},
	}
	b.rounds(n, rows,
		contender{stasis, func() []float64 { return b.run(stasis) }},
		contender{upstream, func() []float64 { return b.run(upstream) }},
		contender{raw, func() []float64 {
			start := time.Now()
			bundle.runc("run", "--bundle", bundle.dir, bundle.id)
			d := ms(time.Since(start))
			return []float64{d, d}
		}},
	)
	bundle.remove()

	b.logf("exec true, %d times each", n)
	sleep := stack.Args("sleep", "1000")
	var contenders []contender
	for _, shim := range shims {
		c := b.container(shim, stack.Busybox, sleep)
		c.Start(b.ctx)
		defer b.kill(c)
		contenders = append(contenders, contender{shim, func() []float64 { return b.exec(c) }})
	}
	bundle = b.newBundle(stack.Busybox, sleep)
	defer bundle.remove()
	bundle.start()
	b.rounds(n, []*row{{Name: "exec true", Unit: "ms", Target: target{upstream, 1.0}}}, append(contenders,
		contender{raw, func() []float64 {
			start := time.Now()
			bundle.runc("exec", bundle.id, "true")
			return since(start)
		}})...)
}

// run does what `ctr run --rm` does.
func (b *bench) run(shim string) []float64 {
	start := time.Now()
	c := b.container(shim, stack.Busybox, stack.Args("true"))
	task := time.Now()
	c.Start(b.ctx)
	c.Wait(b.ctx)
	c.DeleteTask(b.ctx)
	taskTime := time.Since(task)
	c.Delete(b.ctx)
	return []float64{ms(time.Since(start)), ms(taskTime)}
}

func (b *bench) exec(c *stack.Container) []float64 {
	start := time.Now()
	c.Exec(b.ctx, "true")
	return since(start)
}

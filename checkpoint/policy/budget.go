package policy

import (
	"context"

	"github.com/stasis-run/stasis/checkpoint/fault"
)

// Limits on what one check decodes, over all images of a checkpoint. They are far
// beyond what containers have: a million descriptors are some six million messages.
const (
	maxEntries = 8 << 20
	maxDecoded = 1 << 30 // bytes
	// maxRuns is of pages, which are decoded one at a time and not kept. One that
	// alternates in 256 GiB of memory has as many.
	maxRuns = 32 << 20
	// maxLookups are components of paths that are looked up.
	maxLookups = 8 << 20
)

// A budget bounds the work of a check, whatever the images hold. Every loop over
// what they hold spends of it, and so ends with the context.
type budget struct {
	ctx                   context.Context
	entries, bytes, steps int
	runs                  int
}

func newBudget(ctx context.Context) budget {
	return budget{ctx: ctx, entries: maxEntries, bytes: maxDecoded, steps: maxLookups, runs: maxRuns}
}

var errBudget = fault.Invalid("it has more entries than any container needs, and is not checked further")

// spend is for messages, and their size.
func (b *budget) spend(entries, bytes int) error {
	b.entries -= entries
	b.bytes -= bytes
	return b.look(b.entries)
}

// step is for a component of a path.
func (b *budget) step() error {
	b.steps--
	return b.look(b.steps)
}

// run is for a run of pages.
func (b *budget) run() error {
	b.runs--
	return b.look(b.runs)
}

// look fails where nothing is left. The context is looked at now and then: that
// takes a lock.
func (b *budget) look(count int) error {
	if b.entries < 0 || b.bytes < 0 || b.steps < 0 || b.runs < 0 {
		return errBudget
	}
	if count%256 == 0 {
		return context.Cause(b.ctx)
	}
	return nil
}

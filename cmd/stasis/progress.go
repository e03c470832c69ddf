package main

import (
	"io"
	"os"
	"sync"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/term"

	"github.com/stasis-run/stasis/node"
)

// progress shows how the work of one command comes along, a bar at a time.
type progress struct {
	a *app
	w *os.File

	mu   sync.Mutex
	of   string
	what string // the stage
	bar  *mpb.Bar
}

// progress returns what shows how work comes along, if a person is looking: stderr is
// a terminal, and they did not say --quiet. Else it is nil.
func (a *app) progress() node.Progress {
	f, ok := a.err.(*os.File)
	if a.quiet || !ok || !term.IsTerminal(int(f.Fd())) {
		return nil
	}
	return (&progress{a: a, w: f}).show
}

// newBar adds a bar. It returns nil after endProgress, which ends all bars for good.
func (a *app) newBar(w io.Writer, options ...mpb.BarOption) *mpb.Bar {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.barsEnded {
		return nil
	}
	if a.bars == nil {
		a.bars = mpb.New(mpb.WithOutput(w), mpb.WithWidth(40), mpb.WithRefreshRate(150*time.Millisecond), mpb.WithAutoRefresh())
	}
	return a.bars.New(0, mpb.BarStyle(), options...)
}

// show shows an update. Each stage has a bar, which takes the place of the one before.
func (p *progress) show(u node.Update) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.bar != nil && (p.of != u.Of || p.what != u.Stage) {
		p.bar.Abort(true)
		p.bar = nil
	}
	if u.Stage == "" {
		return
	}
	if p.bar == nil {
		p.of, p.what = u.Of, u.Stage
		p.begin()
	}
	if p.bar == nil {
		return
	}
	// A bar that has all its total ends, and nobody knows yet.
	p.bar.SetTotal(max(u.Total, u.Done+1), false)
	p.bar.SetCurrent(u.Done)
}

// begin begins the bar of a stage.
func (p *progress) begin() {
	left := decor.AverageETA(decor.ET_STYLE_GO)
	p.bar = p.a.newBar(p.w, mpb.BarRemoveOnComplete(),
		mpb.PrependDecorators(decor.Name(node.Printable(p.of)+"  "+node.Printable(p.what)+"  ", decor.WCSyncSpaceR)),
		mpb.AppendDecorators(
			decor.Any(func(s decor.Statistics) string {
				if !known(s) {
					return size(s.Current)
				}
				return size(s.Current) + " of " + size(s.Total)
			}, decor.WCSyncSpace),
			decor.AverageSpeed(decor.SizeB1024(0), "% .1f", decor.WCSyncSpace),
			decor.Any(func(s decor.Statistics) string {
				if !known(s) {
					return ""
				}
				text, _ := left.Decor(s)
				return text
			}, decor.WCSyncSpace),
		))
}

// known tells whether a bar has a total; see show.
func known(s decor.Statistics) bool { return s.Total > s.Current+1 }

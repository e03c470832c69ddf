package main

import (
	"io"
	"os"
	"sync"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/term"
)

// bars is the part of the terminal where the bars of one command are drawn.
type bars struct{ p *mpb.Progress }

func (b *bars) stop() { b.p.Shutdown() }

// progress shows how one thing comes along. All its methods may be called on
// one that shows nothing, and from any goroutine.
type progress struct {
	bars *bars // nil: show nothing
	name string

	mu    sync.Mutex
	stage string
	bar   *mpb.Bar
}

// progress begins to show how the work on name comes along, if a person is
// looking: stderr is a terminal, and they did not say --quiet.
func (a *app) progress(name string) *progress {
	f, ok := a.err.(*os.File)
	if a.quiet || !ok || !term.IsTerminal(int(f.Fd())) {
		return &progress{}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.bars == nil {
		a.bars = newBars(f)
	}
	return &progress{bars: a.bars, name: name}
}

func newBars(w io.Writer) *bars {
	return &bars{mpb.New(mpb.WithOutput(w), mpb.WithWidth(40), mpb.WithRefreshRate(150*time.Millisecond), mpb.WithAutoRefresh())}
}

// silent tells that nobody is looking.
func (p *progress) silent() bool { return p.bars == nil }

// Stage begins the next stage; the one before has ended. The same name again
// changes nothing.
func (p *progress) Stage(name string) {
	if p.silent() {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.bar != nil && p.stage == name {
		return
	}
	p.end()
	p.stage = name
	left := decor.AverageETA(decor.ET_STYLE_GO)
	p.bar = p.bars.p.New(0, mpb.BarStyle(), mpb.BarRemoveOnComplete(),
		mpb.PrependDecorators(decor.Name(printable(p.name)+"  "+printable(name)+"  ", decor.WCSyncSpaceR)),
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

// known tells whether a bar has a total; see Set.
func known(s decor.Statistics) bool { return s.Total > s.Current+1 }

// Set says how many bytes of how many are done; a total of 0 is unknown.
func (p *progress) Set(done, total int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.bar == nil {
		return
	}
	// A bar that has all its total ends, and nobody knows yet.
	p.bar.SetTotal(max(total, done+1), false)
	p.bar.SetCurrent(done)
}

// Done ends the last stage.
func (p *progress) Done() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.end()
}

func (p *progress) end() {
	if p.bar != nil {
		p.bar.Abort(true)
		p.bar = nil
	}
}

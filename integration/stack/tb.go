package stack

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"syscall"
)

// TB is what a Stack needs of the test that it serves: the part of testing.TB
// that a program can provide as well; see Main.
type TB interface {
	Name() string
	Context() context.Context
	Helper()
	Logf(format string, args ...any)
	Errorf(format string, args ...any)
	// Fatalf does not return.
	Fatalf(format string, args ...any)
	Failed() bool
	// Cleanup calls f when the test is over, the last one added first.
	Cleanup(f func())
}

// Main runs f as a test is run, for programs: it gives f a TB that reports on
// stderr, calls what was registered with Cleanup however f ends, and returns
// the exit code. SIGINT and SIGTERM cancel the TB's context; f must notice.
func Main(name string, f func(TB)) (code int) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	// The one above is for f. Once cleanup runs, a second signal must not
	// kill us: what it would leave behind is worth the wait.
	m := &mainTB{name: name, ctx: ctx}
	m.run(func() { f(m) })
	for len(m.cleanups) > 0 {
		last := len(m.cleanups) - 1
		cleanup := m.cleanups[last]
		m.cleanups = slices.Delete(m.cleanups, last, last+1)
		m.run(cleanup)
	}
	if m.failed || ctx.Err() != nil {
		return 1
	}
	return 0
}

// mainTB implements TB for Main; it is used by one goroutine.
type mainTB struct {
	name     string
	ctx      context.Context
	failed   bool
	cleanups []func()
}

// fatal is what Fatalf panics with, for run to recover.
type fatal struct{}

func (m *mainTB) run(f func()) {
	defer func() {
		if r := recover(); r != nil && r != (fatal{}) {
			panic(r)
		}
	}()
	f()
}

func (m *mainTB) Name() string             { return m.name }
func (m *mainTB) Context() context.Context { return m.ctx }
func (m *mainTB) Helper()                  {}
func (m *mainTB) Failed() bool             { return m.failed }
func (m *mainTB) Cleanup(f func())         { m.cleanups = append(m.cleanups, f) }

func (m *mainTB) Logf(format string, args ...any) {
	fmt.Fprintf(os.Stderr, m.name+": "+format+"\n", args...)
}

func (m *mainTB) Errorf(format string, args ...any) {
	m.failed = true
	m.Logf(format, args...)
}

func (m *mainTB) Fatalf(format string, args ...any) {
	m.Errorf(format, args...)
	panic(fatal{})
}

// Command stasis checkpoints containers, restores them, and keeps, ships and
// shows checkpoints. Each command has a file of its own.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"syscall"

	"github.com/stasis-run/stasis/node"
)

// Set by the build, with -ldflags "-X main.version=...".
var (
	version = "dev"
	commit  = "unknown"
	date    = "unknown"
)

// Exit codes. A command that has others says so in its help.
const (
	exitFailed      = 1
	exitUsage       = 2   // the command line is wrong, and nothing was done
	exitInterrupted = 130 // as a shell has it for SIGINT
	exitHungUp      = 141 // as a shell has it for SIGPIPE
)

// exitCode is an error for a command that has said what is to be said.
type exitCode int

func (e exitCode) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

// wrongUsage is what a command finds wrong with its command line.
type wrongUsage struct{ error }

func usageError(format string, args ...any) error { return wrongUsage{fmt.Errorf(format, args...)} }

func main() {
	// A write past the page cache waits for the disk, and Go's scheduler finds out
	// milliseconds later that the thread's CPU is free: one more uses that.
	runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + 1)
	signals := []os.Signal{os.Interrupt, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) { // else it is nohup's
		signals = append(signals, syscall.SIGHUP)
	}
	ctx, stop := signal.NotifyContext(context.Background(), signals...)
	// It would end us before what was unpacked is removed. Writing gives an error
	// instead. It is not ignored, as the programs that we run would inherit that.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	// A second signal ends us at once: what then is left lying, prune removes.
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// run is main for tests: it runs one command line and returns the exit code.
func run(ctx context.Context, args []string, in io.Reader, out, errs io.Writer) int {
	working, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	a := &app{in: in, out: newOutput(out, cancel), err: errs}
	root := newRootCommand(a)
	root.SetArgs(args)
	cmd, err := root.ExecuteContextC(working)
	err = a.explainSize(cmd, err)
	a.close()
	var code exitCode
	unsaid := a.out.failed()
	if o := (*outputError)(nil); unsaid == nil && errors.As(err, &o) {
		unsaid = o
	}
	if unsaid != nil {
		return reportUnsaid(errs, err, unsaid)
	}
	switch {
	case err == nil:
		return 0
	case errors.As(err, &code):
		return int(code)
	case ctx.Err() != nil:
		// The error may tell what was left, and where.
		fmt.Fprintf(errs, "stasis: interrupted: %v\n", err)
		return exitInterrupted
	}
	fmt.Fprintf(errs, "stasis: %v\n", err)
	if !a.started || errors.As(err, &wrongUsage{}) || errors.Is(err, node.ErrRequest) {
		fmt.Fprintf(errs, "See 'stasis --help'.\n")
		return exitUsage
	}
	return exitFailed
}

// reportUnsaid says that the output could not be written, and returns the exit code.
// err is what came of the command otherwise.
func reportUnsaid(errs io.Writer, err, unsaid error) int {
	var code exitCode
	switch {
	case err == nil, errors.Is(err, context.Canceled), errors.As(err, &code):
		err = unsaid
	case !errors.Is(err, unsaid):
		err = errors.Join(err, unsaid)
	}
	if !hungUp(unsaid) {
		fmt.Fprintf(errs, "stasis: %v\n", err)
		return exitFailed
	}
	if err != unsaid { // else it is what everybody does with head
		fmt.Fprintf(errs, "stasis: %v\n", err)
	}
	return exitHungUp
}

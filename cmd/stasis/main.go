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
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// A second signal ends us at once: what then is left lying, prune removes.
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// run is main for tests: it runs one command line and returns the exit code.
func run(ctx context.Context, args []string, in io.Reader, out, errs io.Writer) int {
	a := &app{in: in, out: out, err: errs}
	root := newRootCommand(a)
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	a.close()
	var code exitCode
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
	if !a.started || errors.As(err, &wrongUsage{}) {
		fmt.Fprintf(errs, "See 'stasis --help'.\n")
		return exitUsage
	}
	return exitFailed
}

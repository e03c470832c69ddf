// Package shim is how containerd starts, finds, groups and deletes a shim.
//
// The binary runs in one of five ways:
//
//	start    containerd's call. Finds the shim of the container's group, or
//	         spawns one, and prints its address.
//	(none)   the shim itself, spawned by start: serves the Task API on the
//	         socket that it inherits, until it is told to shut down.
//	delete   containerd's call after a shim died: removes what the container
//	         left, and prints how it ended.
//	-info    describes the runtime.
//	swrk     the OCI runtime's call in a dump or a restore, under the name criu,
//	         see package standin.
//
// What is called a group is the set of containers that share a shim: those of
// a pod, mostly.
package shim

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/types/known/anypb"
)

// Build says which build of the shim this is.
type Build struct {
	Version string
	Commit  string
	Date    string
}

// Config is what a Service is given.
type Config struct {
	// Namespace is containerd's namespace of every container of the shim.
	Namespace string
	// Address is containerd's gRPC socket.
	Address string
	// Publish queues an event. It never blocks; events leave in the order of
	// the calls.
	Publish func(topic string, event any)
	// Shutdown asks the shim to end. It returns at once and may be called
	// more than once.
	Shutdown func()
}

// Service is what the shim serves.
type Service interface {
	// Register adds the service to the server.
	Register(*ttrpc.Server)
	// Close is called once, after the server stopped accepting connections
	// and before the events are drained: what it publishes still goes out.
	Close()
}

// Runtime is what the shim needs to know of containers.
type Runtime struct {
	NewService func(Config) (Service, error)
	// Cleanup removes what is left of the container whose shim died.
	Cleanup func(ctx context.Context, namespace, bundle, id string) (*taskapi.DeleteResponse, error)
	// DecodeOptions decodes either type of runtime options.
	DecodeOptions func(*anypb.Any) (*options.Options, error)
}

// Main runs the shim binary and returns its exit code.
func Main(build Build, rt Runtime) int {
	err := run(os.Args[1:], build, rt)
	if err == nil || errors.Is(err, flag.ErrHelp) {
		return 0
	}
	// containerd shows the standard error to its user.
	fmt.Fprintf(os.Stderr, "%s: %v\n", filepath.Base(os.Args[0]), err)
	return 1
}

func run(args []string, build Build, rt Runtime) error {
	f, err := parseFlags(args)
	if err != nil {
		return err
	}
	switch {
	case f.version:
		fmt.Printf("%s:\n  Version:    %s\n  Commit:     %s\n  Date:       %s\n  Go version: %s\n",
			filepath.Base(os.Args[0]), build.Version, build.Commit, build.Date, runtime.Version())
		return nil
	case f.info:
		return printInfo(context.Background(), os.Stdin, os.Stdout, build, rt)
	}
	if err := f.validate(); err != nil {
		return err
	}
	switch f.action {
	case "start":
		err = start(f, os.Stdin, os.Stdout, rt)
	case "delete":
		err = deleteTask(context.Background(), f, os.Stdout, rt)
	default:
		err = serve(f, rt)
	}
	if err != nil {
		action := f.action
		if action == "" {
			action = "serve"
		}
		return fmt.Errorf("%s container %q in namespace %q: %w", action, f.id, f.namespace, err)
	}
	return nil
}

// flags are those of containerd's runtime v2, which every version passes.
type flags struct {
	namespace string
	id        string
	address   string
	bundle    string
	socket    string
	debug     bool
	version   bool
	info      bool
	action    string
}

func parseFlags(args []string) (flags, error) {
	var f flags
	fs := flag.NewFlagSet("containerd-shim-stasis-v1", flag.ContinueOnError)
	fs.StringVar(&f.namespace, "namespace", "", "containerd `namespace` of the container")
	fs.StringVar(&f.id, "id", "", "`id` of the container")
	fs.StringVar(&f.address, "address", "", "`address` of containerd's gRPC socket")
	fs.StringVar(&f.bundle, "bundle", "", "`path` of the bundle, if not the working directory")
	fs.StringVar(&f.socket, "socket", "", "`path` of a socket to serve on, instead of an inherited one")
	fs.BoolVar(&f.debug, "debug", false, "log debug messages")
	fs.BoolVar(&f.version, "v", false, "")
	fs.BoolVar(&f.version, "version", false, "print the version and exit")
	fs.BoolVar(&f.info, "info", false, "read options from standard input, print the runtime's info, both as protobuf, and exit")
	// Accepted because containerd passes them, or may.
	fs.String("publish-binary", "", "ignored: events go to $TTRPC_ADDRESS")
	fs.String("debug-socket", "", "ignored: send SIGUSR1 to have the goroutines in the log")
	if err := fs.Parse(args); err != nil {
		return flags{}, err
	}
	f.action = fs.Arg(0)
	return f, nil
}

func (f flags) validate() error {
	switch f.action {
	case "", "start", "delete":
	default:
		return fmt.Errorf("unknown action %q: it is start, delete, or none to serve", f.action)
	}
	if err := validateName("namespace", f.namespace); err != nil {
		return err
	}
	return validateName("id", f.id)
}

// validateName refuses what would lead out of a directory when joined to it:
// containerd makes one directory for every namespace and every id.
func validateName(flag, name string) error {
	switch {
	case name == "":
		return fmt.Errorf("-%s is required", flag)
	case name == "." || name == ".." || strings.ContainsAny(name, "/\x00"):
		return fmt.Errorf("-%s %q: a path is not a valid %s", flag, name, flag)
	}
	return nil
}

// bundleDir is the bundle of the container: containerd starts the shim in it
// and, for delete, names it as well.
func (f flags) bundleDir() (string, error) {
	if f.bundle != "" {
		return filepath.Abs(f.bundle)
	}
	return os.Getwd()
}

// readAll reads what containerd writes to the standard input.
func readAll(r io.Reader) ([]byte, error) {
	const limit = 10 << 20
	data, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return nil, fmt.Errorf("read standard input: %w", err)
	}
	if len(data) > limit {
		return nil, fmt.Errorf("read standard input: more than %d bytes", limit)
	}
	return data, nil
}

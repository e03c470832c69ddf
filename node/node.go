// Package node has every operation on the containers and checkpoints of a node: the
// command line, and any other program, calls them as methods of a Node.
//
//	n := node.Dial("/run/containerd/containerd.sock", node.Options{State: "/var/lib/stasis"})
//	defer n.Close()
//	ctx = namespaces.WithNamespace(ctx, "k8s.io")
//	made, err := n.Checkpoint(ctx, node.CheckpointRequest{Containers: []string{"db"}})
//
// Contexts carry containerd's namespace, as for containerd's own client. An operation
// ends with its context, when it has removed what it made.
//
// A request and a result are plain values. A request tells how the work comes along by
// its Progress. An error matches one of errdefs' classes where a program can do
// something about it, and says what a person can: it names the flags of the command
// line. One that matches ErrRequest is about the request, and nothing was done.
//
// A Node has no effect on its process: no signals, no log level, no scheduling, nothing
// on stdout and stderr. Its methods may be called at the same time.
package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/sign"
)

// RuntimeName is containerd's name of Stasis's shim.
const RuntimeName = "io.containerd.stasis.v1"

// ErrRequest is matched by the error of a request that is wrong in itself. Nothing was
// done. It matches errdefs.ErrInvalidArgument.
var ErrRequest = fault.Invalid("wrong request")

func requestError(format string, args ...any) error { return fault.New(ErrRequest, format, args...) }

// Options are those of a Node.
type Options struct {
	// State is the folder for work under way, which is made with mode 0700 when it is
	// needed. Nodes, and processes, may share it.
	State string
	// Version is noted in checkpoints as the version of the program that made them.
	Version string
	// ImagesOnly has checkpoints be named as images in containerd only, and no archive or
	// folder of this host be opened by its path: whoever names it may not be root.
	ImagesOnly bool
	// Keys is where the keys are that sign checkpoints, and that are trusted; empty:
	// sign.DefaultDir.
	Keys sign.Dir
	// Logger is told, as Info, what a person should know of an operation that
	// succeeds, and as Warn what went wrong beside it; nil: nobody is told.
	Logger *slog.Logger
	// IdleCPUs, if not nil, is called before an image is started while CRIU still writes
	// its container, and undo when CRIU has ended. The container stands still meanwhile,
	// so a program that does nothing else should let CRIU have the CPUs first. It may be
	// called for several containers at the same time.
	IdleCPUs func() (undo func())
}

// Node has the operations. It holds a connection to containerd.
type Node struct {
	o       Options
	log     *slog.Logger
	keys    sign.Dir
	address string // of containerd; empty: the client is the caller's

	mu     sync.Mutex
	client *client.Client // nil: not connected yet

	folders sync.Map // those that checkpoints are being made in, by CheckpointFolder

	bundles  sync.Mutex
	reserved map[string]*reservation // of bundle containers, by NAMESPACE/ID
}

// New returns a Node that uses a client of containerd, which the caller closes.
func New(c *client.Client, o Options) *Node {
	n := Dial("", o)
	n.client = c
	return n
}

// Dial returns a Node for the containerd behind a socket. The first operation that needs
// containerd connects to it.
func Dial(address string, o Options) *Node {
	n := &Node{o: o, log: o.Logger, keys: o.Keys, address: strings.TrimPrefix(address, "unix://")}
	if n.log == nil {
		n.log = slog.New(slog.DiscardHandler)
	}
	if n.keys == "" {
		n.keys = sign.DefaultDir()
	}
	return n
}

// Close closes the connection to containerd that Dial is for.
func (n *Node) Close() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.client == nil || n.address == "" {
		return nil
	}
	err := n.client.Close()
	n.client = nil
	return err
}

// Client returns the client of containerd, which stays the Node's.
func (n *Node) Client(ctx context.Context) (*client.Client, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.client != nil {
		return n.client, nil
	}
	// The client would connect in the background, and every call report a
	// socket that is not there in its own way.
	conn, err := (&net.Dialer{Timeout: 10 * time.Second}).DialContext(ctx, "unix", n.address)
	if err != nil {
		return nil, connectError(n.address, err)
	}
	conn.Close()
	c, err := client.New(n.address, client.WithTimeout(10*time.Second))
	if err != nil {
		return nil, connectError(n.address, err)
	}
	n.client = c
	return c, nil
}

// unavailable is an error of errdefs.ErrUnavailable, too.
type unavailable struct{ error }

func (u unavailable) Unwrap() []error { return []error{u.error, errdefs.ErrUnavailable} }

func connectError(address string, err error) error {
	format := "connect to containerd at %s: %w"
	switch {
	case errors.Is(err, fs.ErrNotExist):
		format = "no containerd at %s: start it, or name its socket with --address: %w"
	case errors.Is(err, unix.ECONNREFUSED):
		format = "containerd does not answer at %s: is it running? %w"
	case errors.Is(err, fs.ErrPermission):
		format = "no permission to talk to containerd at %s: run as root: %w"
	}
	return unavailable{fmt.Errorf(format, address, err)}
}

// namespaceOf is containerd's namespace in a context, or empty.
func namespaceOf(ctx context.Context) string {
	namespace, _ := namespaces.Namespace(ctx)
	return namespace
}

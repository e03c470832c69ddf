package shim

import (
	"context"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	eventsapi "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"
)

// makeLog makes the log's FIFO and reads it as containerd does.
func makeLog(t *testing.T, path string) {
	t.Helper()
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	go io.Copy(io.Discard, f)
	t.Cleanup(func() { f.Close() })
}

func dial(t *testing.T, address string) *ttrpc.Client {
	t.Helper()
	path, ok := strings.CutPrefix(address, "unix://")
	if !ok {
		t.Fatalf("address %q", address)
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	c := ttrpc.NewClient(conn)
	t.Cleanup(func() { c.Close() })
	return c
}

// eventLog is containerd's side: a ttrpc server that can be stopped.
type eventLog struct {
	t    *testing.T
	path string

	mu      sync.Mutex
	events  []*types.Envelope
	refuse  error         // the answer, if not nil
	refused int           // how often that was given
	hold    chan struct{} // if not nil, wait for it before the answer
	server  *ttrpc.Server
	served  chan struct{}
}

func (e *eventLog) Forward(ctx context.Context, r *eventsapi.ForwardRequest) (*emptypb.Empty, error) {
	e.mu.Lock()
	hold := e.hold
	e.mu.Unlock()
	if hold != nil {
		<-hold
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.refuse != nil {
		e.refused++
		return nil, e.refuse
	}
	e.events = append(e.events, r.Envelope)
	return &emptypb.Empty{}, nil
}

func (e *eventLog) start() {
	e.t.Helper()
	os.Remove(e.path)
	l, err := net.Listen("unix", e.path)
	if err != nil {
		e.t.Fatal(err)
	}
	srv, err := ttrpc.NewServer()
	if err != nil {
		e.t.Fatal(err)
	}
	eventsapi.RegisterTTRPCEventsService(srv, e)
	served := make(chan struct{})
	e.mu.Lock()
	e.server, e.served = srv, served
	e.mu.Unlock()
	go func() {
		defer close(served)
		srv.Serve(context.Background(), l)
	}()
}

// stop kills the server with its connections.
func (e *eventLog) stop() {
	e.mu.Lock()
	srv, served := e.server, e.served
	e.mu.Unlock()
	srv.Close()
	<-served
}

func (e *eventLog) count() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.events)
}

func (e *eventLog) topics() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	var topics []string
	for _, ev := range e.events {
		topics = append(topics, ev.Topic)
	}
	return topics
}

// patience is how long a test waits, at most, for what takes milliseconds on an idle
// machine.
const patience = time.Minute

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if f() {
			return
		}
	}
	t.Fatalf("timeout: %s", what)
}

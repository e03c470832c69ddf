package shim

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/fifo"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"
)

const (
	// requestTimeout is how long requests may take to finish at shutdown.
	requestTimeout = time.Second
	// drainTimeout is how long events may take to be sent at shutdown.
	drainTimeout = 5 * time.Second
	// trimDelay is how long the shim must be idle to give memory back.
	trimDelay = 5 * time.Second
	gcPercent = 75
	maxProcs  = 2
)

// serve is the shim: it serves until its service or a signal ends it.
func serve(f flags, rt Runtime) error {
	setMemory()
	// What a container's processes leave is the shim's to reap.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become subreaper: %w", err)
	}
	stop := newShutdown()
	handleSignals(stop.request)

	l, err := daemonListener(f.socket)
	if err != nil {
		return err
	}
	// Once: after that the path may be another shim's.
	leave := sync.OnceFunc(func() {
		if err := removeSocket(l); err != nil {
			log.L.WithError(err).Warn("remove the shim's socket")
		}
	})
	defer leave()
	err = serveOn(l, f, rt, stop, leave)
	if err != nil {
		// The standard error leads nowhere: the log is what people see.
		log.L.WithError(err).Error("the shim ends")
	}
	return err
}

// serveOn returns when the shim has nothing left to do but to exit. It calls
// leave before it waits for anything at the end, so that no new requests come.
func serveOn(l net.Listener, f flags, rt Runtime, stop *shutdown, leave func()) error {
	if f.socket == "" {
		if err := passGate(os.NewFile(gateFD, "gate")); err != nil {
			return err
		}
	}
	if err := openLog(f.debug); err != nil {
		return err
	}
	logger := log.L.WithFields(log.Fields{"namespace": f.namespace, "id": f.id, "pid": os.Getpid()})

	events := NewPublisher(os.Getenv("TTRPC_ADDRESS"), f.namespace)
	service, err := rt.NewService(Config{
		Namespace: f.namespace,
		Address:   f.address,
		Publish:   events.Publish,
		Shutdown:  stop.request,
	})
	if err != nil {
		return fmt.Errorf("make the task service: %w", err)
	}
	requests := &requests{trim: newTrimmer()}
	server, err := ttrpc.NewServer(
		ttrpc.WithServerHandshaker(ttrpc.UnixSocketRequireSameUser()),
		ttrpc.WithUnaryServerInterceptor(requests.intercept),
	)
	if err != nil {
		return fmt.Errorf("make the ttrpc server: %w", err)
	}
	service.Register(server)

	served := make(chan error, 1)
	// A request's context ends with its connection. Nothing else of the shim
	// does: containerd comes back.
	go func() { served <- server.Serve(context.Background(), l) }()
	logger.Debug("the shim serves")

	var failed error
	select {
	case <-stop.requested:
	case err := <-served:
		failed = fmt.Errorf("accept connections: %w", err)
	}
	logger.Debug("the shim shuts down")
	leave()
	requests.wait(requestTimeout)
	service.Close()
	ctx, cancel := context.WithTimeout(context.Background(), drainTimeout)
	defer cancel()
	if err := events.Drain(ctx); err != nil {
		logger.WithError(err).Error("events are lost")
	}
	return failed
}

// daemonListener is the inherited listener, or one at path if that is set.
func daemonListener(path string) (net.Listener, error) {
	if path != "" {
		return listen(path)
	}
	f := os.NewFile(listenerFD, "socket")
	// FileListener has a copy. This one would be inherited by every container.
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("take over the listener, descriptor %d (containerd calls the action start; "+
			"to serve by hand give -socket): %w", listenerFD, err)
	}
	return l, nil
}

// passGate waits until the starter lets this daemon go.
func passGate(gate *os.File) error {
	defer gate.Close()
	var b [1]byte
	if _, err := gate.Read(b[:]); err != nil {
		return fmt.Errorf("the process that started this shim died: %w", err)
	}
	return nil
}

// removeSocket ends the listener and frees its path, both within the lock: a
// starter finds either a shim that answers, or no socket.
func removeSocket(l net.Listener) error {
	path := l.Addr().String()
	lock, err := lockGroup(path)
	if err != nil {
		return errors.Join(err, l.Close())
	}
	defer lock.unlock()
	return errors.Join(os.Remove(path), l.Close())
}

// openLog leads the log, and what the Go runtime prints when it crashes, to
// the FIFO that containerd made in the bundle.
func openLog(debug bool) error {
	if debug {
		_ = log.SetLevel(log.DebugLevel.String())
	}
	_ = log.SetFormat(log.TextFormat)
	// It blocks while containerd is down, which would not call the shim then.
	f, err := fifo.OpenFifoDup2(context.Background(), "log", unix.O_WRONLY, 0, int(os.Stderr.Fd()))
	if err != nil {
		return fmt.Errorf("open the log: %w", err)
	}
	log.L.Logger.SetOutput(f)
	return nil
}

// handleSignals sets what signals do to the shim. SIGCHLD is the reaper's.
func handleSignals(shutdown func()) {
	ch := make(chan os.Signal, 4)
	// SIGPIPE comes when containerd, who reads the log, is down. It is caught
	// and not ignored: the containers would inherit that it is ignored.
	signal.Notify(ch, unix.SIGTERM, unix.SIGINT, unix.SIGUSR1, unix.SIGPIPE)
	go func() {
		for s := range ch {
			switch s {
			case unix.SIGTERM, unix.SIGINT:
				log.L.WithField("signal", s.String()).Info("the shim is told to end")
				shutdown()
			case unix.SIGUSR1:
				log.L.Infof("=== BEGIN goroutine stack dump ===\n%s\n=== END goroutine stack dump ===", stacks())
			}
		}
	}()
}

func stacks() []byte {
	for size := 16 << 10; ; size *= 2 {
		buf := make([]byte, size)
		if n := runtime.Stack(buf, true); n < size {
			return buf[:n]
		}
	}
}

// setMemory trades time for memory: there is a shim for every pod, and it is
// idle most of the time. The heap of one that is left alone stays below the
// size at which the collector first runs, which is 4 MB times the percentage.
func setMemory() {
	debug.SetGCPercent(gcPercent)
	runtime.GOMAXPROCS(maxProcs)
}

// trimmer gives memory back when the shim falls idle.
type trimmer struct {
	timer *time.Timer
}

func newTrimmer() *trimmer { return &trimmer{timer: time.AfterFunc(trimDelay, trim)} }

// used tells that the shim is not idle.
func (t *trimmer) used() { t.timer.Reset(trimDelay) }

func trim() {
	var stats debug.GCStats
	debug.ReadGCStats(&stats)
	// The first two collections cost 1 MB for good, in the runtime's tables of
	// free memory: more than they free of a heap that never filled. Not even
	// runtime.ReadMemStats comes for less than half of that.
	if stats.NumGC > 0 {
		debug.FreeOSMemory()
	}
}

// shutdown is a request to end, made once or more.
type shutdown struct {
	once      sync.Once
	requested chan struct{}
}

func newShutdown() *shutdown { return &shutdown{requested: make(chan struct{})} }

func (s *shutdown) request() { s.once.Do(func() { close(s.requested) }) }

// requests counts the requests under way.
type requests struct {
	active atomic.Int64
	trim   *trimmer
}

func (r *requests) intercept(ctx context.Context, unmarshal ttrpc.Unmarshaler, _ *ttrpc.UnaryServerInfo, method ttrpc.Method) (any, error) {
	r.active.Add(1)
	defer func() {
		r.active.Add(-1)
		r.trim.used()
	}()
	return method(ctx, unmarshal)
}

// wait waits until no request is under way, but not longer than timeout. It
// polls, so that the answer to the last request, which may be the one to shut
// down, has some time to be written after the handler returned.
func (r *requests) wait(timeout time.Duration) {
	const interval = 10 * time.Millisecond
	for end := time.Now().Add(timeout); time.Now().Before(end); {
		time.Sleep(interval)
		if r.active.Load() == 0 {
			return
		}
	}
}

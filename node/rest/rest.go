// Package rest serves a node's containers and checkpoints by HTTP.
//
// It has the paths and the fields of containerd's first interface (bundles.go), and an
// interface of its own (v1.go). The file docs/rest-api.md describes all requests.
package rest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	"github.com/containerd/containerd/v2/pkg/identifiers"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/node"
)

// Options are those of New.
type Options struct {
	Node *node.Node
	// Namespace is that of containerd in which the containers are that were started
	// from bundles.
	Namespace string
	// Address is the socket of the Node's containerd. A request may name no other.
	Address string
	// State is the folder for the records of jobs.
	State string
	// AllowPaths are the folders below which requests may name files.
	AllowPaths []string
	// Clients may use TLS listeners.
	Clients []Client
	// Log is told each call that changes something, and what goes wrong.
	Log *slog.Logger
}

// Server answers requests, and watches the containers that it has started. It has the
// state folder to itself until Close.
type Server struct {
	http.Handler
	s    *server
	lock *os.File
}

// Close lets another Server have the state folder.
func (s *Server) Close() error { return s.lock.Close() }

// lockState locks the state folder for a Server.
func lockState(state string) (*os.File, error) {
	if err := os.MkdirAll(state, 0o700); err != nil {
		return nil, fmt.Errorf("make the state folder: %w", err)
	}
	lock, err := os.OpenFile(filepath.Join(state, "stasisd.lock"), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock the state folder: %w", err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = errors.New("another stasisd uses it")
		}
		return nil, fmt.Errorf("lock the state folder %s: %w", state, err)
	}
	return lock, nil
}

type server struct {
	o       Options
	paths   paths
	events  *events
	metrics *metrics
	jobs    *jobs
	slots   chan struct{} // one for each request at work
	streams chan struct{} // the same for streams
}

// GraceTime is how long what is at work may take when a Server is to end.
const GraceTime = 30 * time.Second

const (
	// maxBody bounds the body of a request, in bytes.
	maxBody = 1 << 20
	// maxRequests and maxStreams bound how many requests are at work at a time.
	maxRequests = 256
	maxStreams  = 256
)

// New returns a Server. Serve its Handler by a server with ConnContext, and call Run.
func New(o Options) (*Server, error) {
	if err := identifiers.Validate(o.Namespace); err != nil {
		return nil, fmt.Errorf("namespace: %w", err)
	}
	names := map[string]bool{}
	for i, c := range o.Clients {
		if err := c.check(); err != nil {
			return nil, fmt.Errorf("client %d (%s): %w", i+1, c.Name, err)
		}
		if names[c.Name] {
			return nil, fmt.Errorf("client %d: there are two of the name %s", i+1, c.Name)
		}
		names[c.Name] = true
	}
	s := &server{o: o, paths: o.AllowPaths, events: newEvents(), metrics: newMetrics(o), slots: make(chan struct{}, maxRequests), streams: make(chan struct{}, maxStreams)}
	lock, err := lockState(o.State)
	if err != nil {
		return nil, err
	}
	if s.jobs, err = newJobs(filepath.Join(o.State, jobsFolder), o.Log, s.metrics.observe); err != nil {
		lock.Close()
		return nil, err
	}
	mux := http.NewServeMux()
	s.bundleRoutes(mux)
	s.namedRoutes(mux)
	s.v1(mux)
	scrape := promhttp.HandlerFor(s.metrics.registry, promhttp.HandlerOpts{})
	// They are of all namespaces.
	mux.Handle("GET /metrics", s.route(route{scope: ScopeRead, everywhere: true}, func(w http.ResponseWriter, r *http.Request) error {
		scrape.ServeHTTP(w, r)
		return nil
	}))
	return &Server{Handler: http.NewCrossOriginProtection().Handler(mux), s: s, lock: lock}, nil
}

// Run ends what a crash has left half done, and then watches the containers until ctx
// ends. ready is called when requests may be served. It does not return for a containerd
// that goes away and comes back.
func (s *Server) Run(ctx context.Context, ready func()) error {
	ctx = namespaces.WithNamespace(ctx, s.s.o.Namespace)
	if err := s.s.o.Node.Recover(ctx); err != nil {
		if errdefs.IsUnavailable(err) {
			return err
		}
		s.s.o.Log.Error("recover: " + err.Error())
	}
	defer func() {
		s.s.events.close()
		s.s.jobs.end(GraceTime)
	}()
	for pause := time.Duration(0); ; pause = time.Second {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
		err := s.s.o.Node.WatchBundles(ctx, func() {
			if ready != nil {
				ready()
				ready = nil
			}
		}, s.s.events.tell)
		if ctx.Err() != nil {
			return nil
		}
		if ready != nil {
			return err
		}
		s.s.o.Log.Warn("watch containers, again in a second: " + err.Error())
	}
}

// route is what a request needs, and how its errors look.
type route struct {
	scope Scope
	// namespace is containerd's, of what the request is about; nil: none.
	namespace func(*http.Request) string
	// everywhere: what the request is about is in all of them.
	everywhere bool
	// mutates: the call changes something, and is logged.
	mutates bool
	before  func(*http.Request) error                          // nil: nothing is looked at before
	fail    func(w http.ResponseWriter, status int, err error) // nil: failPlain
	status  func(error) int                                    // nil: statusOf
	// stream: the answer, or the body, goes on for as long as the client likes.
	stream bool
}

// route returns the handler of a request.
func (s *server) route(t route, serve func(http.ResponseWriter, *http.Request) error) http.Handler {
	if t.fail == nil {
		t.fail = failPlain
	}
	if t.status == nil {
		t.status = statusOf
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		started := time.Now()
		who, err := s.callerOf(r)
		if err != nil {
			w.Header().Set("WWW-Authenticate", `Bearer realm="stasisd"`)
			t.fail(w, http.StatusUnauthorized, err)
			return
		}
		namespace := ""
		if t.namespace != nil {
			namespace = t.namespace(r)
		}
		if namespace != "" {
			if err := identifiers.Validate(namespace); err != nil {
				t.fail(w, http.StatusBadRequest, badRequest{fmt.Errorf("namespace: %w", err)})
				return
			}
		}
		answer := &recorder{ResponseWriter: w}
		defer func() {
			failed := recover()
			if failed != nil && failed != http.ErrAbortHandler { //nolint:errorlint // it is the value itself
				s.o.Log.Error(fmt.Sprintf("%s: %v\n%s", r.Pattern, failed, debug.Stack()))
				if answer.status == 0 {
					t.fail(answer, http.StatusInternalServerError, errors.New("a fault in stasisd, which its log describes"))
				}
			}
			s.metrics.requests.WithLabelValues(r.Pattern, fmt.Sprint(answer.code())).Observe(time.Since(started).Seconds())
			if t.mutates {
				s.o.Log.Info("audit", "who", who.name, "method", r.Method, "path", r.URL.Path, "status", answer.code(), "took", time.Since(started).Round(time.Millisecond).String())
			}
			if failed != nil {
				panic(http.ErrAbortHandler) // what was answered so far is not all
			}
		}()
		if !who.may(t.scope, namespace) {
			t.fail(answer, http.StatusForbidden, fmt.Errorf("%s may not: it needs scope %s%s", who.name, t.scope, inNamespace(namespace)))
			return
		}
		if t.everywhere && !who.everywhere() {
			t.fail(answer, http.StatusForbidden, fmt.Errorf("%s may not: it needs scope %s in all namespaces", who.name, t.scope))
			return
		}
		slots := s.slots
		if t.stream {
			slots = s.streams
		}
		select {
		case slots <- struct{}{}:
			defer func() { <-slots }()
		default:
			w.Header().Set("Retry-After", "1")
			t.fail(answer, http.StatusServiceUnavailable, fmt.Errorf("%d requests of this kind are at work", cap(slots)))
			return
		}
		if !t.stream {
			r.Body = http.MaxBytesReader(answer, r.Body, maxBody)
		}
		ctx := context.WithValue(r.Context(), callerKey{}, who)
		if namespace != "" {
			ctx = namespaces.WithNamespace(ctx, namespace)
		}
		r = r.WithContext(ctx)
		err = nil
		if t.before != nil {
			err = t.before(r)
		}
		if err == nil {
			err = serve(answer, r)
		}
		if err != nil {
			status := t.status(err)
			if status >= http.StatusInternalServerError {
				s.o.Log.Warn(r.Method + " " + r.URL.Path + ": " + err.Error())
			}
			t.fail(answer, status, err)
		}
	})
}

func inNamespace(namespace string) string {
	if namespace == "" {
		return ""
	}
	return " in namespace " + namespace
}

// streamTime bounds how long a client may take for the next part of an answer, or of a
// body that is a stream. A part has some kilobytes.
const streamTime = time.Minute

// recorder notes the status of an answer, and gives the client some time for each part.
type recorder struct {
	http.ResponseWriter
	status int
}

func (r *recorder) WriteHeader(status int) {
	if r.status == 0 {
		r.status = status
	}
	r.hurry()
	r.ResponseWriter.WriteHeader(status)
}

func (r *recorder) Write(p []byte) (int, error) {
	if r.status == 0 {
		r.status = http.StatusOK
	}
	r.hurry()
	return r.ResponseWriter.Write(p)
}

func (r *recorder) hurry() {
	_ = http.NewResponseController(r.ResponseWriter).SetWriteDeadline(time.Now().Add(streamTime)) // not a test's
}

// Unwrap is for http.ResponseController.
func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }

func (r *recorder) code() int {
	if r.status == 0 {
		return http.StatusOK
	}
	return r.status
}

// failPlain answers with an error as text.
func failPlain(w http.ResponseWriter, status int, err error) { http.Error(w, err.Error(), status) }

// statusOf is the status for an error of package node.
func statusOf(err error) int {
	var big *http.MaxBytesError
	switch {
	case errors.As(err, &big):
		return http.StatusRequestEntityTooLarge
	case errdefs.IsNotFound(err):
		return http.StatusNotFound
	case errdefs.IsInvalidArgument(err):
		return http.StatusBadRequest
	case errdefs.IsPermissionDenied(err):
		return http.StatusForbidden
	case errdefs.IsAlreadyExists(err), errdefs.IsFailedPrecondition(err):
		return http.StatusConflict
	case errdefs.IsUnavailable(err):
		return http.StatusServiceUnavailable
	case errdefs.IsNotImplemented(err):
		return http.StatusNotImplemented
	}
	return http.StatusInternalServerError
}

// badRequest is an error in a request's body.
type badRequest struct{ error }

func (badRequest) Is(target error) bool { return target == errdefs.ErrInvalidArgument }

func (b badRequest) Unwrap() error { return b.error }

// decode reads the body of a request, which is one JSON value; with optional, it may be
// empty.
func decode(r *http.Request, v any, optional bool) error {
	data, err := io.ReadAll(r.Body)
	if err != nil {
		return badRequest{fmt.Errorf("read the body: %w", err)}
	}
	if len(data) == 0 && optional {
		return nil
	}
	if err := json.Unmarshal(data, v); err != nil {
		return badRequest{fmt.Errorf("the body is not the JSON that is wanted: %w", err)}
	}
	return nil
}

// answerJSON answers with a value.
func answerJSON(w http.ResponseWriter, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(append(data, '\n')) // a client that has gone away needs no answer
	return nil
}

package v1

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// serve has handler answer, and returns a client.
func serve(t *testing.T, handler http.HandlerFunc) *Client {
	t.Helper()
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)
	c, err := New(server.URL, Options{Namespace: "ns", Token: "secret"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// TestNew: nothing is sent where others can read it, and no part of a URL is overlooked.
func TestNew(t *testing.T) {
	dir := t.TempDir()
	empty := filepath.Join(dir, "empty.pem")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		url  string
		o    Options
		want string // in the error; empty: there is none
	}{
		{"unix:///run/stasis/stasisd.sock", Options{}, ""},
		{"https://node:8443", Options{}, ""},
		{"https://node:8443/", Options{}, ""},
		{"http://127.0.0.1:80", Options{}, ""},
		{"http://[::1]:80", Options{}, ""},
		{"http://localhost:80", Options{}, ""},
		{"http://node:80", Options{Token: "x"}, "without TLS"},
		{"http://localhost.example.com", Options{}, "without TLS"},
		{"node:8443", Options{}, "https://HOST:PORT"},
		{"unix://run/x.sock", Options{}, "https://HOST:PORT"},
		{"ssh://node", Options{}, "https://HOST:PORT"},
		{"", Options{}, "https://HOST:PORT"},
		{"https://node/prefix", Options{}, "more than a host"},
		{"https://user:pw@node", Options{}, "more than a host"},
		{"https://node?x=1", Options{}, "more than a host"},
		{"unix:///s?x=1", Options{}, "more than a host"},
		{"unix:///s", Options{CA: empty}, "are for https"},
		{"http://localhost", Options{Cert: empty}, "are for https"},
		{"https://node", Options{CA: filepath.Join(dir, "none")}, "no such file"},
		{"https://node", Options{CA: empty}, "no certificate"},
		{"https://node", Options{Cert: empty}, "needs its key"},
		{"https://node", Options{Cert: empty, Key: empty}, "certificate"},
	} {
		_, err := New(tt.url, tt.o)
		if strings.Contains(fmt.Sprint(err), "pw@") {
			t.Errorf("%q: the error has the password: %v", tt.url, err)
		}
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%q: %v, want %q", tt.url, err, tt.want)
		}
	}
}

// TestCalls: each method makes the request that the server has, in the namespace, with the
// token, and slashes of an image's name are none of the path.
func TestCalls(t *testing.T) {
	ctx := t.Context()
	for _, tt := range []struct {
		name, want string // METHOD PATH?QUERY BODY
		answer     string
		do         func(*Client) error
	}{
		{"containers", "GET /v1/containers?namespace=ns ", `{"items":[]}`, func(c *Client) error { _, err := c.Containers(ctx); return err }},
		{"check", "GET /v1/check?namespace=ns ", `{"items":[]}`, func(c *Client) error { _, err := c.Check(ctx); return err }},
		{"inspect", "GET /v1/checkpoints/a%2Fb:1?namespace=ns ", `{}`, func(c *Client) error { _, err := c.Inspect(ctx, "a/b:1", false); return err }},
		{"secrets", "GET /v1/checkpoints/a?namespace=ns&secrets=true ", `{}`, func(c *Client) error { _, err := c.Inspect(ctx, "a", true); return err }},
		{"diff", "GET /v1/checkpoints/a%2Fb/diff?namespace=ns&with=c%2Fd ", `{}`, func(c *Client) error { _, err := c.Diff(ctx, "a/b", "c/d"); return err }},
		{"remove", "DELETE /v1/checkpoints/a%2F..%2F%3Fb?namespace=ns ", "", func(c *Client) error { return c.Remove(ctx, "a/../?b") }},
		{"checkpoint", `POST /v1/checkpoints?namespace=ns {"containers":["c"]}`, `{}`, func(c *Client) error {
			_, err := c.Checkpoint(ctx, CheckpointBody{Containers: []string{"c"}})
			return err
		}},
		{"restore", `POST /v1/restores?namespace=ns {"checkpoint":"a"}`, `{}`, func(c *Client) error { _, err := c.Restore(ctx, RestoreBody{Checkpoint: "a"}); return err }},
		{"push", `POST /v1/checkpoints/a%2Fb/push?namespace=ns {}`, `{}`, func(c *Client) error { _, err := c.Push(ctx, "a/b", PushBody{}); return err }},
		{"pull", `POST /v1/pulls?namespace=ns {"ref":"a"}`, `{}`, func(c *Client) error { _, err := c.Pull(ctx, PullBody{Ref: "a"}); return err }},
		{"verify", `POST /v1/checkpoints/a/verify?namespace=ns `, `{}`, func(c *Client) error { _, err := c.Verify(ctx, "a"); return err }},
		{"jobs", `GET /v1/jobs?namespace=ns `, `{"items":[]}`, func(c *Client) error { _, err := c.Jobs(ctx); return err }},
		{"job", `GET /v1/jobs/..%2Fx?namespace=ns `, `{}`, func(c *Client) error { _, err := c.Job(ctx, "../x"); return err }},
		{"cancel", `POST /v1/jobs/x/cancel?namespace=ns `, `{}`, func(c *Client) error { _, err := c.Cancel(ctx, "x"); return err }},
		{"export", `GET /v1/checkpoints/a/export?compression=none&format=oci&namespace=ns `, `file`, func(c *Client) error {
			var out bytes.Buffer
			err := c.Export(ctx, "a", "oci", "none", &out)
			if out.String() != "file" {
				err = fmt.Errorf("%q, %w", out.String(), err)
			}
			return err
		}},
		{"import", `POST /v1/imports?namespace=ns&ref=a file`, `{"items":[{"ref":"a"}]}`, func(c *Client) error {
			list, err := c.Import(ctx, "a", strings.NewReader("file"))
			if err == nil && list.Items[0].Ref != "a" {
				err = fmt.Errorf("%+v", list)
			}
			return err
		}},
	} {
		got := ""
		c := serve(t, func(w http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body)
			got = r.Method + " " + r.URL.EscapedPath() + "?" + r.URL.RawQuery + " " + string(body)
			if r.Header.Get("Authorization") != "Bearer secret" {
				t.Errorf("%s: no token", tt.name)
			}
			fmt.Fprint(w, tt.answer)
		})
		if err := tt.do(c); err != nil || got != tt.want {
			t.Errorf("%s: %s, %v, want %s", tt.name, got, err, tt.want)
		}
	}
}

// TestErrors: what the node says is told, and of what class it is; what is no answer of
// stasisd's is an error, too.
func TestErrors(t *testing.T) {
	problem := func(status int, kind string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", problemContent)
			w.WriteHeader(status)
			_ = json.NewEncoder(w).Encode(Problem{Type: ProblemType(kind), Status: status, Detail: "that is " + kind,
				Errors: []FieldError{{"too long", "body.ref"}}})
		}
	}
	for _, tt := range []struct {
		name   string
		answer http.HandlerFunc
		class  error
		text   string
		wrong  bool
	}{
		{"not found", problem(404, "not-found"), errdefs.ErrNotFound, "that is not-found; body.ref: too long", false},
		{"forbidden", problem(403, "forbidden"), errdefs.ErrPermissionDenied, "that is", false},
		{"unauthorized", problem(401, "unauthorized"), errdefs.ErrUnauthenticated, "that is", false},
		{"exists", problem(409, "already-exists"), errdefs.ErrAlreadyExists, "that is", false},
		{"precondition", problem(409, "failed-precondition"), errdefs.ErrFailedPrecondition, "that is", false},
		{"unavailable", problem(503, "service-unavailable"), errdefs.ErrUnavailable, "that is", false},
		{"wrong request", problem(400, "wrong-request"), errdefs.ErrInvalidArgument, "that is", true},
		{"wrong field", problem(422, "unprocessable-entity"), errdefs.ErrInvalidArgument, "that is", true},
		{"bad", problem(400, "bad-request"), errdefs.ErrInvalidArgument, "that is", false},
		{"another server", func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "<html>", http.StatusBadGateway) }, nil, "GET /v1/containers of stasisd at", false},
		{"redirect", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "http://other/", http.StatusFound) }, nil, "302", false},
		{"no JSON", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "{") }, nil, "not what stasisd would answer", false},
		{"cut short", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "100")
			fmt.Fprint(w, "{")
		}, nil, "unexpected EOF", false},
	} {
		_, err := serve(t, tt.answer).Containers(t.Context())
		if err == nil || !strings.Contains(err.Error(), tt.text) || tt.class != nil && !errors.Is(err, tt.class) {
			t.Errorf("%s: %v", tt.name, err)
		}
		if strings.Contains(fmt.Sprint(err), "secret") {
			t.Errorf("%s: the token is in the error: %v", tt.name, err)
		}
		p := (*Problem)(nil)
		if errors.As(err, &p) && p.WrongRequest() != tt.wrong {
			t.Errorf("%s: wrong request %v", tt.name, p.WrongRequest())
		}
	}
}

// TestPages: all pages are read, and a server that never ends is given up.
func TestPages(t *testing.T) {
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("container") != "c" {
			t.Errorf("query %s", r.URL.RawQuery)
		}
		switch r.URL.Query().Get("after") {
		case "":
			fmt.Fprint(w, `{"items":[{"ref":"a"},{"ref":"b"}],"next":"b"}`)
		case "b":
			fmt.Fprint(w, `{"items":[{"ref":"c"}]}`)
		}
	})
	all, err := c.Checkpoints(t.Context(), ListQuery{Container: "c"})
	if err != nil || len(all) != 3 || all[2].Ref != "c" {
		t.Errorf("%+v, %v", all, err)
	}
	c = serve(t, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `{"items":[{"ref":"b"}],"next":"b"}`) })
	if _, err := c.Checkpoints(t.Context(), ListQuery{}); err == nil {
		t.Error("pages without end are no error")
	}
}

// TestExportCut: a file that is not whole is an error.
func TestExportCut(t *testing.T) {
	c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, "half")
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	})
	if err := c.Export(t.Context(), "a", "", "", io.Discard); err == nil {
		t.Error("it is taken for whole")
	}
}

// event is a job as a server-sent event.
func event(state State, stage string) string {
	data, _ := json.Marshal(Job{ID: "x", State: state, Progress: &Progress{Stage: stage}})
	return "event: job\ndata: " + string(data) + "\n\n"
}

// TestWait: a job is waited for over connections that break; progress is told in order.
func TestWait(t *testing.T) {
	t.Parallel()
	var calls atomic.Int32
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/v1/jobs/x/events" {
			t.Errorf("path %s", r.URL.Path)
		}
		switch calls.Add(1) {
		case 1:
			fmt.Fprint(w, event(StateQueued, ""), event(StateRunning, "dump"))
		case 2:
			http.Error(w, "", http.StatusBadGateway)
		case 3:
			panic(http.ErrAbortHandler)
		default:
			fmt.Fprint(w, event(StateRunning, "store"), event(StateDone, ""))
		}
	})
	var stages []string
	job, err := c.Wait(t.Context(), "x", func(j Job) { stages = append(stages, j.Progress.Stage) })
	if err != nil || job.State != StateDone || strings.Join(stages, " ") != " dump store " {
		t.Errorf("%+v, %q, %v", job, stages, err)
	}

	c = serve(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", problemContent)
		w.WriteHeader(404)
		fmt.Fprint(w, `{"type":"urn:stasis:problem:not-found","status":404,"detail":"no job"}`)
	})
	if _, err := c.Wait(t.Context(), "x", nil); !errdefs.IsNotFound(err) {
		t.Errorf("a job that is not there: %v", err)
	}

	ctx, cancel := context.WithCancelCause(t.Context())
	stop := errors.New("stop")
	c = serve(t, func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, event(StateRunning, "dump"))
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})
	job, err = c.Wait(ctx, "x", func(Job) { cancel(stop) })
	if !errors.Is(err, stop) || job == nil || job.State != StateRunning {
		t.Errorf("given up: %+v, %v", job, err)
	}
}

// TestFollow: events are told until the stream ends, which is an error.
func TestFollow(t *testing.T) {
	c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, "event: event\ndata: {\"type\":\"watching\"}\n\n: nothing\n\nevent: event\ndata: {\"type\":\"exit\",\ndata: \"status\":137}\n\n")
	})
	var got []string
	err := c.Follow(t.Context(), func(e Event) { got = append(got, fmt.Sprint(e.Type, e.Status)) })
	if !errors.Is(err, io.ErrUnexpectedEOF) || strings.Join(got, " ") != "watching0 exit137" {
		t.Errorf("%q, %v", got, err)
	}
	c = serve(t, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "data: {\n\n") })
	if err := c.Follow(t.Context(), func(Event) {}); err == nil {
		t.Error("what is no JSON is no error")
	}
}

// TestSocket: a Unix socket is spoken to.
func TestSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, `{"items":[{"id":"c"}]}`)
	})}
	go server.Serve(l) //nolint:errcheck // it ends by Close
	t.Cleanup(func() { server.Close() })
	c, err := New("unix://"+path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if all, err := c.Containers(t.Context()); err != nil || len(all) != 1 {
		t.Errorf("%+v, %v", all, err)
	}
}

package rest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"

	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/node"
	"github.com/stasis-run/stasis/node/rest/v1"
)

var update = flag.Bool("update", false, "write docs/openapi.json")

// onSocket serves s on a Unix socket, and returns a client of it.
func onSocket(t *testing.T, s http.Handler) *http.Client {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s.sock")
	l, err := Listen("unix://"+socket, ListenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	serveOn(t, s, l)
	transport := &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return net.Dial("unix", socket) }}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

func call(t *testing.T, c *http.Client, method, path, body string) (*http.Response, string) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, "http://node"+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if body != "" {
		r.Header.Set("Content-Type", "application/json")
	}
	answer, err := c.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	data, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer, string(data)
}

// TestOpenAPI: docs/openapi.json is what is served. `go test ./node/rest -update` writes it.
func TestOpenAPI(t *testing.T) {
	s, _ := newTestServer(t)
	answer, body := call(t, onSocket(t, s), "GET", "/openapi.json", "")
	if answer.StatusCode != 200 {
		t.Fatalf("%d %s", answer.StatusCode, body)
	}
	var got bytes.Buffer
	if err := json.Indent(&got, []byte(body), "", "  "); err != nil {
		t.Fatal(err)
	}
	got.WriteByte('\n')
	const file = "../../docs/openapi.json"
	if *update {
		if err := os.WriteFile(file, got.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil || !bytes.Equal(got.Bytes(), want) {
		t.Errorf("%s is not what is served (%v): go test ./node/rest -run TestOpenAPI -update", file, err)
	}
}

// operations are those of docs/openapi.json.
func operations(t *testing.T) (all []struct{ Method, Path, Scope string }) {
	t.Helper()
	data, err := os.ReadFile("../../docs/openapi.json")
	if err != nil {
		t.Fatal(err)
	}
	var doc struct {
		Paths map[string]map[string]struct {
			Scope string `json:"x-scope"`
		}
	}
	if err := json.Unmarshal(data, &doc); err != nil {
		t.Fatal(err)
	}
	for path, methods := range doc.Paths {
		for method, op := range methods {
			all = append(all, struct{ Method, Path, Scope string }{strings.ToUpper(method), path, op.Scope})
		}
	}
	if len(all) < 10 {
		t.Fatalf("%d operations", len(all))
	}
	return all
}

// TestScopes: each request wants the scope that the document says, in the namespace that
// it names, and says no as a problem.
func TestScopes(t *testing.T) {
	s, _ := newTestServer(t)
	inAll := []string{"*"}
	for _, op := range operations(t) {
		path := strings.NewReplacer("{ref}", "x", "{id}", "x").Replace(op.Path)
		for _, tt := range []struct {
			who     *caller
			query   string
			allowed bool
		}{
			{&caller{name: "root", all: true}, "", true},
			{&caller{name: "right", client: &Client{Scopes: []Scope{Scope(op.Scope)}, Namespaces: []string{"default"}}}, "", true},
			{&caller{name: "right", client: &Client{Scopes: []Scope{Scope(op.Scope)}, Namespaces: []string{"k8s.io"}}}, "?namespace=k8s.io", true},
			{&caller{name: "admin", client: &Client{Scopes: []Scope{ScopeAdmin}, Namespaces: inAll}}, "?namespace=k8s.io", true},
			{&caller{name: "other", client: &Client{Scopes: slices.DeleteFunc([]Scope{ScopeRead, ScopeCheckpoint, ScopeRestore, ScopeExec}, func(s Scope) bool { return s == Scope(op.Scope) }), Namespaces: inAll}}, "", false},
			{&caller{name: "elsewhere", client: &Client{Scopes: []Scope{ScopeAdmin}, Namespaces: []string{"other"}}}, "", false},
			{&caller{name: "elsewhere", client: &Client{Scopes: []Scope{ScopeAdmin}, Namespaces: []string{"default"}}}, "?namespace=k8s.io", false},
			{&caller{name: "elsewhere", client: &Client{Scopes: []Scope{ScopeAdmin}, Namespaces: []string{"default"}}}, "?namespace=k8s.io&namespace=default", false},
		} {
			ctx, cancel := context.WithTimeout(context.WithValue(t.Context(), connKey{}, tt.who), time.Minute)
			r, err := http.NewRequestWithContext(ctx, op.Method, "http://node"+path+tt.query, strings.NewReader(`{}`))
			if err != nil {
				t.Fatal(err)
			}
			if !tt.who.all {
				// As a token would.
				s.s.o.Clients = []Client{{Name: tt.who.name, Token: HashToken("t"), Scopes: tt.who.client.Scopes, Namespaces: tt.who.client.Namespaces}}
				r.Header.Set("Authorization", "Bearer t")
			}
			w := newAnswer()
			s.ServeHTTP(w, r)
			cancel()
			if (w.status != 403) != tt.allowed {
				t.Errorf("%s %s%s by %s: %d %s", op.Method, op.Path, tt.query, tt.who.name, w.status, w.body.String())
			}
			if !tt.allowed && (w.header.Get("Content-Type") != "application/problem+json" || !strings.Contains(w.body.String(), "urn:stasis:problem:forbidden")) {
				t.Errorf("%s %s: %v %s", op.Method, op.Path, w.header, w.body.String())
			}
		}
	}
}

// TestAdminOnly: what gives more than a scope says needs scope admin, and a job is
// canceled by those who could begin it.
func TestAdminOnly(t *testing.T) {
	s, _ := newTestServer(t)
	restore := Client{Name: "r", Token: HashToken("r"), Scopes: []Scope{ScopeRead, ScopeRestore}, Namespaces: []string{"*"}}
	save := Client{Name: "s", Token: HashToken("s"), Scopes: []Scope{ScopeRead, ScopeCheckpoint}, Namespaces: []string{"*"}}
	s.s.o.Clients = []Client{restore, save}
	do := func(token, method, path, body string) *answer {
		t.Helper()
		r, err := http.NewRequestWithContext(context.WithValue(t.Context(), connKey{}, &caller{}), method, "http://node"+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Authorization", "Bearer "+token)
		w := newAnswer()
		s.ServeHTTP(w, r)
		return w
	}
	for _, tt := range []struct{ token, path, body string }{
		{"r", "/v1/restores", `{"checkpoint":"x","privileged":true}`},
		{"r", "/v1/restores", `{"checkpoint":"x","network":"host"}`},
		{"r", "/v1/restores", `{"checkpoint":"x","network":"join=other"}`},
		{"r", "/v1/restores", `{"checkpoint":"x","grants":{"mounts":["/srv"]}}`},
		{"r", "/v1/restores", `{"checkpoint":"x","plain_http":true}`},
		{"r", "/v1/pulls", `{"ref":"x","plain_http":true}`},
		{"s", "/v1/checkpoints", `{"containers":["c"],"ref":"x","push":true,"plain_http":true}`},
		{"s", "/v1/checkpoints/x/push", `{"plain_http":true}`},
	} {
		if w := do(tt.token, "POST", tt.path, tt.body); w.status != 403 || !strings.Contains(w.body.String(), "scope admin") {
			t.Errorf("%s %s: %d %s", tt.path, tt.body, w.status, w.body.String())
		}
	}
	ctx := context.WithValue(namespaces.WithNamespace(t.Context(), "default"), callerKey{}, &caller{name: "me", all: true})
	job, err := s.s.jobs.start(ctx, "restore", "x", func(ctx context.Context, _ node.Progress) (any, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	})
	if err != nil {
		t.Fatal(err)
	}
	if w := do("s", "POST", "/v1/jobs/"+job.ID+"/cancel", ""); w.status != 403 {
		t.Errorf("cancel by who could not begin it: %d %s", w.status, w.body.String())
	}
	if w := do("r", "POST", "/v1/restores", `{"checkpoint":"x","wait_healthy":"true"}`); w.status != 403 || !strings.Contains(w.body.String(), "scope exec") {
		t.Errorf("a command in the container without scope exec: %d %s", w.status, w.body.String())
	}
	if w := do("r", "GET", "/v1/checkpoints/x?secrets=true", ""); w.status != 403 || !strings.Contains(w.body.String(), "scope checkpoint") {
		t.Errorf("secrets without scope checkpoint: %d %s", w.status, w.body.String())
	}
	if w := do("r", "POST", "/v1/jobs/"+job.ID+"/cancel", ""); w.status != 202 {
		t.Errorf("cancel: %d %s", w.status, w.body.String())
	}
}

// answer is an http.ResponseWriter.
type answer struct {
	header http.Header
	status int
	body   bytes.Buffer
}

func newAnswer() *answer { return &answer{header: http.Header{}} }

func (a *answer) Header() http.Header         { return a.header }
func (a *answer) Write(p []byte) (int, error) { a.WriteHeader(200); return a.body.Write(p) }
func (a *answer) Flush()                      {}
func (a *answer) WriteHeader(status int) {
	if a.status == 0 {
		a.status = status
	}
}

// TestProblems: what is wrong is said as a problem with a type.
func TestProblems(t *testing.T) {
	s, _ := newTestServer(t)
	c := onSocket(t, s)
	for _, tt := range []struct {
		method, path, body string
		status             int
		kind, detail       string
	}{
		{"GET", "/v1/containers", "", 503, "service-unavailable", "no containerd"},
		{"GET", "/v1/checkpoints", "", 503, "service-unavailable", "no containerd"},
		{"GET", "/v1/checkpoints?limit=0", "", 422, "unprocessable-entity", ""},
		{"GET", "/v1/checkpoints?format=tar", "", 422, "unprocessable-entity", ""},
		{"GET", "/v1/jobs/none", "", 404, "not-found", "no job"},
		{"POST", "/v1/jobs/none/cancel", "", 404, "not-found", "no job"},
		{"POST", "/v1/checkpoints", `{}`, 400, "wrong-request", "no container"},
		{"POST", "/v1/checkpoints", `{"containers":["c"],"link_remap":true}`, 400, "wrong-request", "exit"},
		{"POST", "/v1/checkpoints", `{"containers":["c"],"tcp":"drop"}`, 422, "unprocessable-entity", ""},
		{"POST", "/v1/checkpoints", `{"containers":["c"],"unknown":1}`, 422, "unprocessable-entity", ""},
		{"POST", "/v1/checkpoints", `{`, 400, "bad-request", ""},
		{"POST", "/v1/checkpoints", `{"containers":["` + strings.Repeat("x", 1<<20) + `"]}`, 413, "", ""},
		{"POST", "/v1/restores", `{"checkpoint":""}`, 422, "unprocessable-entity", ""},
		{"POST", "/v1/restores", `{"checkpoint":"x","network":"join=/proc/1/ns/net"}`, 422, "unprocessable-entity", ""},
		{"POST", "/v1/restores", `{"checkpoint":"x","wait_seconds":1,"WAIT_SECONDS":1000000}`, 422, "unprocessable-entity", ""},
		{"GET", "/v1/events?namespace=../x", "", 400, "bad-request", "namespace"},
		{"GET", "/v1/checkpoints/x/export?namespace=a%22b", "", 400, "bad-request", "namespace"},
		{"GET", "/v1/checkpoints/%2Fetc%2Fpasswd", "", 503, "service-unavailable", "no containerd"}, // an image, of which containerd is asked
		{"GET", "/v1/none", "", 404, "not-found", "no GET /v1/none"},
		{"POST", "/v1/pulls", `{"ref":"x","login":{"registry":"h","password":"pa55word","passwd":"pa55word"}}`, 422, "unprocessable-entity", ""},
		{"POST", "/v1/pulls", `{"ref":"x","login":{"password":"pa55word"}}`, 422, "unprocessable-entity", ""},
		{"POST", "/v1/pulls", `{"ref":"` + strings.Repeat("x", 600) + `"}`, 422, "unprocessable-entity", ""},
	} {
		answer, body := call(t, c, tt.method, tt.path, tt.body)
		var p v1.Problem
		_ = json.Unmarshal([]byte(body), &p)
		if answer.StatusCode != tt.status || tt.kind != "" && (p.Type != v1.ProblemType(tt.kind) || p.Status != tt.status || p.Title == "") || !strings.Contains(p.Detail, tt.detail) {
			t.Errorf("%s %s %.60s: %d %s; want %d, %s, %q", tt.method, tt.path, tt.body, answer.StatusCode, body, tt.status, tt.kind, tt.detail)
		}
		if strings.Contains(body, "pa55word") {
			t.Errorf("%s %s %.60s: the answer has the password: %s", tt.method, tt.path, tt.body, body)
		}
		if tt.kind != "" && answer.Header.Get("Content-Type") != "application/problem+json" {
			t.Errorf("%s %s: %s", tt.method, tt.path, answer.Header.Get("Content-Type"))
		}
	}
}

func newTestJobs(t *testing.T, dir string) (*jobs, context.Context) {
	t.Helper()
	j, err := newJobs(dir, slog.New(slog.DiscardHandler), func(string, time.Time, error) {})
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.WithValue(namespaces.WithNamespace(t.Context(), "ns"), callerKey{}, &caller{name: "me", all: true})
	return j, ctx
}

// waitJob waits for a job to end.
func waitJob(t *testing.T, j *jobs, id string) v1.Job {
	t.Helper()
	changed, stop, err := j.listen("ns", id)
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	for range changed {
		job, err := j.get("ns", id)
		if err != nil {
			t.Fatal(err)
		}
		if job.State.Ended() {
			return job
		}
	}
	return v1.Job{}
}

func TestJobs(t *testing.T) {
	dir := t.TempDir()
	j, ctx := newTestJobs(t, dir)
	begun := make(chan struct{})
	blocked := func(ctx context.Context, tell node.Progress) (any, error) {
		tell(node.Update{Of: "c", Stage: "dump", Done: 1, Total: 2})
		begun <- struct{}{}
		<-ctx.Done()
		return []string{"half"}, fmt.Errorf("dump: %w", context.Cause(ctx))
	}
	for _, tt := range []struct {
		name  string
		do    func(context.Context, node.Progress) (any, error)
		state v1.State
		kind  string
	}{
		{"done", func(context.Context, node.Progress) (any, error) { return map[string]int{"n": 1}, nil }, v1.StateDone, ""},
		{"failed", func(context.Context, node.Progress) (any, error) { return nil, fault.New(errdefs.ErrNotFound, "no c") }, v1.StateFailed, "not-found"},
		{"panic", func(context.Context, node.Progress) (any, error) { panic("x") }, v1.StateFailed, "internal-server-error"},
		{"canceled", blocked, v1.StateCanceled, "internal-server-error"},
	} {
		started, err := j.start(ctx, "checkpoint", "c", tt.do)
		if err != nil {
			t.Fatal(err)
		}
		if tt.name == "canceled" {
			<-begun
			if job, err := j.get("ns", started.ID); err != nil || job.State != v1.StateRunning || job.Progress == nil || job.Progress.Stage != "dump" {
				t.Errorf("at work: %+v, %v", job, err)
			}
			if _, err := j.cancel("other", started.ID); !errdefs.IsNotFound(err) {
				t.Errorf("cancel from another namespace: %v", err)
			}
			if _, err := j.cancel("ns", started.ID); err != nil {
				t.Fatal(err)
			}
		}
		job := waitJob(t, j, started.ID)
		if job.State != tt.state || job.Who != "me" || job.Ended.IsZero() || job.Progress != nil || (job.Error != nil) != (tt.kind != "") || tt.kind != "" && job.Error.Type != v1.ProblemType(tt.kind) {
			t.Errorf("%s: %+v %+v", tt.name, job, job.Error)
		}
		if _, err := j.cancel("ns", started.ID); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%s: cancel when it has ended: %v", tt.name, err)
		}
	}
	j.work.Wait()
	// A later process knows them.
	again, _ := newTestJobs(t, dir)
	if a, b := j.list("ns"), again.list("ns"); len(a) != 4 || len(b) != 4 || a[0].ID != b[0].ID || b[0].State != v1.StateCanceled || string(b[0].Result) != `["half"]` {
		t.Errorf("%+v, later %+v", a, b)
	}
}

// TestJobsInterrupted: a job that was at work when the process ended says so, whether that
// was killed or had the time to undo the job.
func TestJobsInterrupted(t *testing.T) {
	dir := t.TempDir()
	j, ctx := newTestJobs(t, dir)
	begun := make(chan struct{})
	started, err := j.start(ctx, "checkpoint", "c", func(ctx context.Context, _ node.Progress) (any, error) {
		close(begun)
		<-ctx.Done()
		return nil, context.Cause(ctx)
	})
	if err != nil {
		t.Fatal(err)
	}
	<-begun
	if err := os.WriteFile(filepath.Join(dir, ".stasis-half"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	killed, _ := newTestJobs(t, dir)
	if job, err := killed.get("ns", started.ID); err != nil || job.State != v1.StateInterrupted || job.Error == nil || job.Error.Type != v1.ProblemType("interrupted") {
		t.Errorf("after a kill: %+v, %v", job, err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, ".stasis-*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	j.end(0)
	if job, err := j.get("ns", started.ID); err != nil || job.State != v1.StateInterrupted || !strings.Contains(job.Error.Detail, "undone") {
		t.Errorf("after an end: %+v, %v", job, err)
	}
	if _, err := j.start(ctx, "x", "c", nil); !errdefs.IsUnavailable(err) {
		t.Errorf("a job more: %v", err)
	}
}

// TestJobsBounded: no more than maxJobs are at work, and the oldest records go.
func TestJobsBounded(t *testing.T) {
	dir := t.TempDir()
	j, ctx := newTestJobs(t, dir)
	release := make(chan struct{})
	begun := make(chan struct{}, maxJobs+1)
	for range maxJobs + 1 {
		if _, err := j.start(ctx, "x", "c", func(context.Context, node.Progress) (any, error) {
			begun <- struct{}{}
			<-release
			return nil, nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	for range maxJobs {
		<-begun
	}
	waiting := 0
	for _, job := range j.list("ns") {
		if job.State == v1.StateQueued {
			waiting++
		}
	}
	if waiting != 1 {
		t.Errorf("%d wait, want 1", waiting)
	}
	close(release)
	j.work.Wait()
	j.mu.Lock()
	for i := range maxRecords {
		j.all[fmt.Sprint(i)] = &job{Job: v1.Job{ID: fmt.Sprint(i), Namespace: "ns", State: v1.StateDone, Ended: time.Now().Add(time.Hour)}}
	}
	j.forget()
	j.mu.Unlock()
	if n := len(j.list("ns")); n != maxRecords {
		t.Errorf("%d records, want %d", n, maxRecords)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "*.json")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// TestNamed: the interface that names containers as Kubernetes does refuses what it has to,
// as {"message"}.
func TestNamed(t *testing.T) {
	s, _ := newTestServer(t)
	dir := t.TempDir()
	s.s.paths, s.s.o.Address = paths{dir}, "/run/ours.sock"
	s.s.o.Clients = []Client{
		{Name: "k8s", Token: HashToken("k"), Scopes: []Scope{ScopeRead, ScopeCheckpoint, ScopeRestore}, Namespaces: []string{"k8s.io"}},
		{Name: "saver", Token: HashToken("s"), Scopes: []Scope{ScopeCheckpoint}, Namespaces: []string{"*"}},
	}
	for _, of := range []string{"half/.partial", "whole"} {
		if err := os.MkdirAll(filepath.Join(dir, of), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "whole", "inventory.img"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	data := func(root, path string) string {
		return fmt.Sprintf(`{"checkpoint_data":{"container_name":"c","root":%q,"checkpoint_path":%q}}`, root, path)
	}
	for _, tt := range []struct {
		method, path, body string
		status             int
		part               string
	}{
		{"GET", "/list/default", "", 503, "no containerd"}, // it is let in
		{"GET", "/list/default", `{"root":"/run/containerd/runc/k8s.io"}`, 503, "no containerd"},
		{"GET", "/list/default?root=/run/containerd/runc/k8s.io/", "", 503, "no containerd"},
		{"GET", "/list/default?root=/run/containerd/runc/other", "", 403, "namespace other"},
		{"GET", "/list/default", `{"root":"/run/containerd/runc/other"}`, 403, "namespace other"},
		{"GET", "/list/default?root=/run/runc", "", 400, "root"},
		{"GET", "/list/default?root=/run/containerd/runc/../../x", "", 400, "root"},
		{"GET", "/list/default?root=/run/containerd/runc", "", 400, "root"},
		{"GET", "/list/default", `{`, 400, "JSON"},
		{"POST", "/checkpoint", "", 400, "JSON"},
		{"POST", "/checkpoint", `{}`, 400, "checkpoint_path"},
		{"POST", "/checkpoint", data("", dir+"/new") + " ", 503, "no containerd"},
		{"POST", "/checkpoint", `{"checkpoint_data":{"checkpoint_path":"` + dir + `/new"}}`, 400, "container_name"},
		{"POST", "/checkpoint", data("", ""), 400, "checkpoint_path"},
		{"POST", "/checkpoint", data("", dir+"/new"), 503, "no containerd"},
		{"POST", "/checkpoint", data("/run/containerd/runc/other", dir+"/new"), 403, "namespace other"},
		{"POST", "/checkpoint", data("/run/runc", dir+"/new"), 400, "root"},
		{"POST", "/checkpoint", data("", "/etc/new"), 403, "checkpoint_path"},
		{"POST", "/checkpoint", data("", dir+"/../new"), 403, "checkpoint_path"},
		{"POST", "/checkpoint", data("", "new"), 400, "checkpoint_path"},
		{"POST", "/checkpoint", data("", dir+"/half/x"), 403, "lies in a checkpoint"},
		{"POST", "/checkpoint", data("", dir+"/half/.partial/x"), 403, "lies in a checkpoint"},
		{"POST", "/checkpoint", data("", dir+"/whole/x"), 403, "lies in a checkpoint"},
		{"saver POST", "/checkpoint", data("", dir+"/new"), 503, "no containerd"},
		{"saver POST", "/checkpoint/rootfs", `{"container_name":"c","image_ref":"x:1"}`, 403, "scope restore"},
		{"POST", "/checkpoint/rootfs", `{"container_name":"c"}`, 400, "image_ref"},
		{"POST", "/checkpoint/rootfs", `{"image_ref":"x:1"}`, 400, "container_name"},
		{"POST", "/checkpoint/rootfs", `{"container_name":"c","image_ref":"x:1","address":"/run/other.sock"}`, 403, "address"},
		{"POST", "/checkpoint/rootfs", `{"container_name":"c","image_ref":"x:1","address":"unix:///run/ours.sock"}`, 503, "no containerd"},
		{"POST", "/checkpoint/rootfs", `{"container_name":"c","image_ref":"x:1","root":"/run/containerd/runc/other"}`, 403, "namespace other"},
		{"POST", "/containerd/checkpoint", `{"checkpoint_data":{"container_name":"c"},"rootfs_checkpoint_data":{"image_ref":"x:1"}}`, 400, "checkpoint_path"},
		{"POST", "/containerd/checkpoint", `{"checkpoint_data":{"container_name":"c","checkpoint_path":"` + dir + `/new"},"rootfs_checkpoint_data":{}}`, 400, "image_ref"},
		{"POST", "/containerd/checkpoint", `{"checkpoint_data":{"container_name":"c","checkpoint_path":"` + dir + `/new"},"rootfs_checkpoint_data":{"image_ref":"x:1","container_name":"d"}}`, 400, `"c" in one place, and "d"`},
		{"POST", "/containerd/checkpoint", `{"checkpoint_data":{"container_name":"c","checkpoint_path":"` + dir + `/new"},"rootfs_checkpoint_data":{"image_ref":"x:1"},"root":"/run/containerd/runc/other"}`, 403, "namespace other"},
		{"POST", "/containerd/checkpoint", `{"checkpoint_data":{"container_name":"c","checkpoint_path":"` + dir + `/new"},"rootfs_checkpoint_data":{"image_ref":"x:1","address":"/other"}}`, 403, "address"},
		{"POST", "/containerd/checkpoint", `{"checkpoint_data":{"container_name":"c","checkpoint_path":"` + dir + `/new"},"rootfs_checkpoint_data":{"image_ref":"x:1"}}`, 503, "no containerd"},
	} {
		method, saver := strings.CutPrefix(tt.method, "saver ")
		r, err := http.NewRequestWithContext(context.WithValue(t.Context(), connKey{}, &caller{}), method, "http://node"+tt.path, strings.NewReader(tt.body))
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Authorization", "Bearer "+map[bool]string{true: "s", false: "k"}[saver])
		w := newAnswer()
		s.ServeHTTP(w, r)
		var answer struct{ Message string }
		if err := json.Unmarshal(w.body.Bytes(), &answer); err != nil || w.status != tt.status || !strings.Contains(answer.Message, tt.part) {
			t.Errorf("%s %s %s: %d %s, want %d and %q", tt.method, tt.path, tt.body, w.status, w.body.String(), tt.status, tt.part)
		}
	}
}

// TestJobsQueue: what one client has waiting leaves room for others, and all of it is bounded.
func TestJobsQueue(t *testing.T) {
	j, ctx := newTestJobs(t, t.TempDir())
	release, begun := make(chan struct{}), make(chan struct{}, maxJobs+maxQueued)
	begin := func(who string) error {
		_, err := j.start(context.WithValue(ctx, callerKey{}, &caller{name: who}), "x", "c", func(context.Context, node.Progress) (any, error) {
			begun <- struct{}{}
			<-release
			return nil, nil
		})
		return err
	}
	defer j.work.Wait()
	defer close(release)
	for i := range maxJobs + maxQueued/maxQueuedEach*maxQueuedEach {
		who := fmt.Sprint(max(0, i-maxJobs) / maxQueuedEach)
		if err := begin(who); err != nil {
			t.Fatalf("job %d of %s: %v", i, who, err)
		}
		if i < maxJobs {
			<-begun
		}
		if i == maxJobs+maxQueuedEach-1 {
			if err := begin("0"); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "of 0 are waiting") {
				t.Errorf("one more of a client: %v", err)
			}
		}
	}
	if err := begin("another"); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "1000 jobs are waiting") {
		t.Errorf("one more of another: %v", err)
	}
}

// TestFollow: the events of a job end with its end.
func TestFollow(t *testing.T) {
	s, _ := newTestServer(t)
	c := onSocket(t, s)
	ctx := context.WithValue(namespaces.WithNamespace(t.Context(), "default"), callerKey{}, &caller{name: "me", all: true})
	release := make(chan struct{})
	job, err := s.s.jobs.start(ctx, "x", "c", func(_ context.Context, tell node.Progress) (any, error) {
		tell(node.Update{Of: "c", Stage: "dump"})
		<-release
		return nil, errors.New("it went wrong")
	})
	if err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(time.Millisecond, func() { close(release) })
	_, body := call(t, c, "GET", "/v1/jobs/"+job.ID+"/events", "")
	if !strings.Contains(body, "event: job") || !strings.Contains(body, `"state":"failed"`) || !strings.Contains(body, "it went wrong") {
		t.Errorf("%s", body)
	}
	if answer, body := call(t, c, "GET", "/v1/jobs/none/events", ""); answer.StatusCode != 404 || !strings.Contains(body, "no job") {
		t.Errorf("%d %s", answer.StatusCode, body)
	}
}

// TestDashboard: each metric of Stasis in the dashboard is one that we have.
func TestDashboard(t *testing.T) {
	data, err := os.ReadFile("../../contrib/grafana/stasis.json")
	if err != nil {
		t.Fatal(err)
	}
	docs, err := os.ReadFile("../../docs/rest-api.md")
	if err != nil {
		t.Fatal(err)
	}
	source, err := os.ReadFile("metrics.go")
	if err != nil {
		t.Fatal(err)
	}
	used := regexp.MustCompile(`stasis_[a-z_]+`).FindAllString(string(data), -1)
	for _, name := range used {
		name = strings.TrimSuffix(strings.TrimSuffix(name, "_bucket"), "_count")
		if !strings.Contains(string(source), `"`+name+`"`) || !strings.Contains(string(docs), name) {
			t.Errorf("%s is in the dashboard, and not in metrics.go or not in docs/rest-api.md", name)
		}
	}
	if len(used) < 8 || !json.Valid(data) {
		t.Errorf("metrics in the dashboard: %v", used)
	}
}

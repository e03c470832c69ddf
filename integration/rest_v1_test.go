package integration

import (
	"encoding/json"
	"fmt"
	"net/url"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/client"

	"github.com/stasis-run/stasis/integration/stack"
)

// restJob is a job of /v1.
type restJob struct {
	ID, Kind, State string
	Result          json.RawMessage
	Error           *struct{ Type, Detail string }
}

// runJob makes a request that begins a job, and follows that to its end.
func runJob(t *testing.T, s *stack.Stack, d *stack.Stasisd, path, body string) restJob {
	t.Helper()
	var job restJob
	query := "?namespace=" + s.Namespace
	answer := want(t, d, 202, "POST", path+query, body)
	if err := json.Unmarshal([]byte(answer), &job); err != nil || job.ID == "" {
		t.Fatalf("POST %s: %s: %v", path, answer, err)
	}
	events := want(t, d, 200, "GET", "/v1/jobs/"+job.ID+"/events"+query, "")
	if !strings.Contains(events, "event: job\n") {
		t.Fatalf("events of the job: %s", events)
	}
	answer = want(t, d, 200, "GET", "/v1/jobs/"+job.ID+query, "")
	if err := json.Unmarshal([]byte(answer), &job); err != nil {
		t.Fatal(err)
	}
	return job
}

// TestREST checkpoints and restores by /v1, on containerd: what a job says has become of
// it is what is there.
func TestREST(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	c := s.NewContainer(ctx, "c", stack.Busybox, stack.Args("sh", "-c", "n=0; trap 'n=$((n+1)); echo $n >/count' USR1; echo ready; while :; do sleep 1000 & wait; done"))
	c.Start(ctx)
	c.Stdout.WaitFor(ctx, "ready")
	d := s.StartStasisd()
	query := "?namespace=" + s.Namespace
	get := func(path string) string {
		t.Helper()
		return want(t, d, 200, "GET", path+query, "")
	}

	if list := get("/v1/containers"); !strings.Contains(list, `"id":"c"`) || !strings.Contains(list, `"status":"running"`) {
		t.Errorf("containers %s", list)
	}
	if list := want(t, d, 200, "GET", "/v1/containers", ""); strings.Contains(list, `"id":"c"`) {
		t.Errorf("containers of another namespace %s", list)
	}
	if found := get("/v1/check"); !strings.Contains(found, `"name":"criu","state":"ok"`) {
		t.Errorf("check %s", found)
	}

	// One that succeeds, and one that does not.
	const ref = "stasis.test/c-cp:1"
	job := runJob(t, s, d, "/v1/checkpoints", `{"containers":["c"],"ref":"`+ref+`"}`)
	var results []struct {
		Ref    string
		Frozen int64 `json:"frozen_ns"`
	}
	if err := json.Unmarshal(job.Result, &results); err != nil || job.State != "done" || len(results) != 1 || results[0].Ref != ref || results[0].Frozen == 0 {
		t.Fatalf("checkpoint: %+v %s: %v", job, job.Result, err)
	}
	if job := runJob(t, s, d, "/v1/checkpoints", `{"containers":["none"]}`); job.State != "failed" || job.Error.Type != "urn:stasis:problem:not-found" {
		t.Errorf("checkpoint of nothing: %+v %+v", job, job.Error)
	}
	if jobs := get("/v1/jobs"); strings.Count(jobs, `"kind":"checkpoint"`) != 2 {
		t.Errorf("jobs %s", jobs)
	}

	list := get("/v1/checkpoints")
	if !strings.Contains(list, `"ref":"`+ref+`"`) || !strings.Contains(list, `"format":"runnable"`) || !strings.Contains(list, `"key_trusted":true`) {
		t.Errorf("checkpoints %s", list)
	}
	path := "/v1/checkpoints/" + url.PathEscape(ref)
	if in := get(path); !strings.Contains(in, `"comm":"sh"`) {
		t.Errorf("inspect %.500s", in)
	}
	if job := runJob(t, s, d, path+"/verify", ""); job.State != "done" || !strings.Contains(string(job.Result), `"trusted":true`) {
		t.Errorf("verify: %+v %s", job, job.Result)
	}
	// What is a file of this host is none of a client's.
	for _, file := range []string{"/etc/passwd", filepath.Join(s.Dir, "config.toml")} {
		if status, answer := d.Curl("GET", "/v1/checkpoints/"+url.PathEscape(file)+query, ""); status != 404 {
			t.Errorf("inspect %s: %d %s, want 404", file, status, answer)
		}
		if job := runJob(t, s, d, "/v1/restores", fmt.Sprintf(`{"checkpoint":%q}`, file)); job.State != "failed" {
			t.Errorf("restore %s: %+v", file, job)
		}
	}

	job = runJob(t, s, d, "/v1/restores", `{"checkpoint":"`+ref+`","name":"d"}`)
	if job.State != "done" || !strings.Contains(string(job.Result), `"container":"d"`) {
		t.Fatalf("restore: %+v %s %+v", job, job.Result, job.Error)
	}
	restored := load(t, s, "d")
	if job := runJob(t, s, d, "/v1/restores", `{"checkpoint":"`+ref+`","name":"d"}`); job.State != "failed" || job.Error.Type != "urn:stasis:problem:already-exists" {
		t.Errorf("restore over a container: %+v %+v", job, job.Error)
	}
	second := runJob(t, s, d, "/v1/checkpoints", `{"containers":["d"],"ref":"stasis.test/c-cp:2","exit":true}`)
	if second.State != "done" {
		t.Fatalf("checkpoint and exit: %+v %+v", second, second.Error)
	}
	restored.DeleteTask(ctx)
	if diff := want(t, d, 200, "GET", path+"/diff"+query+"&with="+url.QueryEscape("stasis.test/c-cp:2"), ""); !strings.Contains(diff, `"processes"`) {
		t.Errorf("diff %s", diff)
	}
	// Pages.
	var page struct {
		Items []struct{ Ref string }
		Next  string
	}
	var refs []string
	for after := ""; ; after = "&after=" + url.QueryEscape(page.Next) {
		page.Next = ""
		if err := json.Unmarshal([]byte(want(t, d, 200, "GET", "/v1/checkpoints"+query+"&limit=1"+after, "")), &page); err != nil || len(page.Items) > 1 {
			t.Fatalf("a page: %+v, %v", page, err)
		}
		refs = append(refs, page.Items[0].Ref)
		if page.Next == "" {
			break
		}
	}
	if len(refs) != 2 || refs[1] != ref {
		t.Errorf("checkpoints by pages %v", refs)
	}
	// Through a file.
	file := filepath.Join(s.Dir, "c.tar")
	curl := func(args ...string) string {
		t.Helper()
		out, err := exec.CommandContext(ctx, "curl", append([]string{"-sS", "--fail-with-body", "--unix-socket", d.Socket}, args...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("curl %v: %v\n%s", args, err, out)
		}
		return string(out)
	}
	for _, format := range []string{"archive", "oci"} {
		curl("-o", file, "http://node"+path+"/export"+query+"&format="+format)
		imported := curl("--data-binary", "@"+file, "http://node/v1/imports"+query+"&ref=stasis.test/imported:1")
		if !strings.Contains(imported, `"ref":"stasis.test/imported:1"`) {
			t.Errorf("import of %s: %s", format, imported)
		}
		if list := get("/v1/checkpoints"); !strings.Contains(list, `"ref":"stasis.test/imported:1"`) || strings.Count(list, `"container":"c"`) != 2 {
			t.Errorf("imported from %s: %s", format, list)
		}
		want(t, d, 204, "DELETE", "/v1/checkpoints/stasis.test%2Fimported:1"+query, "")
	}
	want(t, d, 404, "GET", "/v1/checkpoints/none/export"+query, "")
	want(t, d, 400, "POST", "/v1/imports"+query, "no checkpoint")

	want(t, d, 204, "DELETE", path+query, "")
	want(t, d, 404, "DELETE", path+query, "")
	metrics := want(t, d, 200, "GET", "/metrics", "")
	for _, line := range []string{
		"stasis_checkpoint_frozen_seconds_count 2",
		`stasis_operation_duration_seconds_count{operation="restore"} 1`,
		`stasis_operation_errors_total{class="not-found",operation="checkpoint"} 1`,
		fmt.Sprintf("stasis_checkpoints{namespace=%q} 1", s.Namespace),
		fmt.Sprintf("stasis_containers{namespace=%q,status=\"running\"} 1", s.Namespace),
		"stasis_state_free_bytes ",
	} {
		if !strings.Contains(metrics, line) {
			t.Errorf("metrics lack %s:\n%s", line, metrics)
		}
	}
	c.Kill(ctx, syscall.SIGKILL)
	c.DeleteTask(ctx)
}

// TestRESTLogin: a request may bring the login of a registry, which is nowhere after it.
func TestRESTLogin(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	r := startRegistry(t, s, registryConfig{password: true})
	ref := r.host + "/backup/c:1"
	storeSleeper(s, ref)
	d := s.StartStasisd()
	one := "/v1/checkpoints/" + url.PathEscape(ref)
	login := func(password string) string {
		return fmt.Sprintf(`"login":{"registry":%q,"username":"stasis","password":%q}`, r.host, password)
	}
	for _, tt := range []struct{ path, body, state string }{
		{one + "/push", `{}`, "failed"},
		{one + "/push", `{` + login("secret1") + `}`, "failed"},
		{one + "/push", `{` + login("secret") + `}`, "done"},
		{"", "", ""}, // removes it
		{"/v1/pulls", `{"ref":"` + ref + `"}`, "failed"},
		{"/v1/pulls", `{"ref":"` + ref + `",` + login("secret") + `}`, "done"},
		{"", "", ""},
		{"/v1/restores", `{"checkpoint":"` + ref + `","name":"d","privileged":true,` + login("secret") + `}`, "done"},
		{"/v1/checkpoints", `{"containers":["d"],"ref":"` + r.host + `/backup/d:1","push":true,` + login("secret") + `}`, "done"},
	} {
		if tt.path == "" {
			want(t, d, 204, "DELETE", one+"?namespace="+s.Namespace, "")
			continue
		}
		if job := runJob(t, s, d, tt.path, tt.body); job.State != tt.state || job.Error != nil && strings.Contains(job.Error.Detail, "secret") {
			t.Errorf("POST %s %s: %+v %+v", tt.path, tt.body, job, job.Error)
		}
	}
	if strings.Contains(d.Log(), "secret") {
		t.Errorf("the log has the password: %s", d.Log())
	}
	files, _ := exec.Command("grep", "-rl", "secret", filepath.Join(s.Dir, "stasis")).CombinedOutput()
	if len(files) > 0 {
		t.Errorf("the password is in %s", files)
	}
	s.Stasis("rm", ref, r.host+"/backup/d:1")
}

// TestRESTJobs: 50 jobs on 20 containers at once all succeed; one that is canceled, and
// one that a kill of stasisd cuts short, say so, and the container runs on.
func TestRESTJobs(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	f := s.Faults()
	var all []*stack.Container
	for i := range 20 {
		c := s.NewContainer(ctx, fmt.Sprintf("c%d", i), stack.Busybox, stack.Args("sleep", "100000"))
		c.Start(ctx)
		all = append(all, c)
	}
	d := s.StartStasisd()
	query := "?namespace=" + s.Namespace

	var work sync.WaitGroup
	for i := range 50 {
		work.Go(func() {
			body := fmt.Sprintf(`{"containers":["c%d"],"ref":"stasis.test/many:%d"}`, i%20, i)
			if job := runJob(t, s, d, "/v1/checkpoints", body); job.State != "done" {
				t.Errorf("job %d: %+v %+v", i, job, job.Error)
			}
		})
	}
	work.Wait()
	for i := range 50 {
		want(t, d, 204, "DELETE", "/v1/checkpoints/"+url.PathEscape(fmt.Sprintf("stasis.test/many:%d", i))+query, "")
	}

	begin := func() (id string) {
		t.Helper()
		f.Hold("checkpoint", stack.Before)
		var job restJob
		if err := json.Unmarshal([]byte(want(t, d, 202, "POST", "/v1/checkpoints"+query, `{"containers":["c0"],"ref":"stasis.test/c0:1"}`)), &job); err != nil {
			t.Fatal(err)
		}
		f.WaitReached(ctx, "checkpoint", stack.Before)
		return job.ID
	}
	ended := func(id, state string) {
		t.Helper()
		s.Poll(ctx, "job "+state, func() bool {
			_, answer := d.Curl("GET", "/v1/jobs/"+id+query, "")
			return strings.Contains(answer, `"state":"`+state+`"`)
		})
		if list := want(t, d, 200, "GET", "/v1/checkpoints"+query, ""); strings.Contains(list, "stasis.test") {
			t.Errorf("checkpoints %s", list)
		}
		status, err := all[0].Task.Status(ctx)
		if err != nil || status.Status != "running" {
			t.Errorf("container %v, %v", status, err)
		}
	}
	id := begin()
	want(t, d, 202, "POST", "/v1/jobs/"+id+"/cancel"+query, "")
	f.Reset()
	ended(id, "canceled")
	want(t, d, 409, "POST", "/v1/jobs/"+id+"/cancel"+query, "")

	id = begin()
	d.End(syscall.SIGKILL)
	f.Reset()
	s.Poll(ctx, "the container to run", func() bool {
		status, err := all[0].Task.Status(ctx)
		return err == nil && status.Status == "running"
	})
	d.Start()
	ended(id, "interrupted")
	s.Stasis("prune") // the folder of its work
	if job := runJob(t, s, d, "/v1/checkpoints", `{"containers":["c0"],"ref":"stasis.test/c0:1"}`); job.State != "done" {
		t.Errorf("the same again: %+v %+v", job, job.Error)
	}
	for _, c := range all {
		c.Kill(ctx, syscall.SIGKILL)
		c.DeleteTask(ctx)
	}
}

// TestRESTKilledUpstream kills stasisd while it dumps a container under another shim, for
// which that is paused. It runs again when stasisd does, and stays so.
func TestRESTKilledUpstream(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	f := s.Faults()
	c := s.NewContainerWith(ctx, "c", stack.Busybox, []client.NewContainerOpts{client.WithRuntime("io.containerd.runc.v2", s.RuncOptions(""))}, stack.Args("sleep", "100000"))
	c.Start(ctx)
	d := s.StartStasisd()
	query := "?namespace=" + s.Namespace
	for _, when := range []stack.When{stack.Before, stack.During("Dumping task"), stack.After} {
		f.Hold("checkpoint", when)
		want(t, d, 202, "POST", "/v1/checkpoints"+query, `{"containers":["c"],"ref":"stasis.test/c:1"}`)
		f.WaitReached(ctx, "checkpoint", when)
		d.End(syscall.SIGKILL)
		f.Reset()
		d.Start()
		s.Poll(ctx, "the container to run", func() bool { return c.Status(ctx) == client.Running })
		c.Exec(ctx, "true") // which a frozen one cannot
		s.Stasis("prune")
	}
	if job := runJob(t, s, d, "/v1/checkpoints", `{"containers":["c"],"ref":"stasis.test/c:1"}`); job.State != "done" {
		t.Errorf("the same again: %+v %+v", job, job.Error)
	}
	if status := c.Status(ctx); status != client.Running {
		t.Errorf("it is %s after a checkpoint", status)
	}
	c.Kill(ctx, syscall.SIGKILL)
	c.Delete(ctx)
}

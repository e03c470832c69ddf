package integration

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/stasis-run/stasis/integration/stack"
)

// restState is an answer to GET /state.
type restState struct {
	Containers []struct {
		ID         string
		BundlePath string
		State      struct{ Status string }
		Processes  []struct {
			Pid  int
			Args []string
			Cwd  string
			User struct{ UID, GID uint32 }
		}
	}
	Machine struct {
		CPUs   int
		Memory uint64
	}
}

func getState(t *testing.T, d *stack.Stasisd) (state restState) {
	t.Helper()
	status, body := d.Curl("GET", "/state", "")
	if err := json.Unmarshal([]byte(body), &state); err != nil || status != 200 {
		t.Fatalf("GET /state: %d %s: %v", status, body, err)
	}
	return state
}

// want makes a request and checks the status of its answer.
func want(t *testing.T, d *stack.Stasisd, status int, method, path, body string) string {
	t.Helper()
	got, answer := d.Curl(method, path, body)
	if got != status {
		t.Fatalf("%s %s %s: %d %s, want %d", method, path, body, got, answer, status)
	}
	return answer
}

// TestRESTBundles walks through containerd's first interface by curl, with a Redis that
// is checkpointed, ends, and comes back with its data and its connection.
func TestRESTBundles(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	here := s.NewNetns()
	bundle := s.Bundle("redis", "redis", here.With(),
		stack.Args("redis-server", "--bind", "0.0.0.0", "--protected-mode", "no", "--save", "", "--dir", "/tmp"))
	bundles := filepath.Dir(bundle)
	d := s.StartStasisd("--allow-path", bundles)
	out := filepath.Join(bundles, "out.log")

	events := exec.Command("curl", "-sSN", "--unix-socket", d.Socket, "http://node/events")
	heard, err := events.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := events.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = events.Process.Kill()
		_ = events.Wait()
	}()
	lines := bufio.NewScanner(heard)

	start := fmt.Sprintf(`{"bundlePath":%q,"stdout":%q}`, bundle, out)
	if body := want(t, d, 201, "POST", "/containers/redis", start); body != "" {
		t.Errorf("POST /containers/redis: %q, want an empty answer", body)
	}
	s.Poll(ctx, "Redis listens", func() bool {
		data, _ := os.ReadFile(out)
		return strings.Contains(string(data), "Ready to accept connections")
	})
	conn, err := net.Dial("tcp", here.Addr+":6379")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	r := bufio.NewReader(conn)
	incremented := func(want int64) {
		t.Helper()
		if n, err := redisNumber(conn, r, "INCR counter"); err != nil || n != want {
			t.Fatalf("INCR: %d, %v; want %d", n, err, want)
		}
	}
	incremented(1)

	state := getState(t, d)
	if len(state.Containers) != 1 || state.Machine.CPUs < 1 || state.Machine.Memory < 1<<28 {
		t.Fatalf("state %+v", state)
	}
	c := state.Containers[0]
	if c.ID != "redis" || c.BundlePath != bundle || c.State.Status != "running" || len(c.Processes) != 1 || c.Processes[0].Args[0] != "redis-server" {
		t.Errorf("state %+v", c)
	}
	if tasks := s.Ctr("tasks", "ls"); !strings.Contains(tasks, "redis") {
		t.Errorf("ctr tasks ls: %s", tasks)
	}

	// A process more, and its end.
	var added struct {
		Pid  int
		User struct{ UID uint32 }
	}
	for _, path := range []string{"/containers/redis/process", "/containers/redis/processes"} {
		body := want(t, d, 200, "PUT", path, `{"args":["sleep","1000"],"cwd":"/tmp","env":["PATH=/usr/bin:/bin"],"user":{"uid":1000,"gid":1001}}`)
		if err := json.Unmarshal([]byte(body), &added); err != nil || added.Pid == 0 || added.User.UID != 1000 {
			t.Fatalf("PUT %s: %s: %v", path, body, err)
		}
		c = getState(t, d).Containers[0]
		if len(c.Processes) != 2 || c.Processes[1].Pid != added.Pid || !slices.Equal(c.Processes[1].Args, []string{"sleep", "1000"}) ||
			c.Processes[1].Cwd != "/tmp" || c.Processes[1].User.UID != 1000 || c.Processes[1].User.GID != 1001 {
			t.Errorf("processes %+v", c.Processes)
		}
		want(t, d, 200, "POST", fmt.Sprintf("/containers/redis/process/%d", added.Pid), `{"signal":15}`)
		s.Poll(ctx, "the process has ended", func() bool { return len(getState(t, d).Containers[0].Processes) == 1 })
	}

	want(t, d, 200, "PATCH", "/containers/redis", `{"status":"paused"}`)
	if got := getState(t, d).Containers[0].State.Status; got != "paused" {
		t.Errorf("status %s, want paused", got)
	}
	want(t, d, 200, "PATCH", "/containers/redis", `{"status":"running"}`)
	incremented(2)

	// Checkpoints: one, and one that ends it.
	want(t, d, 201, "POST", "/containers/redis/checkpoint/one", `{"tcp":true}`)
	incremented(3)
	want(t, d, 500, "POST", "/containers/redis/checkpoint/one", `{"tcp":true}`)
	want(t, d, 500, "POST", "/containers/redis", start) // the name exists
	want(t, d, 201, "POST", "/containers/redis/checkpoint/two", `{"tcp":true,"exit":true}`)
	var list []struct {
		Name, Timestamp         string
		TCP, UnixSockets, Shell bool
	}
	body := want(t, d, 200, "GET", "/containers/redis/checkpoint", "")
	if err := json.Unmarshal([]byte(body), &list); err != nil || len(list) != 2 || list[0].Name != "one" || list[1].Name != "two" ||
		!list[0].TCP || list[0].UnixSockets || list[0].Timestamp == "" {
		t.Errorf("checkpoints %s: %v", body, err)
	}
	s.Poll(ctx, "it is gone", func() bool { return len(getState(t, d).Containers) == 0 })

	want(t, d, 201, "POST", "/containers/redis", fmt.Sprintf(`{"bundlePath":%q,"checkpoint":"two"}`, bundle))
	incremented(4)

	// stasisd ends and comes back: the container does not notice.
	d.End(syscall.SIGKILL)
	incremented(5)
	d.Start()
	if got := getState(t, d).Containers; len(got) != 1 || got[0].ID != "redis" {
		t.Errorf("state after a restart: %+v", got)
	}
	if body := want(t, d, 200, "GET", "/containers/redis/checkpoint", ""); !strings.Contains(body, `"two"`) {
		t.Errorf("checkpoints after a restart: %s", body)
	}

	// Only one of the stream before: the first stasisd told it.
	var told []string
	for lines.Scan() {
		told = append(told, lines.Text())
	}
	for _, e := range []string{`{"type":"checkpoint","id":"redis","status":0}`, `{"type":"exit","id":"redis","status":137}`} {
		if !slices.Contains(told, e) {
			t.Errorf("events %q, want %s", told, e)
		}
	}

	want(t, d, 200, "DELETE", "/containers/redis/checkpoint/one", "")
	want(t, d, 404, "DELETE", "/containers/redis/checkpoint/one", "")
	want(t, d, 200, "PATCH", "/containers/redis", `{"signal":9}`)
	s.Poll(ctx, "it is gone", func() bool { return len(getState(t, d).Containers) == 0 })
	want(t, d, 200, "DELETE", "/containers/redis/checkpoint/two", "")
	s.Poll(ctx, "its removal", func() bool {
		left, err := s.Client().Containers(ctx)
		return err == nil && len(left) == 0
	})
	want(t, d, 404, "GET", "/containers/redis/checkpoint", "")
}

// TestRESTBundlesRefused: requests that are wrong get the status that the interface has for
// them, and change nothing.
func TestRESTBundlesRefused(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	bundle := s.Bundle("c", "busybox", stack.Args("sleep", "1000"))
	bundles := filepath.Dir(bundle)
	if err := os.Symlink("/etc", filepath.Join(bundles, "link")); err != nil {
		t.Fatal(err)
	}
	d := s.StartStasisd("--allow-path", bundles)
	for _, tt := range []struct {
		status             int
		method, path, body string
		want               string
	}{
		{400, "POST", "/containers/c", `{`, "the body is not the JSON"},
		{400, "POST", "/containers/c", `{}`, "empty bundle path"},
		{400, "POST", "/containers/c", `{"bundlePath":"relative"}`, "no absolute path"},
		{400, "POST", "/containers/c%2F..%2Fx", fmt.Sprintf(`{"bundlePath":%q}`, bundle), "container"},
		{404, "POST", "/containers/c", fmt.Sprintf(`{"bundlePath":%q}`, bundles), "no config.json"},
		{404, "POST", "/containers/c", fmt.Sprintf(`{"bundlePath":%q,"checkpoint":"none"}`, bundle), "no checkpoint none"},
		{403, "POST", "/containers/c", `{"bundlePath":"/etc"}`, "bundlePath"},
		{403, "POST", "/containers/c", fmt.Sprintf(`{"bundlePath":%q}`, bundle+"/../../.."), "bundlePath"},
		{403, "POST", "/containers/c", fmt.Sprintf(`{"bundlePath":%q}`, bundles+"/link"), "bundlePath"},
		{403, "POST", "/containers/c", fmt.Sprintf(`{"bundlePath":%q,"stdout":"/etc/passwd"}`, bundle), "stdout"},
		{403, "POST", "/containers/c", fmt.Sprintf(`{"bundlePath":%q,"stderr":%q}`, bundle, bundles+"/link/passwd"), "stderr"},
		{413, "POST", "/containers/c", `{"bundlePath":"` + strings.Repeat("x", 1<<20) + `"}`, ""},
		{404, "PATCH", "/containers/c", `{"signal":9}`, "not found"},
		{400, "PATCH", "/containers/c", `{"signal":99}`, "signal"},
		{400, "PATCH", "/containers/c", `{"status":"gone"}`, "status"},
		{400, "PATCH", "/containers/c", `{}`, ""},
		{404, "PUT", "/containers/c/process", `{"args":["id"]}`, "not found"},
		{400, "PUT", "/containers/c/process", `{}`, "args"},
		{404, "POST", "/containers/c/process/1", `{"signal":15}`, "not found"},
		{400, "POST", "/containers/c/process/x", `{"signal":15}`, "pid"},
		{404, "POST", "/containers/c/checkpoint/x", "", "not found"},
		{404, "GET", "/containers/c/checkpoint", "", "not found"},
		{404, "DELETE", "/containers/c/checkpoint/x", "", "no checkpoint x"},
		{400, "DELETE", "/containers/c/checkpoint/..%2F..", "", "checkpoint"},
		{405, "DELETE", "/containers/c", "", ""},
	} {
		status, answer := d.Curl(tt.method, tt.path, tt.body)
		if status != tt.status || !strings.Contains(answer, tt.want) {
			t.Errorf("%s %s %.80s: %d %s; want %d and %q", tt.method, tt.path, tt.body, status, answer, tt.status, tt.want)
		}
	}
	if left, err := s.Client().Containers(s.Ctx()); err != nil || len(left) > 0 {
		t.Errorf("containers %v, %v are left", left, err)
	}
	for _, dir := range []string{"saved", "saving"} {
		if left, _ := filepath.Glob(filepath.Join(s.Dir, "stasis", dir, "*", "*", "*")); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	}
}

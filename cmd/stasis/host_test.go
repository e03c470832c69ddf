package main

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// atHost runs a command line for the stasisd at a URL.
func atHost(t *testing.T, url, line string) (code int, out, errs string) {
	t.Helper()
	t.Setenv("STASIS_HOST", url)
	var stdout, stderr bytes.Buffer
	code = run(t.Context(), strings.Fields(line), strings.NewReader("input"), &stdout, &stderr)
	return code, stdout.String(), stderr.String()
}

// TestHostRefuses: what a stasisd does not do for others is refused before anything is
// done, and what the node finds wrong has the exit code for that.
func TestHostRefuses(t *testing.T) {
	asked := ""
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = r.Method + " " + r.URL.Path
		w.Header().Set("Content-Type", "application/problem+json")
		switch r.URL.Path {
		case "/v1/pulls":
			w.WriteHeader(400)
			fmt.Fprint(w, `{"type":"urn:stasis:problem:wrong-request","status":400,"detail":"UPPER is no name"}`)
		default:
			w.WriteHeader(403)
			fmt.Fprint(w, `{"type":"urn:stasis:problem:forbidden","status":403,"detail":"me may not"}`)
		}
	}))
	defer server.Close()
	for _, tt := range []struct {
		line  string
		code  int
		part  string // of stderr
		asked string
	}{
		{"prune", exitUsage, "stasis prune works on this host alone", ""},
		{"key show", exitUsage, "stasis key works on this host alone", ""},
		{"convert a b", exitUsage, "on this host alone", ""},
		{"sign a", exitUsage, "on this host alone", ""},
		{"ls --host HOST --state /x", exitUsage, "--state is of this host", ""},
		{"ls --address /nonexistent", exitFailed, "no containerd at /nonexistent", ""},
		{"stage --address /nonexistent DIR a", exitFailed, "no containerd at /nonexistent", ""},
		{"version", 0, "", ""},
		{"version --host HOST", exitUsage, "stasis version does not go with --host", ""},
		{"ls --tls-ca /nonexistent", exitUsage, "--host", ""},
		{"inspect ./a", exitUsage, "./a is a path", ""},
		{"verify /a", exitUsage, "/a is a path", ""},
		{"diff a ./b", exitUsage, "./b is a path", ""},
		{"restore /nonexistent", exitUsage, "/nonexistent is a path", ""},
		{"checkpoint c x/y:1 --output db.tar", exitUsage, "either a REF", ""},
		{"checkpoint --pod p --output db.tar", exitUsage, "one container", ""},
		{"restore a --attach", exitUsage, "--attach does not go with --host", ""},
		{"restore a --runc-binary /x", exitUsage, "--runc-binary does not", ""},
		{"restore a --runtime io.containerd.x.v1", exitUsage, "--runtime does not", ""},
		{"restore a --max-size 1G", exitUsage, "--max-size does not", ""},
		{"restore a --log-uri binary:///bin/x", exitUsage, "--log-uri does not", ""},
		{"inspect a --max-size 1G", exitUsage, "--max-size does not", ""},
		{"diff a b --max-size 1G", exitUsage, "--max-size does not", ""},
		{"export a - --max-size 1G", exitUsage, "--max-size does not", ""},
		{"import - --format podman", exitUsage, "--format podman does not", ""},
		{"import - --compress gzip", exitUsage, "--compress gzip does not", ""},
		{"checkpoint c --from /x", exitUsage, "--from does not", ""},
		{"checkpoint", exitUsage, "", ""},
		{"--token-file /nonexistent ls", exitUsage, "--token-file", ""},
		{"pull UPPER", exitUsage, "UPPER is no name", "POST /v1/pulls"},
		{"ls", exitFailed, "me may not", "GET /v1/checkpoints"},
		{"check", exitFailed, "", "GET /v1/check"},
		{"rm a", exitFailed, "me may not", "DELETE /v1/checkpoints/a"},
		{"inspect a", exitFailed, "me may not", "GET /v1/checkpoints/a"},
		{"verify a", exitFailed, "me may not", "POST /v1/checkpoints/a/verify"},
		{"checkpoint c", exitFailed, "me may not", "POST /v1/checkpoints"},
		{"restore a", exitFailed, "me may not", "POST /v1/restores"},
		{"push a", exitFailed, "me may not", "POST /v1/checkpoints/a/push"},
		{"export a -", exitFailed, "me may not", "GET /v1/checkpoints/a/export"},
		{"import -", exitFailed, "me may not", "POST /v1/imports"},
	} {
		asked = ""
		code, _, errs := atHost(t, server.URL, strings.Replace(tt.line, "HOST", server.URL, 1))
		if code != tt.code || !strings.Contains(errs, tt.part) || asked != tt.asked {
			t.Errorf("stasis %s: exit code %d, want %d; asked %q, want %q; %s", tt.line, code, tt.code, asked, tt.asked, errs)
		}
	}
	if code, _, errs := atHost(t, "", "ls --token-file x"); code != exitUsage || !strings.Contains(errs, "--token-file is for --host") {
		t.Errorf("exit code %d, %s", code, errs)
	}
	if code, _, errs := atHost(t, "http://node", "ls"); code != exitUsage || !strings.Contains(errs, "--host: http://node: stasisd is spoken to without TLS") {
		t.Errorf("exit code %d, %s", code, errs)
	}
}

// TestHostToken: a token comes from a file or the environment, and is in no error.
func TestHostToken(t *testing.T) {
	got := ""
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got = r.Header.Get("Authorization")
		http.Error(w, "no", http.StatusTeapot)
	}))
	defer server.Close()
	t.Setenv("STASIS_TOKEN", "of-env")
	_, _, errs := atHost(t, server.URL, "ls")
	if got != "Bearer of-env" || strings.Contains(errs, "of-env") {
		t.Errorf("%q %s", got, errs)
	}
	// It is not for another host than that of the environment.
	if _, _, errs = atHost(t, "https://elsewhere", "--host "+server.URL+" ls"); got != "" {
		t.Errorf("%q %s", got, errs)
	}
	file := filepath.Join(t.TempDir(), "token")
	must0(t, os.WriteFile(file, []byte("of-file\n"), 0o600))
	_, _, errs = atHost(t, server.URL, "--token-file "+file+" ls")
	if got != "Bearer of-file" || strings.Contains(errs, "of-file") {
		t.Errorf("%q %s", got, errs)
	}
}

// TestHostCompletion: words come from the node.
func TestHostCompletion(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/v1/containers":
			fmt.Fprint(w, `{"items":[{"id":"db"}]}`)
		case "/v1/checkpoints":
			fmt.Fprint(w, `{"items":[{"ref":"backup/db:1"}]}`)
		}
	}))
	defer server.Close()
	t.Setenv("STASIS_HOST", server.URL)
	for line, want := range map[string]string{"__complete checkpoint": "db\n", "__complete rm": "backup/db:1\n"} {
		var out, errs bytes.Buffer
		if code := run(t.Context(), append(strings.Fields(line), ""), nil, &out, &errs); code != 0 || !strings.HasPrefix(out.String(), want) {
			t.Errorf("%s: %d %q %q", line, code, out.String(), errs.String())
		}
	}
}

// TestHostRequests: flags reach the node as what they are.
func TestHostRequests(t *testing.T) {
	for line, want := range map[string]string{
		"restore a": `{"checkpoint":"a"}`,
		"restore a b --tcp-close --network none --plain-http --snapshotter native": `{"checkpoint":"a","name":"b","tcp_close":true,"network":"none","plain_http":true,"snapshotter":"native"}`,
		"restore a --privileged --wait-healthy true --wait-timeout 90s":            `{"checkpoint":"a","privileged":true,"wait_healthy":"true","wait_seconds":90}`,
		"restore a --allow-mount /a --allow-mount /b:/c --allow-device /dev/fuse --allow-host pid --allow-capability CAP_SYS_ADMIN": `{"checkpoint":"a",` +
			`"grants":{"mounts":["/a","/b:/c"],"devices":["/dev/fuse"],"namespaces":["pid"],"capabilities":["CAP_SYS_ADMIN"]}}`,
		"restore a --allow-seccomp profile --allow-new-privs --allow-unmask /proc/kcore --allow-sysctl x --allow-ulimit nofile --allow-label l --allow-priority oom --cgroup-parent /p": `{"checkpoint":"a",` +
			`"grants":{"seccomp":"profile","new_privileges":true,"unmask":["/proc/kcore"],"sysctls":["x"],"ulimits":["nofile"],"labels":["l"],"priorities":["oom"],"cgroup_parent":"/p"}}`,
		"checkpoint c x/y:1 --exit --tcp-established --file-locks --ext-unix-sk --shell-job --link-remap --ghost-limit 2M --pre-dump auto --compress none --format podman --push --plain-http": `{"containers":["c"],"ref":"x/y:1",` +
			`"format":"podman","compression":"none","exit":true,"pre_dumps":-1,"push":true,"plain_http":true,"tcp":"keep","file_locks":true,"external_unix_sockets":true,"terminal":true,"link_remap":true,"ghost_limit":2097152}`,
		"checkpoint --pod ns/p --tcp-close": `{"pod":"ns/p","format":"runnable","compression":"zstd","tcp":"close"}`,
		"push a b --plain-http":             `{"target":"b","plain_http":true}`,
		"pull a --plain-http":               `{"ref":"a","plain_http":true}`,
	} {
		got := ""
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body)
			got = string(body)
			http.Error(w, "enough", http.StatusTeapot)
		}))
		if _, _, errs := atHost(t, server.URL, line); got != want {
			t.Errorf("stasis %s: %s\nwant %s\n%s", line, got, want, errs)
		}
		server.Close()
	}
}

// fakeNode answers as a stasisd whose jobs end as they are told to.
func fakeNode(t *testing.T, job string) (url string, asked *[]string) {
	t.Helper()
	asked = &[]string{}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		*asked = append(*asked, r.Method+" "+r.URL.EscapedPath())
		switch {
		case strings.HasSuffix(r.URL.Path, "/events"):
			fmt.Fprintf(w, "event: job\ndata: %s\n\n", job)
		case r.URL.Path == "/v1/imports":
			fmt.Fprint(w, `{"items":[{"ref":"new:1"}]}`)
		case r.Method == "GET" && r.URL.Path == "/v1/checkpoints":
			fmt.Fprint(w, `{"items":[{"ref":"old:1"}]}`)
		case strings.HasSuffix(r.URL.Path, "/export"):
			http.Error(w, "no", http.StatusBadGateway)
		default:
			fmt.Fprint(w, `{"id":"x"}`)
		}
	}))
	t.Cleanup(server.Close)
	return server.URL, asked
}

// TestHostLeaves: what is on the node stays there as long as it is of use, and no longer.
func TestHostLeaves(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	must0(t, os.WriteFile(file, []byte("x"), 0o600))
	for name, tt := range map[string]struct {
		line, job string
		removed   string // what is asked to be removed
		part      string // of the error
	}{
		"restored":         {"restore " + file, `{"state":"done","result":{"container":"c"}}`, "", ""},
		"not restored":     {"restore " + file, `{"state":"failed","error":{"status":409,"detail":"it is there"}}`, "/v1/checkpoints/new:1", "it is there"},
		"not healthy":      {"restore " + file, `{"state":"failed","result":{"container":"c"},"error":{"status":500,"detail":"not healthy"}}`, "", "not healthy"},
		"of an image":      {"restore old:1", `{"state":"failed","error":{"status":409,"detail":"it is there"}}`, "", "it is there"},
		"no file":          {"checkpoint c --output FILE", `{"state":"done","result":[{"ref":"tmp:1"}]}`, "/v1/checkpoints/tmp:1", "502"},
		"no file, no more": {"checkpoint c --exit --output FILE", `{"state":"done","result":[{"ref":"tmp:1"}]}`, "", "its checkpoint is on the node as tmp:1"},
	} {
		url, asked := fakeNode(t, tt.job)
		_, _, errs := atHost(t, url, strings.Replace(tt.line, "FILE", filepath.Join(t.TempDir(), "out"), 1))
		removed := ""
		for _, a := range *asked {
			if path, ok := strings.CutPrefix(a, "DELETE "); ok {
				removed += path
			}
		}
		if removed != tt.removed || !strings.Contains(errs, tt.part) {
			t.Errorf("%s: removed %q, want %q; %s", name, removed, tt.removed, errs)
		}
	}
}

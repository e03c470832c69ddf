package main

import (
	"bytes"
	"fmt"
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

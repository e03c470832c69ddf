package integration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/stasis-run/stasis/integration/stack"
	"github.com/stasis-run/stasis/node/rest"
	"github.com/stasis-run/stasis/node/rest/v1"
)

// TestHost works on a node by its stasisd with the same commands as on the node itself:
// they print the same, and have the same exit codes.
func TestHost(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	f := s.Faults()
	registry := startRegistry(t, s, registryConfig{})
	c := s.NewContainer(ctx, "c", stack.Busybox, stack.Args("sh", "-c", "n=0; trap 'n=$((n+1)); echo $n >/count' USR1; echo ready; while :; do sleep 1000 & wait; done"))
	c.Start(ctx)
	c.Stdout.WaitFor(ctx, "ready")
	d := s.StartStasisd()
	host := "unix://" + d.Socket
	run := func(args ...string) string {
		t.Helper()
		return s.Stasis(append([]string{"--host", host}, args...)...)
	}
	fails := func(code int, part string, args ...string) {
		t.Helper()
		_, err := s.StasisErr(append([]string{"--host", host}, args...)...)
		exit := (*exec.ExitError)(nil)
		if !errors.As(err, &exit) || exit.ExitCode() != code || !strings.Contains(err.Error(), part) {
			t.Errorf("stasis %v: %v, want exit code %d and %q", args, err, code, part)
		}
	}
	same := func(args ...string) {
		t.Helper()
		// Columns are as wide as the time that has passed.
		ago := regexp.MustCompile(`\d+ seconds? ago|Less than a second ago| +`)
		near, far := ago.ReplaceAllString(s.Stasis(args...), " "), ago.ReplaceAllString(run(args...), " ")
		if near != far || near == "" {
			t.Errorf("stasis %v: here\n%s\nby --host\n%s", args, near, far)
		}
	}
	checkpoints := func() string {
		t.Helper()
		return run("ls", "-o", "json")
	}

	same("check")
	same("ls")
	ref := registry.host + "/test/c:1"
	if out := run("checkpoint", "c", ref); out != ref+"\n" {
		t.Errorf("checkpoint: %q", out)
	}
	must(t, c.Task.Kill(ctx, syscall.SIGUSR1))
	if out := run("checkpoint", "c", "stasis.test/c:2", "--format", "podman", "-o", "json"); !strings.Contains(out, `"frozen_ns"`) {
		t.Errorf("checkpoint: %s", out)
	}
	same("ls")
	same("ls", "--format", "podman")
	same("inspect", ref)
	same("inspect", ref, "-o", "json", "--show-secrets")
	same("diff", ref, "stasis.test/c:2")
	same("diff", ref, "stasis.test/c:2", "-o", "json")
	same("verify", ref)
	same("verify", ref, "-o", "json")
	fails(1, "none", "checkpoint", "none")
	fails(1, "none", "verify", "none:1")
	fails(1, "none", "rm", "none:1")
	fails(2, "UPPER", "pull", "UPPER:case")
	fails(2, "body.name", "restore", ref, strings.Repeat("y", 80))

	// To a registry and back.
	run("push", ref)
	run("rm", ref)
	if out := run("pull", ref); out != ref+"\n" {
		t.Errorf("pull: %q", out)
	}
	// Through files; none is on the node in the end.
	before := checkpoints()
	file := filepath.Join(s.Dir, "c.tar.zst")
	if out := run("checkpoint", "c", "--output", file); out != file+"\n" {
		t.Errorf("checkpoint to a file: %q", out)
	}
	if out := s.Stasis("inspect", file); !strings.Contains(out, "sh") {
		t.Errorf("the file: %s", out)
	}
	fails(1, "there is a container c", "restore", file)
	if now := checkpoints(); now != before {
		t.Errorf("checkpoints\n%s\nwere\n%s", now, before)
	}
	run("export", ref, file, "--format", "oci")
	if out := run("import", file, "stasis.test/i:1"); out != "stasis.test/i:1\n" {
		t.Errorf("import: %q", out)
	}
	if out := run("rm", "stasis.test/i:1", "stasis.test/c:2"); out != "stasis.test/i:1\nstasis.test/c:2\n" {
		t.Errorf("rm: %q", out)
	}

	// What happens is told.
	client, err := v1.New(host, v1.Options{Namespace: s.Namespace})
	must(t, err)
	defer client.Close()
	following, stop := context.WithCancel(ctx)
	defer stop()
	events := make(chan v1.Event, 100)
	go func() { _ = client.Follow(following, func(e v1.Event) { events <- e }) }()
	if e := <-events; e.Type != v1.EventWatching {
		t.Errorf("first event %+v", e)
	}
	must(t, c.Task.Pause(ctx))
	must(t, c.Task.Resume(ctx))
	for _, want := range []string{"pause", "resume"} {
		if e := <-events; e.Type != want || e.Container != "c" {
			t.Errorf("event %+v, want %s", e, want)
		}
	}
	stop()

	// A signal has the node undo what was begun.
	f.Hold("checkpoint", stack.Before)
	cmd := s.StasisCommand("--host", host, "checkpoint", "c", "stasis.test/held:1")
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	must(t, cmd.Start())
	f.WaitReached(ctx, "checkpoint", stack.Before)
	must(t, cmd.Process.Signal(os.Interrupt))
	s.Poll(ctx, "the job to be canceled", func() bool {
		jobs, err := client.Jobs(ctx)
		must(t, err)
		return strings.Contains(d.Log(), "/v1/jobs/"+jobs[0].ID+"/cancel")
	})
	f.Reset()
	_ = cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != 130 || !strings.Contains(out.String(), "interrupted") {
		t.Errorf("interrupted: exit code %d, %s", code, out.String())
	}
	if jobs, err := client.Jobs(ctx); err != nil || jobs[0].State != v1.StateCanceled {
		t.Errorf("jobs %+v, %v", jobs, err)
	}
	if now := checkpoints(); strings.Contains(now, "held") {
		t.Errorf("checkpoints %s", now)
	}

	// Restores: of an image, and of a file; a command in the container.
	if out := run("restore", ref, "d", "--wait-healthy", "test ! -e /count"); out != "d\n" {
		t.Errorf("restore: %q", out)
	}
	fails(1, "there is a container d", "restore", ref, "d")
	run("export", ref, file)
	if out := run("restore", file, "e", "-o", "json"); !strings.Contains(out, `"container": "e"`) {
		t.Errorf("restore of a file: %s", out)
	}
	for _, id := range []string{"d", "e"} {
		if status, err := load(t, s, id).Task.Status(ctx); err != nil || status.Status != "running" {
			t.Errorf("%s: %v, %v", id, status, err)
		}
	}
	c.Kill(ctx, syscall.SIGKILL)
	c.DeleteTask(ctx)
}

// TestHostTLS: a remote node is reached by TLS, and a token permits what its scopes say.
func TestHostTLS(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	cert, key := filepath.Join(s.Dir, "node.pem"), filepath.Join(s.Dir, "node.key")
	selfSigned(t, registryConfig{address: "127.0.0.1", certificate: cert, key: key})
	config := filepath.Join(s.Dir, "stasisd.toml")
	must(t, os.WriteFile(config, fmt.Appendf(nil, `
[[clients]]
name = "reader"
token = %q
scopes = ["read"]
namespaces = [%q]
`, rest.HashToken("secret-of-reader"), s.Namespace), 0o600))
	d := s.StartStasisd("--config", config, "--listen", "tcp://127.0.0.1:0", "--tls-cert", cert, "--tls-key", key)
	address := regexp.MustCompile(`address=tcp://(127\.0\.0\.1:\d+)`).FindStringSubmatch(d.Log())
	if address == nil {
		t.Fatalf("no address in the log:\n%s", d.Log())
	}
	for _, tt := range []struct {
		name, token string
		args        []string
		part        string // of the error; empty: it succeeds
	}{
		{"reads", "secret-of-reader", []string{"--tls-ca", cert, "ls"}, ""},
		{"does not save", "secret-of-reader", []string{"--tls-ca", cert, "checkpoint", "c"}, "reader may not: it needs scope checkpoint"},
		{"another namespace", "secret-of-reader", []string{"--tls-ca", cert, "-n", "other", "ls"}, "in namespace other"},
		{"no token", "", []string{"--tls-ca", cert, "ls"}, "a token (Authorization"},
		{"wrong token", "guess", []string{"--tls-ca", cert, "ls"}, "a token (Authorization"},
		{"unknown authority", "secret-of-reader", []string{"ls"}, "certificate"},
	} {
		cmd := s.StasisCommand(append([]string{"--host", "https://" + address[1]}, tt.args...)...)
		cmd.Env = append(cmd.Environ(), "STASIS_TOKEN="+tt.token)
		out, err := cmd.CombinedOutput()
		if (err == nil) != (tt.part == "") || !strings.Contains(string(out), tt.part) || tt.token != "" && strings.Contains(string(out), tt.token) {
			t.Errorf("%s: %v, %s", tt.name, err, out)
		}
	}
	if strings.Contains(d.Log(), "secret-of-reader") {
		t.Error("the log has the token")
	}
}

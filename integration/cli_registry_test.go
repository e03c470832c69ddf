package integration

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/stasis-run/stasis/integration/stack"
)

// registry is Debian's docker-registry on loopback.
type registry struct {
	host string // with the port

	mu  sync.Mutex
	log bytes.Buffer
}

func (r *registry) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.log.Write(p)
}

// requests counts the requests so far that the log has with a method and a part
// of the path.
func (r *registry) requests(method, part string) (n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, line := range strings.Split(r.log.String(), "\n") {
		if strings.Contains(line, `"`+method+" ") && strings.Contains(line, part) {
			n++
		}
	}
	return n
}

// startRegistry starts a registry, which lets only those in who have the
// password if there is one: user "stasis", password "secret".
func startRegistry(t *testing.T, s *stack.Stack, password bool) *registry {
	t.Helper()
	program, err := exec.LookPath("docker-registry")
	if err != nil {
		t.Fatal("no docker-registry in PATH: run contrib/setup.sh, then eval \"$(contrib/setup.sh --env)\"")
	}
	// The registry cannot choose a port by itself.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	r := &registry{host: l.Addr().String()}
	must(t, l.Close())
	dir := t.TempDir()
	config := fmt.Sprintf("version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: %s\nhttp:\n  addr: %s\nlog:\n  level: warn\n", dir, r.host)
	if password {
		file := filepath.Join(dir, "htpasswd")
		// bcrypt of "secret".
		must(t, os.WriteFile(file, []byte("stasis:$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n"), 0o600))
		config += fmt.Sprintf("auth:\n  htpasswd:\n    realm: test\n    path: %s\n", file)
	}
	path := filepath.Join(dir, "config.yml")
	must(t, os.WriteFile(path, []byte(config), 0o600))
	cmd := exec.Command(program, "serve", path)
	cmd.Stdout, cmd.Stderr = r, r
	must(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("registry:\n%s", r.log.String())
		}
	})
	s.Poll(s.Ctx(), "the registry", func() bool {
		conn, err := net.Dial("tcp", r.host)
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
	return r
}

// TestCLIRegistry sends a checkpoint to another machine: a second containerd,
// with an empty store.
func TestCLIRegistry(t *testing.T) {
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	r := startRegistry(t, s, false)
	c := s.NewContainer(ctx, "c", stack.Busybox, stack.Args("sh", "-c", "echo one > /file; echo ready; exec sleep 1000"))
	c.Start(ctx)
	c.Stdout.WaitFor(ctx, "ready")
	ref := r.host + "/backup/c:1"
	if out := s.Stasis("checkpoint", "c", ref, "--exit"); out != ref+"\n" {
		t.Errorf("checkpoint printed %q", out)
	}
	c.Wait(ctx)
	c.Delete(ctx)
	if out := s.Stasis("push", ref); out != ref+"\n" {
		t.Errorf("push printed %q", out)
	}

	// What the registry has is not sent again, under whatever name.
	sent := r.requests("POST", "/blobs/uploads/")
	if sent == 0 {
		t.Error("the registry's log shows no upload")
	}
	s.Stasis("push", ref, r.host+"/backup/c:2")
	if again := r.requests("POST", "/blobs/uploads/"); again != sent {
		t.Errorf("%d uploads at first, %d more for the same", sent, again-sent)
	}

	other := stack.Start(t, stack.Options{})
	for _, tag := range []string{":1", ":2"} {
		name := r.host + "/backup/c" + tag
		if out := other.Stasis("pull", name); out != name+"\n" {
			t.Errorf("pull printed %q", out)
		}
		if l := findListed(listCheckpoints(t, other), name); l == nil || l.Form != "runnable" || l.Broken != "" {
			t.Errorf("ls: %+v", l)
		}
	}
	checkEqual(t, other, ref, r.host+"/backup/c:2")
	if out := other.Stasis("inspect", ref); !strings.Contains(out, "sleep 1000") {
		t.Errorf("inspect:\n%s", out)
	}
	// Every form travels.
	for _, form := range []string{"index", "podman"} {
		name := r.host + "/backup/c:" + form
		s.Stasis("convert", ref, name, "--format", form)
		s.Stasis("push", name)
		other.Stasis("pull", name)
		checkEqual(t, other, ref, name)
	}
	if _, err := other.StasisErr("pull", r.host+"/backup/none:1"); err == nil || !strings.Contains(err.Error(), "not found") {
		t.Errorf("pull of what is not there: %v", err)
	}
	checkTidy(t, s)
	checkTidy(t, other)
}

// TestCLICredentials logs in with what Docker and Podman have in their files.
func TestCLICredentials(t *testing.T) {
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	r := startRegistry(t, s, true)
	c := s.NewContainer(ctx, "c", stack.Busybox, stack.Args("sleep", "1000"))
	c.Start(ctx)
	ref := r.host + "/backup/c:1"
	s.Stasis("checkpoint", "c", ref, "--exit")
	c.Wait(ctx)
	c.Delete(ctx)

	home := t.TempDir()
	push := func(env ...string) error {
		cmd := s.StasisCommand("push", ref)
		cmd.Env = append(append(cmd.Env, "HOME="+home, "DOCKER_CONFIG=", "REGISTRY_AUTH_FILE="), env...)
		out, err := cmd.CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	}
	if err := push(); err == nil {
		t.Error("push without a password succeeded")
	}
	// "stasis:secret" in base64.
	auth := fmt.Sprintf(`{"auths": {%q: {"auth": "c3Rhc2lzOnNlY3JldA=="}}}`, r.host)
	must(t, os.WriteFile(filepath.Join(home, "config.json"), []byte(auth), 0o600))
	if err := push("DOCKER_CONFIG=" + home); err != nil {
		t.Error(err)
	}
	if err := push("REGISTRY_AUTH_FILE=" + filepath.Join(home, "config.json")); err != nil {
		t.Error(err)
	}
	s.Stasis("rm", ref)
	checkTidy(t, s)
}

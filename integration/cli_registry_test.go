package integration

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stasis-run/stasis/integration/stack"
)

// registry is Debian's docker-registry on loopback.
type registry struct {
	host string // with the port
	// log is a file, and no pipe: what the registry has answered is in it.
	log string
}

// requests counts the requests so far that the log has with a method and a part
// of the path.
func (r *registry) requests(method, part string) (n int) {
	log, _ := os.ReadFile(r.log)
	for line := range strings.Lines(string(log)) {
		if strings.Contains(line, `"`+method+" ") && strings.Contains(line, part) {
			n++
		}
	}
	return n
}

// registryConfig is what a registry asks of its users.
type registryConfig struct {
	address  string // default: loopback, from which containerd's client takes any certificate
	password bool   // user "stasis", password "secret"
	// certificate and key are files, for TLS.
	certificate, key string
}

func startRegistry(t *testing.T, s *stack.Stack, o registryConfig) *registry {
	t.Helper()
	program, err := exec.LookPath("docker-registry")
	if err != nil {
		t.Fatal("no docker-registry in PATH: run contrib/setup.sh, then eval \"$(contrib/setup.sh --env)\"")
	}
	if o.address == "" {
		o.address = "127.0.0.1"
	}
	// The registry cannot choose a port by itself, and somebody else may take the one
	// that is free now.
	for range 10 {
		if r := tryRegistry(t, s, program, o); r != nil {
			return r
		}
	}
	t.Fatal("the registry does not start")
	return nil
}

// tryRegistry starts a registry on a free port. It returns nil if the registry ends at
// once.
func tryRegistry(t *testing.T, s *stack.Stack, program string, o registryConfig) *registry {
	t.Helper()
	l, err := net.Listen("tcp", net.JoinHostPort(o.address, "0"))
	must(t, err)
	dir := t.TempDir()
	r := &registry{host: l.Addr().String(), log: filepath.Join(dir, "log")}
	must(t, l.Close())
	config := fmt.Sprintf("version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: %s\nlog:\n  level: warn\nhttp:\n  addr: %s\n", dir, r.host)
	if o.certificate != "" {
		config += fmt.Sprintf("  tls:\n    certificate: %s\n    key: %s\n", o.certificate, o.key)
	}
	if o.password {
		file := filepath.Join(dir, "htpasswd")
		// bcrypt of "secret".
		must(t, os.WriteFile(file, []byte("stasis:$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n"), 0o600))
		config += fmt.Sprintf("auth:\n  htpasswd:\n    realm: test\n    path: %s\n", file)
	}
	path := filepath.Join(dir, "config.yml")
	must(t, os.WriteFile(path, []byte(config), 0o600))
	cmd := exec.Command(program, "serve", path)
	log, err := os.Create(r.log)
	must(t, err)
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	must(t, cmd.Start())
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(ended)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		<-ended
		if t.Failed() {
			text, _ := os.ReadFile(r.log)
			t.Logf("registry:\n%s", text)
		}
	})
	served := false
	s.Poll(s.Ctx(), "the registry", func() bool {
		select {
		case <-ended:
			return true
		default:
		}
		conn, err := net.Dial("tcp", r.host)
		if err == nil {
			conn.Close()
			served = true
		}
		return served
	})
	if !served {
		return nil
	}
	return r
}

// TestCLIRegistry sends a checkpoint to another machine: a second containerd,
// with an empty store.
func TestCLIRegistry(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	r := startRegistry(t, s, registryConfig{})
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
		if l := findListed(listCheckpoints(t, other), name); l == nil || l.Format != "runnable" || l.Broken != "" {
			t.Errorf("ls: %+v", l)
		}
	}
	checkEqual(t, other, ref, r.host+"/backup/c:2")
	if out := other.Stasis("inspect", ref); !strings.Contains(out, "sleep 1000") {
		t.Errorf("inspect:\n%s", out)
	}
	// Every format travels.
	for _, format := range []string{"index", "podman"} {
		name := r.host + "/backup/c:" + format
		s.Stasis("convert", ref, name, "--format", format)
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
	r := startRegistry(t, s, registryConfig{password: true})
	ref := r.host + "/backup/c:1"
	storeSleeper(s, ref)

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

// TestCLITLS pushes to a registry with TLS, whose certificate has to be known. Its
// address is not loopback's, from which any certificate is taken.
func TestCLITLS(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	dir := t.TempDir()
	o := registryConfig{address: s.NewNetns().HostAddr, certificate: filepath.Join(dir, "cert.pem"), key: filepath.Join(dir, "key.pem")}
	selfSigned(t, o)
	r := startRegistry(t, s, o)
	ref := r.host + "/backup/c:1"
	storeSleeper(s, ref)
	known := "SSL_CERT_FILE=" + o.certificate
	run := func(env string, args ...string) (string, error) {
		cmd := s.StasisCommand(args...)
		cmd.Env = append(cmd.Env, env, "NO_PROXY="+o.address, "no_proxy="+o.address)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	if out, err := run("SSL_CERT_FILE=/dev/null", "push", ref); err == nil || !strings.Contains(out, "certificate") {
		t.Errorf("push to a registry with an unknown certificate: %v, %s", err, out)
	}
	if out, err := run(known, "push", ref); err != nil {
		t.Errorf("push: %v: %s", err, out)
	}
	s.Stasis("rm", ref)
	if out, err := run(known, "pull", ref); err != nil {
		t.Errorf("pull: %v: %s", err, out)
	}
	s.Stasis("rm", ref)
	checkTidy(t, s)
}

// selfSigned writes a certificate for a registry, and its key.
func selfSigned(t *testing.T, o registryConfig) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := x509.Certificate{
		SerialNumber: big.NewInt(1),
		NotBefore:    time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.ParseIP(o.address)},
		IsCA:        true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, &template, &template, &private.PublicKey, private)
	must(t, err)
	must(t, os.WriteFile(o.certificate, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	der, err = x509.MarshalPKCS8PrivateKey(private)
	must(t, err)
	must(t, os.WriteFile(o.key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600))
}

// TestCLITransferAborted presses Ctrl-C in the middle of a push and of a pull, and
// does them again.
func TestCLITransferAborted(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	r := startRegistry(t, s, registryConfig{})
	// What is asked of the registry comes through here, and some of it waits.
	var hold atomic.Pointer[func(*http.Request) bool]
	reached := make(chan struct{}, 16)
	target := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: r.host})
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if match := hold.Load(); match != nil && (*match)(q) {
			reached <- struct{}{}
			// Until the client goes away, of which nobody hears before its
			// request was read.
			_, _ = io.Copy(io.Discard, q.Body)
			<-q.Context().Done()
			return
		}
		target.ServeHTTP(w, q)
	}))
	defer proxy.Close()
	ref := strings.TrimPrefix(proxy.URL, "http://") + "/backup/c:1"
	storeSleeper(s, ref)

	aborted := func(command string, match func(*http.Request) bool) {
		t.Helper()
		hold.Store(&match)
		cmd := s.StasisCommand(command, ref)
		out := &strings.Builder{}
		cmd.Stdout, cmd.Stderr = out, out
		must(t, cmd.Start())
		select {
		case <-reached:
		case <-ctx.Done():
			t.Fatalf("%s: nothing was asked of the registry: %s", command, out)
		}
		interrupt(t, cmd, out)
		hold.Store(nil)
		for len(reached) > 0 {
			<-reached
		}
		checkTidy(t, s)
	}
	aborted("push", func(q *http.Request) bool {
		return q.Method == http.MethodPut && strings.Contains(q.URL.Path, "/blobs/")
	})
	s.Stasis("push", ref)
	s.Stasis("rm", ref)
	aborted("pull", func(q *http.Request) bool {
		return q.Method == http.MethodGet && strings.Contains(q.URL.Path, "/blobs/")
	})
	checkNone(t, s, ref)
	s.Stasis("pull", ref)
	s.Stasis("rm", ref)
	checkTidy(t, s)
}

// storeSleeper makes a checkpoint to send about.
func storeSleeper(s *stack.Stack, ref string) {
	ctx := s.Ctx()
	c := s.NewContainer(ctx, "c", stack.Busybox, stack.Args("sleep", "1000"))
	c.Start(ctx)
	s.Stasis("checkpoint", "c", ref, "--exit")
	c.Wait(ctx)
	c.Delete(ctx)
}

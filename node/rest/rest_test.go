package rest

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/stasis-run/stasis/node"
)

// syncBuffer is a log that several goroutines write to.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// newTestServer has a node without a containerd: a request that is let in is answered
// with 503.
func newTestServer(t *testing.T, clients ...Client) (*Server, *syncBuffer) {
	t.Helper()
	log := &syncBuffer{}
	n := node.Dial(filepath.Join(t.TempDir(), "none.sock"), node.Options{State: filepath.Join(t.TempDir(), "state"), ImagesOnly: true})
	s, err := New(Options{Node: n, Namespace: "test", State: t.TempDir(), Clients: clients, Log: slog.New(slog.NewTextHandler(log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.s.jobs.end(0)
		s.Close()
	})
	return s, log
}

// serveOn serves s on a listener as stasisd does.
func serveOn(t *testing.T, s http.Handler, l net.Listener) {
	t.Helper()
	server := Serve(s)
	server.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0)
	go func() { _ = server.Serve(l) }()
	t.Cleanup(func() { server.Close() })
}

// authority signs certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{pool: x509.NewCertPool()}
	a.cert, a.key = a.issue(t, "authority", true)
	a.pool.AddCert(a.cert)
	return a
}

func (a *authority) issue(t *testing.T, name string, isCA bool) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: isCA, BasicConstraintsValid: true, DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	parent, signer := template, key
	if !isCA {
		parent, signer = a.cert, a.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

func (a *authority) certificate(t *testing.T, name string) tls.Certificate {
	t.Helper()
	cert, key := a.issue(t, name, false)
	return tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key}
}

// TestAccess checks who is let in by TLS, and to what.
func TestAccess(t *testing.T) {
	ours, theirs := newAuthority(t), newAuthority(t)
	s, log := newTestServer(t,
		Client{Name: "reader", Token: HashToken("secret-r"), Scopes: []Scope{ScopeRead}, Namespaces: []string{"test"}},
		Client{Name: "saver", Token: HashToken("secret-s"), Scopes: []Scope{ScopeCheckpoint}, Namespaces: []string{"*"}},
		Client{Name: "metrics", Token: HashToken("secret-m"), Scopes: []Scope{ScopeRead}, Namespaces: []string{"*"}},
		Client{Name: "root", Token: HashToken("secret-a"), Scopes: []Scope{ScopeAdmin}, Namespaces: []string{"*"}},
		Client{Name: "elsewhere", Token: HashToken("secret-e"), Scopes: []Scope{ScopeAdmin}, Namespaces: []string{"other"}},
		Client{Name: "machine", Certificate: "machine", Scopes: []Scope{ScopeRead}, Namespaces: []string{"test"}},
	)
	l, err := Listen("tcp://127.0.0.1:0", ListenOptions{TLS: &tls.Config{
		Certificates: []tls.Certificate{ours.certificate(t, "node")}, ClientCAs: ours.pool, ClientAuth: tls.VerifyClientCertIfGiven,
	}})
	if err != nil {
		t.Fatal(err)
	}
	serveOn(t, s, l)
	for _, tt := range []struct {
		name, token string
		cert        *authority
		certName    string
		method      string
		path        string
		status      int // 503: it is let in; 0: no connection
	}{
		{"nobody", "", nil, "", "GET", "/state", 401},
		{"nobody, metrics", "", nil, "", "GET", "/metrics", 401},
		{"wrong token", "secret-x", nil, "", "GET", "/state", 401},
		{"the hash", HashToken("secret-r"), nil, "", "GET", "/state", 401},
		{"reader reads", "secret-r", nil, "", "GET", "/state", 503},
		{"reader, metrics", "secret-r", nil, "", "GET", "/metrics", 403},
		{"saver, metrics", "secret-s", nil, "", "GET", "/metrics", 403},
		{"reader of all, metrics", "secret-m", nil, "", "GET", "/metrics", 200},
		{"reader saves", "secret-r", nil, "", "POST", "/containers/c/checkpoint/x", 403},
		{"reader signals", "secret-r", nil, "", "PATCH", "/containers/c", 403},
		{"reader deletes", "secret-r", nil, "", "DELETE", "/containers/c/checkpoint/x", 403},
		{"reader starts", "secret-r", nil, "", "POST", "/containers/c", 403},
		{"reader adds", "secret-r", nil, "", "PUT", "/containers/c/process", 403},
		{"saver saves", "secret-s", nil, "", "POST", "/containers/c/checkpoint/x", 503},
		{"saver reads", "secret-s", nil, "", "GET", "/state", 403},
		{"root", "secret-a", nil, "", "GET", "/state", 503},
		{"another namespace", "secret-e", nil, "", "GET", "/state", 403},
		{"another namespace, events", "secret-e", nil, "", "GET", "/events", 403},
		{"certificate", "", ours, "machine", "GET", "/state", 503},
		{"certificate, scope", "", ours, "machine", "PATCH", "/containers/c", 403},
		{"certificate of nobody", "", ours, "stranger", "GET", "/state", 401},
		{"certificate of another authority", "", theirs, "machine", "GET", "/state", 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := &tls.Config{RootCAs: ours.pool}
			if tt.cert != nil {
				// Whatever authorities the server says that it takes.
				cert := tt.cert.certificate(t, tt.certName)
				c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil }
			}
			transport := &http.Transport{TLSClientConfig: c}
			defer transport.CloseIdleConnections()
			r, err := http.NewRequest(tt.method, "https://"+l.Addr().String()+tt.path, nil)
			if err != nil {
				t.Fatal(err)
			}
			if tt.token != "" {
				r.Header.Set("Authorization", "Bearer "+tt.token)
			}
			answer, err := transport.RoundTrip(r)
			if err != nil {
				if tt.status != 0 {
					t.Fatal(err)
				}
				return
			}
			defer answer.Body.Close()
			body, _ := io.ReadAll(answer.Body)
			if answer.StatusCode != tt.status {
				t.Errorf("%d %s, want %d", answer.StatusCode, body, tt.status)
			}
			if strings.Contains(string(body), "secret-") {
				t.Errorf("the answer has the token: %s", body)
			}
		})
	}
	if text := log.String(); !strings.Contains(text, "msg=audit who=saver method=POST path=/containers/c/checkpoint/x status=503") ||
		!strings.Contains(text, "who=reader method=PATCH path=/containers/c status=403") || strings.Contains(text, "secret-") || strings.Contains(text, "path=/state status") {
		t.Errorf("log:\n%s", text)
	}
}

// TestUnknownConnections: a server that does not tell how a request came lets nobody in.
func TestUnknownConnections(t *testing.T) {
	s, _ := newTestServer(t)
	server := httptest.NewServer(s)
	defer server.Close()
	answer, err := http.Get(server.URL + "/state")
	if err != nil {
		t.Fatal(err)
	}
	answer.Body.Close()
	if answer.StatusCode != 401 {
		t.Errorf("%d, want 401", answer.StatusCode)
	}
}

// TestBrowsers: a page of somebody else's in a browser on this host does not get at a
// listener on loopback.
func TestBrowsers(t *testing.T) {
	s, _ := newTestServer(t)
	l, err := Listen("tcp://127.0.0.1:0", ListenOptions{InsecureLoopback: true})
	if err != nil {
		t.Fatal(err)
	}
	serveOn(t, s, l)
	for _, tt := range []struct {
		name, method, host string
		header             [2]string
		status             int
	}{
		{"a program", "GET", "", [2]string{}, 503},
		{"localhost", "GET", "localhost:8888", [2]string{}, 503},
		{"a name that leads here", "GET", "evil.example:8888", [2]string{}, 401},
		{"another origin", "PATCH", "", [2]string{"Origin", "https://evil.example"}, 403},
		{"another site", "PATCH", "", [2]string{"Sec-Fetch-Site", "cross-site"}, 403},
	} {
		r, err := http.NewRequest(tt.method, "http://"+l.Addr().String()+"/state", nil)
		if err != nil {
			t.Fatal(err)
		}
		if tt.method == "PATCH" {
			r.URL.Path = "/containers/c"
		}
		r.Host = tt.host
		if tt.header[0] != "" {
			r.Header.Set(tt.header[0], tt.header[1])
		}
		answer, err := http.DefaultTransport.RoundTrip(r)
		if err != nil {
			t.Fatal(err)
		}
		answer.Body.Close()
		if answer.StatusCode != tt.status {
			t.Errorf("%s: %d, want %d", tt.name, answer.StatusCode, tt.status)
		}
	}
}

func TestListen(t *testing.T) {
	dir := t.TempDir()
	for _, address := range []string{"tcp://127.0.0.1:0", "tcp://0.0.0.0:0", "http://127.0.0.1:0", "unix://relative", "/path", "tcp://127.0.0.1", ":8888", ""} {
		if l, err := Listen(address, ListenOptions{}); err == nil {
			l.Close()
			t.Errorf("%q is listened on without TLS", address)
		}
	}
	for _, address := range []string{"tcp://0.0.0.0:0", "tcp://[::]:0", "tcp://:0", "tcp://192.0.2.1:0"} {
		if l, err := Listen(address, ListenOptions{InsecureLoopback: true}); err == nil || !strings.Contains(err.Error(), "TLS") {
			if l != nil {
				l.Close()
			}
			t.Errorf("%q: %v; want that it needs TLS", address, err)
		}
	}

	socket := filepath.Join(dir, "run", "s.sock")
	l, err := Listen("unix://"+socket, ListenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(socket); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("socket %v, %v; want mode 0600", info, err)
	}
	if _, err := Listen("unix://"+socket, ListenOptions{}); err == nil {
		t.Error("two listen on one socket")
	}
	l.Close()
	if _, err := os.Lstat(socket); err == nil {
		t.Error("the socket is left")
	}
	// One that a process which was killed has left.
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false)
	stale.Close()
	if l, err = Listen("unix://"+socket, ListenOptions{}); err != nil {
		t.Fatal(err)
	}
	l.Close()
	// A file of somebody's is not replaced.
	if err := os.WriteFile(socket, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen("unix://"+socket, ListenOptions{}); err == nil {
		t.Error("a file is replaced by a socket")
	}
}

// TestIdleConnections: clients who only connect keep nobody out.
func TestIdleConnections(t *testing.T) {
	s, _ := newTestServer(t)
	socket := filepath.Join(t.TempDir(), "s.sock")
	l, err := Listen("unix://"+socket, ListenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	serveOn(t, s, l)
	var idle []net.Conn
	for range maxIdle + 10 {
		conn, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		idle = append(idle, conn)
	}
	client := &http.Client{Transport: &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return net.Dial("unix", socket) }}}
	answer, err := client.Get("http://node/state")
	if err != nil {
		t.Fatal(err)
	}
	answer.Body.Close()
	client.CloseIdleConnections()
	if answer.StatusCode != 503 {
		t.Errorf("%d, want 503", answer.StatusCode)
	}
	_ = idle[0].SetReadDeadline(time.Now().Add(time.Minute))
	if _, err := idle[0].Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the oldest: %v, want that it is closed", err)
	}
}

// TestSlowBody: a client that does not send what it promised is given up, whoever it is
// and whatever it asks for.
func TestSlowBody(t *testing.T) {
	s, _ := newTestServer(t)
	socket := filepath.Join(t.TempDir(), "s.sock")
	l, err := Listen("unix://"+socket, ListenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	server := Serve(s)
	server.Handler = timed(s, 10*time.Millisecond)
	go func() { _ = server.Serve(l) }()
	defer server.Close()
	for request, status := range map[string]string{
		"POST /containers/c": "400",
		"POST /nosuch":       "404",
		"GET /metrics":       "200",
		"GET /state":         "503",
	} {
		conn, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(conn, request+" HTTP/1.1\r\nHost: node\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"); err != nil {
			t.Fatal(err)
		}
		_ = conn.SetReadDeadline(time.Now().Add(20 * time.Second))
		answer, err := io.ReadAll(conn)
		if err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 "+status) {
			t.Errorf("%s: answer %.200q, %v; want %s and the end of the connection", request, answer, err, status)
		}
		conn.Close()
	}
}

// TestStateIsLocked: two servers do not share a state folder.
func TestStateIsLocked(t *testing.T) {
	o := Options{Namespace: "test", State: t.TempDir(), Log: slog.New(slog.DiscardHandler)}
	first, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := New(o); err == nil || !strings.Contains(err.Error(), "another stasisd") {
		t.Errorf("a second: %v", err)
	}
	first.Close()
	second, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	second.Close()
}

// TestBundlesInBundles: what a container can write is no bundle, and no output goes there.
func TestBundlesInBundles(t *testing.T) {
	dir := t.TempDir()
	in := filepath.Join(dir, "redis", "rootfs", "tmp", "b")
	if err := os.MkdirAll(in, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{in, filepath.Join(dir, "redis")} {
		if err := os.WriteFile(filepath.Join(d, node.BundleConfig), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	p := paths{dir}
	if got, err := p.bundle("bundlePath", filepath.Join(dir, "redis")); err != nil || got != filepath.Join(dir, "redis") {
		t.Errorf("%s, %v", got, err)
	}
	if _, err := p.output("stdout", filepath.Join(dir, "out.log")); err != nil {
		t.Error(err)
	}
	if _, err := p.bundle("bundlePath", in); !errdefs.IsPermissionDenied(err) {
		t.Errorf("a bundle in a bundle: %v", err)
	}
	for _, out := range []string{filepath.Join(dir, node.BundleConfig), filepath.Join(dir, "redis", "out"), filepath.Join(dir, "redis", "rootfs", "etc-passwd"), filepath.Join(in, "x")} {
		if _, err := p.output("stdout", out); !errdefs.IsPermissionDenied(err) {
			t.Errorf("output to %s: %v", out, err)
		}
	}
}

func TestPaths(t *testing.T) {
	dir := t.TempDir()
	in, out := filepath.Join(dir, "in"), filepath.Join(dir, "out")
	for _, d := range []string{in, out, filepath.Join(in, "sub"), filepath.Join(dir, "in-too")} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for link, target := range map[string]string{filepath.Join(in, "leave"): out, filepath.Join(dir, "enter"): in, filepath.Join(in, "dangling"): filepath.Join(out, "none")} {
		if err := os.Symlink(target, link); err != nil {
			t.Fatal(err)
		}
	}
	p := paths{in}
	for path, want := range map[string]string{
		in:                                    in,
		filepath.Join(in, "sub"):              filepath.Join(in, "sub"),
		in + "/sub/../sub/":                   filepath.Join(in, "sub"),
		filepath.Join(in, "new"):              filepath.Join(in, "new"),
		filepath.Join(dir, "enter/sub/new"):   filepath.Join(in, "sub/new"),
		out:                                   "",
		filepath.Join(dir, "in-too"):          "",
		in + "/../out":                        "",
		filepath.Join(in, "leave"):            "",
		filepath.Join(in, "leave/new"):        "",
		filepath.Join(in, "none/new"):         "",
		filepath.Join(in, "sub") + "/../../x": "",
		"/":                                   "",
	} {
		got, err := p.resolve("f", path)
		if got != want || (want == "" && !errdefs.IsPermissionDenied(err)) {
			t.Errorf("%s: %q, %v; want %q", path, got, err, want)
		}
	}
	// What a link names that leads nowhere would be made by whoever writes to it.
	if got, err := p.resolve("f", filepath.Join(in, "dangling")); err == nil && got != filepath.Join(in, "dangling") {
		t.Errorf("a dangling link leads to %s", got)
	}
	for _, path := range []string{"", "in", "./in", in + "\x00"} {
		if _, err := p.resolve("f", path); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v, want an invalid argument", path, err)
		}
	}
	if _, err := (paths(nil)).resolve("f", in); !errdefs.IsPermissionDenied(err) {
		t.Errorf("nothing is allowed: %v", err)
	}
}

func TestClientsAreChecked(t *testing.T) {
	good := Client{Name: "c", Token: HashToken("t"), Scopes: []Scope{ScopeRead}, Namespaces: []string{"*"}}
	for name, change := range map[string]func(*Client){
		"name":       func(c *Client) { c.Name = "" },
		"either":     func(c *Client) { c.Certificate = "x" },
		"or":         func(c *Client) { c.Token = "" },
		"sha256":     func(c *Client) { c.Token = "the token itself" },
		"scopes":     func(c *Client) { c.Scopes = nil },
		"none of":    func(c *Client) { c.Scopes = []Scope{"all"} },
		"namespaces": func(c *Client) { c.Namespaces = nil },
		"two of":     func(*Client) {},
	} {
		bad := good
		change(&bad)
		_, err := New(Options{Namespace: "test", Clients: []Client{good, bad}})
		if err == nil {
			t.Errorf("%s: %+v is taken", name, bad)
		}
	}
	if _, err := New(Options{Namespace: "../x"}); err == nil {
		t.Error("namespace ../x is taken")
	}
}

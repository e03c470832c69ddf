package rest

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Scope is what a client may do.
type Scope string

// Scopes. ScopeAdmin includes the others.
const (
	ScopeRead       Scope = "read"       // look at containers, checkpoints, events
	ScopeCheckpoint Scope = "checkpoint" // make and delete checkpoints
	ScopeRestore    Scope = "restore"    // start containers from checkpoints
	ScopeExec       Scope = "exec"       // start containers and processes, signal and pause them
	ScopeAdmin      Scope = "admin"
)

var scopes = []Scope{ScopeRead, ScopeCheckpoint, ScopeRestore, ScopeExec, ScopeAdmin}

// Client is somebody who may use the interface by TLS. It shows a token, or a certificate
// that the listener's authority has signed.
type Client struct {
	// Name is what the log calls it.
	Name string `toml:"name"`
	// Token is "sha256:" and the hexadecimal SHA-256 sum of its token; see NewToken.
	Token string `toml:"token,omitempty"`
	// Certificate is the common name in its certificate.
	Certificate string  `toml:"certificate,omitempty"`
	Scopes      []Scope `toml:"scopes"`
	// Namespaces are containerd's, or "*".
	Namespaces []string `toml:"namespaces"`
}

const tokenPrefix = "sha256:"

// HashToken is what Client.Token is of a token. A token has 128 bits from a random
// generator, which nobody can try out, so one plain sum is enough.
func HashToken(token string) string {
	sum := sha256.Sum256([]byte(token))
	return tokenPrefix + hex.EncodeToString(sum[:])
}

// check says what is wrong with a client.
func (c *Client) check() error {
	if c.Name == "" {
		return errors.New("name is empty")
	}
	if (c.Token == "") == (c.Certificate == "") {
		return errors.New("either token or certificate")
	}
	if sum, ok := strings.CutPrefix(c.Token, tokenPrefix); c.Token != "" {
		if b, err := hex.DecodeString(sum); !ok || err != nil || len(b) != sha256.Size {
			return errors.New(`token: it is "sha256:" and 64 hexadecimal digits, as "stasisd token" prints`)
		}
	}
	if len(c.Scopes) == 0 {
		return errors.New("scopes is empty, so it may do nothing")
	}
	for _, s := range c.Scopes {
		if !slices.Contains(scopes, s) {
			return fmt.Errorf("scopes: %q is none of %q", s, scopes)
		}
	}
	if len(c.Namespaces) == 0 {
		return errors.New(`namespaces is empty, so it may do nothing; ["*"] are all`)
	}
	return nil
}

// caller is who makes a request.
type caller struct {
	name string
	// all: it may do everything, as root of this host can anyway.
	all    bool
	client *Client
}

// may tells whether the caller has a scope in one of containerd's namespaces; "" is for
// what belongs to none.
func (c *caller) may(scope Scope, namespace string) bool {
	if c.all {
		return true
	}
	if !slices.Contains(c.client.Scopes, scope) && !slices.Contains(c.client.Scopes, ScopeAdmin) {
		return false
	}
	return namespace == "" || slices.Contains(c.client.Namespaces, namespace) || slices.Contains(c.client.Namespaces, "*")
}

// everywhere tells whether what the caller may do, it may do in all namespaces.
func (c *caller) everywhere() bool { return c.all || slices.Contains(c.client.Namespaces, "*") }

// callerKey is for the caller that a request was let in as, in its context.
type callerKey struct{}

func callerIn(ctx context.Context) *caller { return ctx.Value(callerKey{}).(*caller) }

// connKey is for what a connection alone says of the caller.
type connKey struct{}

// ConnContext is for http.Server.ConnContext: requests that came by another server are
// refused. A Unix socket's own mode decides who may use it, so whoever could connect may
// do everything; so may whoever connects to a plain TCP listener, which Listen makes on
// loopback only.
func ConnContext(ctx context.Context, conn net.Conn) context.Context {
	if _, ok := conn.(*tls.Conn); ok {
		return context.WithValue(ctx, connKey{}, &caller{})
	}
	switch c := conn.(type) {
	case *net.UnixConn:
		return context.WithValue(ctx, connKey{}, &caller{name: peer(c), all: true})
	case *net.TCPConn:
		if a, ok := c.LocalAddr().(*net.TCPAddr); ok && a.IP.IsLoopback() {
			return context.WithValue(ctx, connKey{}, &caller{name: "loopback " + c.RemoteAddr().String(), all: true})
		}
	}
	return ctx
}

// peer names who is at the other end of a Unix socket.
func peer(c *net.UnixConn) string {
	name := "unix"
	raw, err := c.SyscallConn()
	if err != nil {
		return name
	}
	_ = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			name = fmt.Sprintf("unix uid %d pid %d", cred.Uid, cred.Pid)
		}
	})
	return name
}

var errUnauthorized = errors.New("a token (Authorization: Bearer TOKEN) or a client certificate is needed, which the configuration of stasisd names")

// callerOf finds out who makes a request.
func (s *server) callerOf(r *http.Request) (*caller, error) {
	c, ok := r.Context().Value(connKey{}).(*caller)
	if !ok {
		return nil, errUnauthorized
	}
	if c.all {
		// A name of another host that leads here is how a page in a browser reaches a
		// service on loopback.
		if r.TLS == nil && strings.HasPrefix(c.name, "loopback") && !isLoopback(r.Host) {
			return nil, fmt.Errorf("host %q is not this one", r.Host)
		}
		return c, nil
	}
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if strings.EqualFold(scheme, "Bearer") && token != "" {
		hash := []byte(HashToken(strings.TrimSpace(token)))
		for i := range s.o.Clients {
			if client := &s.o.Clients[i]; subtle.ConstantTimeCompare(hash, []byte(client.Token)) == 1 {
				return &caller{name: client.Name, client: client}, nil
			}
		}
		return nil, errUnauthorized
	}
	if r.TLS != nil && len(r.TLS.VerifiedChains) > 0 {
		name := r.TLS.VerifiedChains[0][0].Subject.CommonName
		for i := range s.o.Clients {
			if client := &s.o.Clients[i]; name != "" && client.Certificate == name {
				return &caller{name: client.Name, client: client}, nil
			}
		}
	}
	return nil, errUnauthorized
}

// isLoopback tells whether a Host header names this host's loopback.
func isLoopback(host string) bool {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	ip := net.ParseIP(strings.Trim(host, "[]"))
	return strings.EqualFold(host, "localhost") || ip != nil && ip.IsLoopback()
}

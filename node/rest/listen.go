package rest

import (
	"cmp"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/net/netutil"
	"golang.org/x/sys/unix"
)

// ListenOptions are those of Listen.
type ListenOptions struct {
	// TLS is what a TCP listener needs.
	TLS *tls.Config
	// InsecureLoopback has TCP listeners on loopback addresses do without: whoever can
	// connect, so every user and program of this host, may do everything.
	InsecureLoopback bool
}

// Listen listens on unix:///PATH, a socket that only root can use, or on tcp://ADDRESS:PORT.
func Listen(address string, o ListenOptions) (net.Listener, error) {
	u, err := url.Parse(address)
	if err != nil {
		return nil, fmt.Errorf("listen on %q: %w", address, err)
	}
	switch {
	case u.Scheme == "unix" && u.Host == "" && filepath.IsAbs(u.Path):
		l, err := listenUnix(u.Path)
		if err != nil {
			return nil, fmt.Errorf("listen on %s: %w", address, err)
		}
		return l, nil
	case u.Scheme == "tcp" && u.Port() != "" && u.Path == "":
		return listenTCP(address, u, o)
	}
	return nil, fmt.Errorf("listen on %q: it is unix:///PATH or tcp://ADDRESS:PORT", address)
}

// listenUnix makes the socket with mode 0600 in a folder of mode 0700 where that is not
// there. A socket that a process which was killed has left is replaced; one that is in
// use is not.
func listenUnix(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	if info, err := os.Lstat(path); err == nil && info.Mode()&fs.ModeSocket != 0 {
		conn, err := net.Dial("unix", path)
		if err == nil {
			conn.Close()
			return nil, errors.New("another process listens there")
		}
		if errors.Is(err, unix.ECONNREFUSED) {
			if err := os.Remove(path); err != nil {
				return nil, err
			}
		}
	}
	// Under a name that nobody looks for until it has its mode.
	fresh := path + ".new"
	if err := os.Remove(fresh); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: fresh, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	if err := errors.Join(os.Chmod(fresh, 0o600), os.Link(fresh, path), os.Remove(fresh)); err != nil {
		l.Close()
		return nil, err
	}
	return &unixListener{UnixListener: l, path: path}, nil
}

// unixListener removes its socket, which it has under another name.
type unixListener struct {
	*net.UnixListener
	path string
	once sync.Once
}

func (l *unixListener) Close() error {
	err := l.UnixListener.Close()
	l.once.Do(func() { err = cmp.Or(err, os.Remove(l.path)) })
	return err
}

func listenTCP(address string, u *url.URL, o ListenOptions) (net.Listener, error) {
	plain := o.InsecureLoopback && isLoopback(u.Host)
	if !plain && o.TLS == nil {
		return nil, fmt.Errorf("listen on %s: TCP needs TLS: configure tls.cert and tls.key", address)
	}
	l, err := net.Listen("tcp", u.Host)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", address, err)
	}
	if plain {
		return l, nil
	}
	return tls.NewListener(netutil.LimitListener(l, maxConnections), o.TLS), nil
}

// maxConnections bounds how many connections a TCP listener has.
const maxConnections = 4096

// bodyTime bounds how long a body may take to arrive, unless it is a stream.
const bodyTime = 30 * time.Second

// timed gives bodies their time. Else a body that does not come would hold a connection
// for ever, as the server reads what is left of it after the answer.
func timed(h http.Handler, within time.Duration) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength != 0 {
			rc := http.NewResponseController(w)
			_ = rc.SetReadDeadline(time.Now().Add(within))
			r.Body = &timedBody{r.Body, rc}
		}
		h.ServeHTTP(w, r)
	})
}

// timedBody ends the time when the body has come. Else the server would take the end of
// the time for a client that has gone away, and the request would be aborted.
type timedBody struct {
	io.ReadCloser
	rc *http.ResponseController
}

func (b *timedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if errors.Is(err, io.EOF) {
		_ = b.rc.SetReadDeadline(time.Time{})
	}
	return n, err
}

// Serve sets up a server for h, with bounds on what a client may keep it busy with.
func Serve(h http.Handler) *http.Server {
	c := &connections{}
	return &http.Server{
		Handler:           timed(h, bodyTime),
		ConnContext:       ConnContext,
		ConnState:         c.changed,
		ReadHeaderTimeout: 10 * time.Second, // also of the TLS handshake
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    64 << 10,
	}
}

// maxIdle bounds how many connections there are that have no request at work.
const maxIdle = 512

// connections closes those that have been idle for longest when there are too many, so
// that clients who only connect keep nobody out.
type connections struct {
	mu   sync.Mutex
	idle []net.Conn // the oldest first
}

func (c *connections) changed(conn net.Conn, state http.ConnState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if i := slices.Index(c.idle, conn); i >= 0 {
		c.idle = slices.Delete(c.idle, i, i+1)
	}
	if state != http.StateNew && state != http.StateIdle {
		return
	}
	c.idle = append(c.idle, conn)
	if len(c.idle) > maxIdle {
		// In the background: the end of a TLS connection is sent.
		go c.idle[0].Close()
		c.idle = c.idle[1:]
	}
}

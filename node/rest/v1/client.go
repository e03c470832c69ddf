package v1

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"
)

// Options are those of New.
type Options struct {
	// Namespace is containerd's; empty: "default".
	Namespace string
	// Token is sent with each request. It is refused where others could read it: a URL
	// without TLS that is not of this host.
	Token string
	// CA is a PEM file with the authority of the node's certificate; empty: the system's.
	// Cert and Key are PEM files with a certificate of the client's.
	CA, Cert, Key string
}

// Client talks to a stasisd.
type Client struct {
	base      url.URL
	namespace string
	token     string
	http      *http.Client
}

// DefaultSocket is where stasisd listens unless it is told otherwise.
const DefaultSocket = "/run/stasis/stasisd.sock"

// New returns a client of the stasisd at a URL: https://HOST:PORT, unix:///PATH, or
// http://HOST:PORT of this host.
func New(address string, o Options) (*Client, error) {
	u, err := url.Parse(address)
	if err != nil {
		return nil, err
	}
	address = u.Redacted() // for errors
	if u.Scheme != "unix" && strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "" || u.User != nil {
		return nil, fmt.Errorf("%s: it has more than a host and a port", address)
	}
	if u.Scheme != "https" && (o.CA != "" || o.Cert != "" || o.Key != "") {
		return nil, fmt.Errorf("%s: certificates are for https", address)
	}
	dialer := &net.Dialer{Timeout: dialTime}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.DialContext = dialer.DialContext
	switch {
	case u.Scheme == "unix" && u.Host == "" && u.Path != "":
		socket := u.Path
		transport.Proxy = nil
		transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", socket)
		}
		u = &url.URL{Scheme: "http", Host: "node"}
	case u.Scheme == "https" && u.Host != "":
		if transport.TLSClientConfig, err = o.tls(); err != nil {
			return nil, err
		}
	case u.Scheme == "http" && isLoopback(u.Hostname()):
		transport.Proxy = nil
	case u.Scheme == "http" && u.Host != "":
		return nil, fmt.Errorf("%s: stasisd is spoken to without TLS on its own host only; say https", address)
	default:
		return nil, fmt.Errorf("%s: it is https://HOST:PORT, unix:///PATH or http://localhost:PORT", address)
	}
	return &Client{
		base: url.URL{Scheme: u.Scheme, Host: u.Host}, namespace: cmp.Or(o.Namespace, "default"), token: o.Token,
		// A token goes to no other place than it was given for.
		http: &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }},
	}, nil
}

// Close closes connections that are idle.
func (c *Client) Close() { c.http.CloseIdleConnections() }

func isLoopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// tls is how the node is talked to.
func (o Options) tls() (*tls.Config, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if o.CA != "" {
		data, err := os.ReadFile(o.CA)
		if err != nil {
			return nil, err
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(data) {
			return nil, fmt.Errorf("%s has no certificate in PEM", o.CA)
		}
	}
	if (o.Cert == "") != (o.Key == "") {
		return nil, errors.New("a client's certificate needs its key, and the key its certificate")
	}
	if o.Cert != "" {
		pair, err := tls.LoadX509KeyPair(o.Cert, o.Key)
		if err != nil {
			return nil, fmt.Errorf("the client's certificate: %w", err)
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return config, nil
}

const (
	// dialTime bounds how long a connection takes.
	dialTime = 10 * time.Second
	// maxAnswer bounds an answer that is read as a whole, in bytes.
	maxAnswer = 64 << 20
	// answerTime bounds how long a request may take that is no stream: diff reads two
	// checkpoints.
	answerTime = 10 * time.Minute
)

// call makes a request whose body is in as JSON, if it is not nil, and reads the answer
// into out, if that is not nil.
func (c *Client) call(ctx context.Context, method, path string, query url.Values, in, out any) error {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	var body io.Reader
	if in != nil {
		data, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(data)
	}
	answer, err := c.do(ctx, method, path, query, body, "application/json")
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	data, err := io.ReadAll(io.LimitReader(answer.Body, maxAnswer+1))
	if err != nil {
		return c.failed(method, path, err)
	}
	if len(data) > maxAnswer {
		return c.failed(method, path, fmt.Errorf("the answer has more than %d bytes", maxAnswer))
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(data, out); err != nil {
		return c.failed(method, path, fmt.Errorf("the answer is not what stasisd would answer: %w", err))
	}
	return nil
}

// do makes a request. The error is a *Problem if the node has answered one. Else the
// answer's body is to be closed.
func (c *Client) do(ctx context.Context, method, path string, query url.Values, body io.Reader, contentType string) (*http.Response, error) {
	if query == nil {
		query = url.Values{}
	}
	query.Set("namespace", c.namespace)
	// path has its escapes: a slash of an image's name is none of the path.
	r, err := http.NewRequestWithContext(ctx, method, c.base.String()+path+"?"+query.Encode(), body)
	if err != nil {
		return nil, err
	}
	if body != nil {
		r.Header.Set("Content-Type", contentType)
	}
	if c.token != "" {
		r.Header.Set("Authorization", "Bearer "+c.token)
	}
	answer, err := c.http.Do(r)
	if err != nil {
		var u *url.Error
		if errors.As(err, &u) {
			err = u.Err // it has all of the URL
		}
		return nil, c.failed(method, path, err)
	}
	if answer.StatusCode < 300 {
		return answer, nil
	}
	defer answer.Body.Close()
	return nil, c.problem(answer, method, path)
}

// problem is the error that an answer tells.
func (c *Client) problem(answer *http.Response, method, path string) error {
	data, _ := io.ReadAll(io.LimitReader(answer.Body, 1<<20))
	p := &Problem{}
	if strings.HasPrefix(answer.Header.Get("Content-Type"), problemContent) && json.Unmarshal(data, p) == nil && p.Status != 0 {
		return p
	}
	return c.failed(method, path, fmt.Errorf("%s %.200q", answer.Status, strings.TrimSpace(string(data))))
}

// failed says of an error what was being done.
func (c *Client) failed(method, path string, err error) error {
	return fmt.Errorf("%s %s of stasisd at %s: %w", method, path, c.base.Host, err)
}

// image is an image as a part of a path.
func image(ref string) string { return "/v1/checkpoints/" + url.PathEscape(ref) }

// Containers lists containers.
func (c *Client) Containers(ctx context.Context) ([]Container, error) {
	var list ContainerList
	err := c.call(ctx, "GET", "/v1/containers", nil, nil, &list)
	return list.Items, err
}

// Check tells whether the node can checkpoint and restore.
func (c *Client) Check(ctx context.Context) ([]Finding, error) {
	var list FindingList
	err := c.call(ctx, "GET", "/v1/check", nil, nil, &list)
	return list.Items, err
}

// ListQuery says which checkpoints to list. What is empty does not matter.
type ListQuery struct {
	Container string // its name, its ID, or NAMESPACE/POD/NAME
	Format    string
}

// Checkpoints lists checkpoints, the newest first.
func (c *Client) Checkpoints(ctx context.Context, q ListQuery) ([]Checkpoint, error) {
	query := url.Values{"limit": {"1000"}}
	if q.Container != "" {
		query.Set("container", q.Container)
	}
	if q.Format != "" {
		query.Set("format", q.Format)
	}
	all, pages := []Checkpoint{}, map[string]bool{}
	for {
		var page CheckpointList
		if err := c.call(ctx, "GET", "/v1/checkpoints", query, nil, &page); err != nil {
			return nil, err
		}
		all = append(all, page.Items...)
		if page.Next == "" {
			return all, nil
		}
		if pages[page.Next] {
			return nil, c.failed("GET", "/v1/checkpoints", errors.New("a page comes twice"))
		}
		pages[page.Next] = true
		query.Set("after", page.Next)
	}
}

// Inspect tells what is in a checkpoint: what `stasis inspect --output json` prints; with
// secrets, the environment of its processes, too.
func (c *Client) Inspect(ctx context.Context, ref string, secrets bool) (json.RawMessage, error) {
	query := url.Values{}
	if secrets {
		query.Set("secrets", "true")
	}
	var report json.RawMessage
	err := c.call(ctx, "GET", image(ref), query, nil, &report)
	return report, err
}

// Diff tells what changed from one checkpoint to another: what `stasis diff --output json`
// prints.
func (c *Client) Diff(ctx context.Context, first, second string) (json.RawMessage, error) {
	var report json.RawMessage
	err := c.call(ctx, "GET", image(first)+"/diff", url.Values{"with": {second}}, nil, &report)
	return report, err
}

// Remove removes a checkpoint.
func (c *Client) Remove(ctx context.Context, ref string) error {
	return c.call(ctx, "DELETE", image(ref), nil, nil, nil)
}

// Export writes a checkpoint to w. Format is "archive", which is what "" means, or "oci";
// compression, of an archive, is "zstd", which is what "" means, "gzip" or "none". After
// an error, what was written is of no use.
func (c *Client) Export(ctx context.Context, ref, format, compression string, w io.Writer) error {
	query := url.Values{}
	if format != "" {
		query.Set("format", format)
	}
	if compression != "" {
		query.Set("compression", compression)
	}
	path := image(ref) + "/export"
	answer, err := c.do(ctx, "GET", path, query, nil, "")
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if _, err := io.Copy(w, answer.Body); err != nil {
		return c.failed("GET", path, err)
	}
	return nil
}

// Import makes images of a file: an archive, or an image in an OCI layout. ref names the
// image, and may be empty.
func (c *Client) Import(ctx context.Context, ref string, file io.Reader) (*ImageList, error) {
	query := url.Values{}
	if ref != "" {
		query.Set("ref", ref)
	}
	// Not to be closed by the transport, which the caller may be reading.
	answer, err := c.do(ctx, "POST", "/v1/imports", query, io.NopCloser(file), "application/octet-stream")
	if err != nil {
		return nil, err
	}
	defer answer.Body.Close()
	list := &ImageList{}
	if err := json.NewDecoder(io.LimitReader(answer.Body, maxAnswer)).Decode(list); err != nil {
		return nil, c.failed("POST", "/v1/imports", err)
	}
	return list, nil
}

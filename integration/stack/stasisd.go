package stack

import (
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// Stasisd is a stasisd of a Stack, on a Unix socket.
type Stasisd struct {
	Socket string

	s      *Stack
	args   []string
	daemon *Daemon
}

// StartStasisd runs stasisd with flags besides those for containerd, the namespace, the
// state folder and the socket, until the test ends.
func (s *Stack) StartStasisd(args ...string) *Stasisd {
	s.tb.Helper()
	d := &Stasisd{Socket: s.path("stasisd.sock"), s: s, args: args}
	d.Start()
	s.tb.Cleanup(func() {
		if d.daemon != nil {
			d.End(syscall.SIGTERM)
		}
	})
	return d
}

// Log is what it has logged.
func (d *Stasisd) Log() string {
	data, err := os.ReadFile(d.s.path("stasisd.log"))
	if err != nil {
		d.s.tb.Errorf("%v", err)
	}
	return string(data)
}

// Pid is its process.
func (d *Stasisd) Pid() int { return d.daemon.cmd.Process.Pid }

// Start runs it again after End, and waits until it serves.
func (d *Stasisd) Start() {
	s := d.s
	s.tb.Helper()
	shim, err := Shim()
	if err != nil {
		s.tb.Fatalf("%v", err)
	}
	args := append([]string{"--address", s.Address(), "--namespace", s.Namespace, "--state", s.path("stasis"), "--listen", "unix://" + d.Socket}, d.args...)
	if d.daemon, err = s.StartDaemon("stasisd", s.Command(context.Background(), filepath.Join(filepath.Dir(shim), "stasisd"), args...)); err != nil {
		s.tb.Fatalf("stasisd: %v", err)
	}
	ctx, cancel := context.WithTimeout(s.ctx, WaitTimeout())
	defer cancel()
	serves := func() bool {
		// It listens before it serves.
		conn, err := net.Dial("unix", d.Socket)
		if err == nil {
			conn.Close()
		}
		return err == nil && d.curl("GET", "/state", "") == nil
	}
	if err := poll(ctx, func() bool { return d.daemon.Exited() || serves() }); err != nil || d.daemon.Exited() {
		s.tb.Fatalf("stasisd does not serve: %v\n%s", err, tail(s.Logs(), 20))
	}
}

func (d *Stasisd) curl(method, path, body string) error {
	_, _, err := d.CurlErr(method, path, body)
	return err
}

// End ends it by a signal, and waits.
func (d *Stasisd) End(sig syscall.Signal) {
	d.s.tb.Helper()
	// The test's own context may have ended.
	ctx, cancel := context.WithTimeout(context.Background(), d.s.patience)
	defer cancel()
	if err := d.daemon.Signal(ctx, sig); err != nil {
		d.s.tb.Errorf("end stasisd: %v", err)
	}
	if sig == syscall.SIGTERM && d.daemon.err != nil {
		d.s.tb.Errorf("stasisd: %v\n%s", d.daemon.err, tail(d.s.Logs(), 20))
	}
	d.daemon = nil
}

// Curl makes a request by curl, and returns the status and the body of the answer.
func (d *Stasisd) Curl(method, path, body string) (status int, answer string) {
	d.s.tb.Helper()
	status, answer, err := d.CurlErr(method, path, body)
	if err != nil {
		d.s.tb.Fatalf("%v\n%s", err, tail(d.s.Logs(), 20))
	}
	return status, answer
}

// CurlErr is Curl for a request that may get no answer.
func (d *Stasisd) CurlErr(method, path, body string) (status int, answer string, err error) {
	args := []string{"-sS", "--unix-socket", d.Socket, "-X", method, "-w", "\n%{http_code}"}
	if body != "" {
		args = append(args, "-H", "Content-Type: application/json", "--data-binary", "@-")
	}
	cmd := exec.CommandContext(d.s.ctx, "curl", append(args, "http://node"+path)...)
	cmd.Stdin = strings.NewReader(body)
	out, err := cmd.Output()
	if err != nil {
		return 0, "", err
	}
	i := strings.LastIndexByte(string(out), '\n')
	status, err = strconv.Atoi(string(out[i+1:]))
	return status, string(out[:i]), err
}

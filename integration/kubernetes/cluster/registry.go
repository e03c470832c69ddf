package cluster

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/stasis-run/stasis/integration/stack"
)

// StartRegistry starts Debian's docker-registry at an address that all nodes reach,
// for as long as the test runs, and returns its host and port. It has no TLS, which
// nodes that have joined until now do not mind.
func (c *Cluster) StartRegistry(t *testing.T) string {
	t.Helper()
	host, err := c.startRegistry(t)
	if err != nil {
		t.Fatalf("registry: %v", err)
	}
	for _, n := range c.Nodes {
		n.WriteFile(t, "/etc/containerd/certs.d/"+host+"/hosts.toml", fmt.Sprintf("server = %q\n", "http://"+host))
	}
	return host
}

func (c *Cluster) startRegistry(t *testing.T) (string, error) {
	program, err := stack.Program("docker-registry")
	if err != nil {
		return "", err
	}
	// It cannot choose a port by itself.
	l, err := net.Listen("tcp", net.JoinHostPort(c.first.MachineNetns().HostAddr, "0"))
	if err != nil {
		return "", err
	}
	host := l.Addr().String()
	if err := l.Close(); err != nil {
		return "", err
	}
	config := filepath.Join(t.TempDir(), "config.yml")
	if err := os.WriteFile(config, fmt.Appendf(nil, `version: 0.1
storage: {filesystem: {rootdirectory: %q}}
http: {addr: %q}
log: {level: warn}
`, filepath.Dir(config), host), 0o600); err != nil {
		return "", err
	}
	cmd := exec.Command(program, "serve", config)
	cmd.Env = c.first.Env()
	d, err := c.first.StartDaemon("registry", cmd)
	if err != nil {
		return "", err
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), waitTimeout)
		defer cancel()
		if err := d.Signal(ctx, syscall.SIGTERM); err != nil {
			t.Errorf("stop the registry: %v", err)
		}
	})
	return host, c.wait(t.Context(), "the registry", func() error {
		conn, err := net.Dial("tcp", host)
		if err == nil {
			err = conn.Close()
		}
		return err
	})
}

// Package cluster runs a real Kubernetes for tests: etcd, the API server,
// controllers and scheduler of the module ../programs, and nodes that are machines
// of package stack, each with its kubelet, containerd and network. Everything lies
// in the folders of these stacks, and ends with the test.
package cluster

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/stasis-run/stasis/integration/stack"
)

// A Cluster is a Kubernetes.
type Cluster struct {
	Nodes []*Node

	tb      stack.TB
	first   *stack.Stack // the control plane's files are its
	server  string       // the URL of the API server
	daemons []*stack.Daemon
	api     api
}

// adminToken and nodeToken are what users and kubelets tell the API server. There
// is no one else who could reach it.
const adminToken = "admin"

func nodeToken(name string) string { return "kubelet-of-" + name }

// nodeNames are what the API server knows the tokens of.
var nodeNames = []string{"node-1", "node-2", "node-3", "node-4"}

// Start runs a cluster with one node, where Stasis is not installed yet, and
// arranges for it to be stopped when the test is over.
func Start(tb stack.TB) *Cluster {
	tb.Helper()
	c := &Cluster{tb: tb}
	c.first = newMachine(tb)
	// Before the machine is stopped, and after all else.
	tb.Cleanup(c.stop)
	if err := c.boot(); err != nil {
		tb.Fatalf("cluster: %v", err)
	}
	c.join(tb, c.first)
	return c
}

func (c *Cluster) path(elem ...string) string {
	return filepath.Join(append([]string{c.first.Dir, "control"}, elem...)...)
}

// boot starts the control plane.
func (c *Cluster) boot() error {
	ctx := c.first.Ctx()
	if err := os.Mkdir(c.path(), 0o700); err != nil {
		return err
	}
	addr := c.first.MachineNetns().HostAddr
	c.server = "https://" + net.JoinHostPort(addr, "6443")
	c.api = newAPI(c.server)
	if err := c.writeKeys(); err != nil {
		return err
	}
	tokens := adminToken + ",admin,admin,system:masters\n"
	for _, name := range nodeNames {
		tokens += fmt.Sprintf("%s,system:node:%s,%s,system:nodes\n", nodeToken(name), name, name)
	}
	if err := os.WriteFile(c.path("tokens.csv"), []byte(tokens), 0o600); err != nil {
		return err
	}
	if err := c.writeKubeconfig(c.path("kubeconfig"), adminToken); err != nil {
		return err
	}

	etcd, peer := "http://"+net.JoinHostPort(addr, "2379"), "http://"+net.JoinHostPort(addr, "2380")
	if err := c.start("etcd", "--data-dir", c.path("etcd"), "--unsafe-no-fsync",
		"--listen-client-urls", etcd, "--advertise-client-urls", etcd,
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", "default="+peer); err != nil {
		return err
	}
	if err := c.start("kube-apiserver",
		"--etcd-servers", etcd,
		"--bind-address", addr, "--secure-port", "6443", "--advertise-address", addr,
		"--cert-dir", c.path("certificates"),
		"--token-auth-file", c.path("tokens.csv"),
		"--authorization-mode", "Node,RBAC",
		"--enable-admission-plugins", "NodeRestriction",
		"--allow-privileged",
		"--service-account-issuer", "https://kubernetes.default.svc",
		"--service-account-key-file", c.path("account.pub"),
		"--service-account-signing-key-file", c.path("account.key"),
		"--service-cluster-ip-range", "10.0.0.0/24",
		"--kubelet-preferred-address-types", "InternalIP"); err != nil {
		return err
	}
	if err := c.wait(ctx, "the API server", func() error { return c.api.get(ctx, "/readyz", nil) }); err != nil {
		return err
	}
	if err := c.start("kube-controller-manager", "--kubeconfig", c.path("kubeconfig"), "--leader-elect=false", "--bind-address", addr,
		"--cert-dir", c.path("certificates"),
		"--root-ca-file", c.path("certificates", "apiserver.crt"),
		"--service-account-private-key-file", c.path("account.key")); err != nil {
		return err
	}
	return c.start("kube-scheduler", "--kubeconfig", c.path("kubeconfig"), "--leader-elect=false", "--bind-address", addr,
		"--cert-dir", c.path("certificates"))
}

// start starts a program of the control plane, in the network of the host.
func (c *Cluster) start(name string, args ...string) error {
	program, err := program(name)
	if err != nil {
		return err
	}
	cmd := exec.Command(program, args...)
	cmd.Env = c.first.Env()
	d, err := c.first.StartDaemon(name, cmd)
	if err != nil {
		return fmt.Errorf("start %s: %w", name, err)
	}
	c.daemons = append(c.daemons, d)
	return nil
}

// program is the path of a program of Kubernetes.
func program(name string) (string, error) {
	path, err := stack.Program(filepath.Join("..", "kubernetes", "bin", name))
	if errors.Is(err, os.ErrNotExist) {
		path, err = stack.Program(name)
	}
	if err != nil {
		return "", fmt.Errorf("%w --kubernetes", err)
	}
	return path, nil
}

// stop ends the control plane, after the nodes have left.
func (c *Cluster) stop() {
	ctx, cancel := context.WithTimeout(context.Background(), waitTimeout)
	defer cancel()
	for _, d := range slices.Backward(c.daemons) {
		if err := d.Signal(ctx, syscall.SIGTERM); err != nil {
			c.tb.Errorf("cluster: %v", err)
		}
	}
}

// report logs what tells most about a failure, on some of the nodes.
func (c *Cluster) report(ctx context.Context, nodes ...*Node) {
	for _, args := range []string{"get pods -A -o wide", "get events -A --sort-by=.metadata.creationTimestamp"} {
		out, _ := c.Command(ctx, strings.Fields(args)...).CombinedOutput()
		c.tb.Logf("kubectl %s:\n%s", args, tail(string(out), 60))
	}
	for _, n := range nodes {
		c.tb.Logf("%s: the kubelet's last words:\n%s", n.Name, tail(n.KubeletLog(), 30))
	}
}

func tail(text string, n int) string {
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	lines = lines[max(0, len(lines)-n):]
	for i, l := range lines {
		lines[i] = l[:min(len(l), 500)]
	}
	return strings.Join(lines, "\n")
}

// wait asks cond until it returns nil.
func (c *Cluster) wait(ctx context.Context, what string, cond func() error) error {
	ctx, cancel := context.WithTimeout(ctx, waitTimeout)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := cond()
		if err == nil {
			return nil
		}
		if c.broken() {
			return fmt.Errorf("wait for %s: a program of the cluster has ended: %w", what, err)
		}
		select {
		case <-c.first.Ctx().Done(): // so that there is time to clean up
			return fmt.Errorf("wait for %s: the time of all tests is up: %w", what, err)
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w: %w", what, ctx.Err(), err)
		case <-tick.C:
		}
	}
}

// broken tells whether a program has ended that should not.
func (c *Cluster) broken() bool {
	return slices.ContainsFunc(c.daemons, (*stack.Daemon).Exited) ||
		slices.ContainsFunc(c.Nodes, func(n *Node) bool { return n.kubelet != nil && n.kubelet.Exited() })
}

// waitTimeout ends waits for what takes seconds on an idle machine.
const waitTimeout = 3 * time.Minute

// writeKeys makes the key pair that service accounts' tokens are signed with.
func (c *Cluster) writeKeys() error {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err
	}
	for name, block := range map[string]*pem.Block{
		"account.key": {Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)},
		"account.pub": {Type: "PUBLIC KEY", Bytes: public},
	} {
		if err := os.WriteFile(c.path(name), pem.EncodeToMemory(block), 0o600); err != nil {
			return err
		}
	}
	return nil
}

func (c *Cluster) writeKubeconfig(path, token string) error {
	return os.WriteFile(path, fmt.Appendf(nil, `apiVersion: v1
kind: Config
clusters:
- name: test
  cluster: {server: %q, insecure-skip-tls-verify: true}
users:
- name: user
  user: {token: %q}
contexts:
- name: test
  context: {cluster: test, user: user}
current-context: test
`, c.server, token), 0o600)
}

package cluster

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/stasis-run/stasis/integration/stack"
)

// A Node is a machine that has joined a cluster.
type Node struct {
	*stack.Stack
	Name string
	// Addr is the node's address, where its kubelet serves at port 10250.
	Addr string

	tb      stack.TB
	c       *Cluster
	kubelet *stack.Daemon
}

func newMachine(tb stack.TB) *stack.Stack {
	return stack.Start(tb, stack.Options{CRI: true, Machine: true})
}

// AddNode runs another node, where Stasis is not installed yet, for as long as the
// test runs.
func (c *Cluster) AddNode(tb stack.TB) *Node {
	tb.Helper()
	return c.join(tb, newMachine(tb))
}

// join makes a node of a machine, and waits until it is ready.
func (c *Cluster) join(tb stack.TB, s *stack.Stack) *Node {
	tb.Helper()
	free := slices.IndexFunc(nodeNames, func(name string) bool {
		return !slices.ContainsFunc(c.Nodes, func(n *Node) bool { return n.Name == name })
	})
	if free < 0 {
		tb.Fatalf("cluster: it has as many nodes as it can")
	}
	n := &Node{Stack: s, Name: nodeNames[free], Addr: s.MachineNetns().Addr, tb: tb, c: c}
	c.Nodes = append(c.Nodes, n)
	// Before its stack is stopped.
	tb.Cleanup(n.leave)
	if err := n.boot(); err != nil {
		tb.Fatalf("cluster: %s: %v", n.Name, err)
	}
	return n
}

// boot starts the kubelet.
func (n *Node) boot() error {
	ctx := n.Ctx()
	kubelet, err := program("kubelet")
	if err != nil {
		return err
	}
	// What the sandboxes of pods are made from.
	n.CRIImage(ctx, stack.Pause)
	// The kubelet wants its control group to be there.
	for _, dir := range n.CgroupDirs() {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	kubeconfig := filepath.Join(n.Dir, "kubelet.kubeconfig")
	if err := n.c.writeKubeconfig(kubeconfig, nodeToken(n.Name)); err != nil {
		return err
	}
	resolv := filepath.Join(n.Dir, "resolv.conf")
	if err := os.WriteFile(resolv, []byte("nameserver 192.0.2.53\n"), 0o644); err != nil {
		return err
	}
	config := filepath.Join(n.Dir, "kubelet.yaml")
	// Less than a real one does: it asks no one who it is that calls, for no one else
	// can, does not mind swap and full disks, and restarts what crashes at once.
	if err := os.WriteFile(config, fmt.Appendf(nil, `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: %q
containerRuntimeEndpoint: %q
cgroupDriver: cgroupfs
cgroupRoot: %q
failCgroupV1: false
failSwapOn: false
enforceNodeAllocatable: []
evictionHard: {imagefs.available: "0%%", nodefs.available: "0%%", memory.available: "0%%"}
imageGCHighThresholdPercent: 100
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
resolvConf: %q
clusterDNS: [192.0.2.53]
registryPullQPS: 0
eventRecordQPS: 0
serializeImagePulls: false
crashLoopBackOff: {maxContainerRestartPeriod: 1s}
syncFrequency: 10s
volumePluginDir: /var/lib/kubelet/plugins/volume
`, n.Addr, n.CRISocket(), n.CgroupPath(""), resolv), 0o600); err != nil {
		return err
	}
	n.kubelet, err = n.StartDaemon("kubelet", n.Command(context.Background(), kubelet, "--config", config, "--kubeconfig", kubeconfig,
		"--hostname-override", n.Name, "--node-ip", n.Addr, "--v", "2"))
	if err != nil {
		return fmt.Errorf("start the kubelet: %w", err)
	}
	return n.c.wait(ctx, "the node to be ready", func() error {
		var node struct {
			Status struct{ Conditions []Condition }
		}
		if err := n.c.api.get(ctx, "/api/v1/nodes/"+n.Name, &node); err != nil {
			return err
		}
		if !isTrue(node.Status.Conditions, "Ready") {
			return fmt.Errorf("its conditions are %+v", node.Status.Conditions)
		}
		return nil
	})
}

// KubeletLog is what the kubelet has logged.
func (n *Node) KubeletLog() string {
	log, err := os.ReadFile(filepath.Join(n.Dir, "kubelet.log"))
	if err != nil {
		return err.Error()
	}
	return string(log)
}

// leave deletes the pods of the node, and stops its kubelet.
func (n *Node) leave() {
	ctx, cancel := context.WithTimeout(context.Background(), waitTimeout)
	defer cancel()
	if n.tb.Failed() {
		n.c.report(ctx, n)
	}
	if n.kubelet == nil {
		return
	}
	commands := [][]string{
		{"cordon", n.Name},
		{"delete", "pods", "--all-namespaces", "--field-selector=spec.nodeName=" + n.Name, "--grace-period=1", "--timeout=150s"},
		{"delete", "node", n.Name},
	}
	if len(n.c.Nodes) == 1 {
		// Or there were new pods for the ones that are deleted.
		makers := []string{"delete", "deployments,statefulsets,daemonsets,jobs", "--all", "--all-namespaces", "--timeout=150s"}
		commands = slices.Insert(commands, 0, makers)
	}
	for _, args := range commands {
		if out, err := n.c.Command(ctx, args...).CombinedOutput(); err != nil {
			n.tb.Errorf("cluster: kubectl %v: %v\n%s", args, err, out)
		}
	}
	if err := n.kubelet.Signal(ctx, syscall.SIGTERM); err != nil {
		n.tb.Errorf("cluster: stop the kubelet of %s: %v", n.Name, err)
	}
	n.c.Nodes = slices.DeleteFunc(n.c.Nodes, func(other *Node) bool { return other == n })
	// These it never removes. With a pod's in it, they stay, and the stack tells.
	for _, dir := range n.CgroupDirs() {
		for _, sub := range []string{"kubepods/besteffort", "kubepods/burstable", "kubepods"} {
			os.Remove(filepath.Join(dir, sub))
		}
	}
}

// Install installs Stasis as docs/kubernetes.md says, and its other kind of runtime
// entry, which is a comment in the drop-in, as handler stasis-own.
func (n *Node) Install(t *testing.T) {
	t.Helper()
	shim, err := stack.Shim()
	if err != nil {
		t.Fatal(err)
	}
	dropIn := filepath.Join(repository(t), "contrib/containerd/stasis.toml")
	n.run(t, "install", "-m", "0755", shim, filepath.Join(filepath.Dir(shim), "stasis"), "/usr/local/bin")
	n.run(t, "install", "-D", "-m", "0644", dropIn, "/etc/containerd/conf.d/stasis.toml")
	text, err := os.ReadFile(dropIn)
	if err != nil {
		t.Fatal(err)
	}
	_, own, ok := strings.Cut(string(text), "\n# Or as a type of its own")
	if !ok {
		t.Fatalf("%s has no entry as a type of its own", dropIn)
	}
	config := "version = 3\n"
	for line := range strings.Lines(own) {
		line = strings.TrimPrefix(line, "# ")
		if strings.HasPrefix(line, "[") || strings.HasPrefix(line, "  ") {
			config += line
		}
	}
	config = strings.ReplaceAll(config, "runtimes.stasis", "runtimes.stasis-own")
	// The cluster's kubelets have no systemd.
	config = strings.ReplaceAll(config, "SystemdCgroup = true", "SystemdCgroup = false")
	n.WriteFile(t, "/etc/containerd/conf.d/stasis-own.toml", config)
	// Its options name the node's configuration, so that it must be there.
	n.Configure(t, "")
	n.run(t, "systemctl", "restart", "containerd")
}

// Configure writes the node's configuration of Stasis. Empty, it has the defaults.
func (n *Node) Configure(t *testing.T, text string) {
	t.Helper()
	n.WriteFile(t, "/etc/stasis/config.toml", text)
}

// WriteFile writes a file of the node.
func (n *Node) WriteFile(t *testing.T, path, text string) {
	t.Helper()
	path = n.MachinePath(path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// Run runs a program on the node and returns what it printed on stdout. The error has
// what it printed on stderr.
func (n *Node) Run(ctx context.Context, args ...string) (string, error) {
	cmd := n.Command(ctx, args[0], args[1:]...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("%s: %s: %w\n%s", n.Name, strings.Join(args, " "), err, stderr.String())
	}
	return string(out), err
}

func (n *Node) run(t *testing.T, args ...string) {
	t.Helper()
	if _, err := n.Run(t.Context(), args...); err != nil {
		t.Fatal(err)
	}
}

// repository is the checkout that the test is in.
func repository(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

package stack

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// CRINamespace is the containerd namespace that Kubernetes' containers are in.
const CRINamespace = "k8s.io"

// Runtime handlers of a stack with Options.CRI, which pods name.
const (
	// HandlerStasis is Stasis under its own name.
	HandlerStasis = "stasis"
	// HandlerDropIn is Stasis as the binary behind io.containerd.runc.v2, for
	// which containerd passes checkpoint options on.
	HandlerDropIn = "stasis-dropin"
	// HandlerRunc is what containerd's PATH has as containerd-shim-runc-v2:
	// upstream's shim, unless Options.DropIn.
	HandlerRunc = "runc"
)

// criConfig writes the configuration of containerd's CRI plugin.
func (s *Stack) criConfig(b *strings.Builder) error {
	cni, err := s.cniConfig()
	if err != nil {
		return err
	}
	runtime := "io.containerd.cri.v1.runtime"
	if s.opts.Version == "1.7" {
		runtime = "io.containerd.grpc.v1.cri"
		fmt.Fprintf(b, `
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = %q
`, Pause)
	} else {
		fmt.Fprintf(b, `
[plugins."io.containerd.cri.v1.images"]
  snapshotter = %q
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = %q
[plugins."io.containerd.cri.v1.images".registry]
  config_path = "/etc/containerd/certs.d"
[plugins."io.containerd.cri.v1.runtime"]
`, s.opts.Snapshotter, Pause)
	}
	handlers := []struct{ name, kind, path string }{
		{HandlerStasis, "io.containerd.stasis.v1", ""},
		{HandlerDropIn, "io.containerd.runc.v2", s.bins.path[stasisShim]},
		{HandlerRunc, "io.containerd.runc.v2", ""},
	}
	if s.opts.Machine {
		handlers = handlers[2:]
	}
	// Who lacks CAP_SYS_RESOURCE may not lower its score.
	fmt.Fprintf(b, `
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
[plugins.%[1]q.cni]
  conf_dir = %[2]q
  %[3]s
[plugins.%[1]q.containerd]
  default_runtime_name = %[4]q
`, runtime, s.path("cni"), cni, handlers[0].name)
	for _, h := range handlers {
		fmt.Fprintf(b, `
[plugins.%[1]q.containerd.runtimes.%[2]s]
  runtime_type = %[3]q
  runtime_path = %[4]q
  pod_annotations = ["stasis.run/*"]
  container_annotations = ["stasis.run/*"]
[plugins.%[1]q.containerd.runtimes.%[2]s.options]
  BinaryName = %[5]q
  SystemdCgroup = %[6]v
`, runtime, h.name, h.kind, h.path, s.bins.runtime, s.opts.SystemdCgroup)
		if s.opts.NodeConfig != "" && h.name == HandlerStasis {
			fmt.Fprintf(b, "  StasisConfig = %q\n", s.NodeConfig())
		}
	}
	return nil
}

// NodeConfig returns the path of the file with Options.NodeConfig, which a test may
// write anew. Only HandlerStasis has it: the options of the other are runc's.
func (s *Stack) NodeConfig() string { return s.path("node.toml") }

// cniConfig writes the configuration of a bridge of the stack's own, and
// returns the line of containerd's that names the folder of the plugins.
func (s *Stack) cniConfig() (string, error) {
	plugins := "/usr/lib/cni"
	if _, err := os.Stat(filepath.Join(plugins, "bridge")); err != nil {
		plugins = "/opt/cni/bin"
	}
	if _, err := os.Stat(filepath.Join(plugins, "bridge")); err != nil {
		return "", fmt.Errorf("no CNI plugins: %w: run contrib/setup.sh", err)
	}
	if err := os.Mkdir(s.path("cni"), 0o700); err != nil {
		return "", err
	}
	// A net of our own in the range for carriers, which hosts do not have.
	number := s.claim("100.64.0.0/10", 1<<14)
	conf := fmt.Sprintf(`{
	"cniVersion": "1.0.0",
	"name": %q,
	"plugins": [{
		"type": "bridge",
		"bridge": %q,
		"isGateway": true,
		"ipam": {
			"type": "host-local",
			"dataDir": %q,
			"ranges": [[{"subnet": "100.%d.%d.0/24"}]],
			"routes": [{"dst": "0.0.0.0/0"}]
		}
	}]
}
`, dirPrefix+s.ID, bridge(s.ID), s.path("ipam"), 64+number>>8, number&0xff)
	key := fmt.Sprintf("bin_dirs = [%q]", plugins)
	if s.opts.Version == "1.7" {
		key = fmt.Sprintf("bin_dir = %q", plugins)
	}
	return key, os.WriteFile(s.path("cni", "10-stasis.conflist"), []byte(conf), 0o600)
}

// bridge is the name of a stack's bridge for pods.
func bridge(id string) string { return "st" + id + "b" }

// CRI returns clients of the stack's CRI.
func (s *Stack) CRI() (runtimeapi.RuntimeServiceClient, runtimeapi.ImageServiceClient) {
	conn := s.client.Conn().(grpc.ClientConnInterface)
	return runtimeapi.NewRuntimeServiceClient(conn), runtimeapi.NewImageServiceClient(conn)
}

// CRISocket returns where kubelet or crictl would connect to.
func (s *Stack) CRISocket() string { return "unix://" + s.Address() }

// CRIImage imports an image for the CRI and waits until that knows it.
func (s *Stack) CRIImage(ctx context.Context, name string) client.Image {
	s.tb.Helper()
	img := s.Image(namespaces.WithNamespace(ctx, CRINamespace), name)
	s.waitImage(ctx, name)
	return img
}

// CRIRootfs is ImportRootfs for the CRI.
func (s *Stack) CRIRootfs(ctx context.Context, name string, dirs ...string) {
	s.tb.Helper()
	s.ImportRootfs(namespaces.WithNamespace(ctx, CRINamespace), name, dirs...)
	s.waitImage(ctx, name)
}

func (s *Stack) waitImage(ctx context.Context, name string) {
	s.tb.Helper()
	_, images := s.CRI()
	s.Poll(ctx, "the CRI to know image "+name, func() bool {
		r, err := images.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: name}})
		return err == nil && r.Image != nil
	})
}

// A Pod is a pod sandbox of a stack with Options.CRI.
type Pod struct {
	ID     string
	Config *runtimeapi.PodSandboxConfig

	s *Stack
}

// runtime is the CRI's client, which is another after a Restart.
func (p *Pod) runtime() runtimeapi.RuntimeServiceClient {
	r, _ := p.s.CRI()
	return r
}

// RunPod runs a pod sandbox under the named runtime handler. Its config may be
// changed before: labels, annotations, namespaces.
func (s *Stack) RunPod(ctx context.Context, name, handler string, change ...func(*runtimeapi.PodSandboxConfig)) *Pod {
	s.tb.Helper()
	s.CRIImage(ctx, Pause)
	p := &Pod{s: s, Config: &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: name, Uid: name + "-" + s.ID, Namespace: "default"},
		Hostname:     name,
		LogDirectory: s.path("logs", name),
		Annotations:  map[string]string{},
		Labels:       map[string]string{},
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			CgroupParent:    s.cgroupParent(),
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: &runtimeapi.NamespaceOption{}},
		},
	}}
	for _, f := range change {
		f(p.Config)
	}
	p.label(p.Config.Labels)
	r, err := p.runtime().RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: p.Config, RuntimeHandler: handler})
	if err != nil {
		s.tb.Fatalf("pod %s: %v", name, err)
	}
	p.ID = r.PodSandboxId
	return p
}

// label adds the labels that the kubelet gives to all of a pod.
func (p *Pod) label(labels map[string]string) {
	for key, value := range map[string]string{
		"io.kubernetes.pod.name":      p.Config.Metadata.Name,
		"io.kubernetes.pod.namespace": p.Config.Metadata.Namespace,
		"io.kubernetes.pod.uid":       p.Config.Metadata.Uid,
	} {
		if labels[key] == "" {
			labels[key] = value
		}
	}
}

// CreateContainerErr makes a container of one of this package's images, or of
// any that the CRI knows, and returns its id. It is not started.
func (p *Pod) CreateContainerErr(ctx context.Context, name, image string, args []string, change ...func(*runtimeapi.ContainerConfig)) (string, error) {
	p.s.tb.Helper()
	p.s.CRIImage(ctx, image)
	config := &runtimeapi.ContainerConfig{
		Metadata:    &runtimeapi.ContainerMetadata{Name: name},
		Image:       &runtimeapi.ImageSpec{Image: image},
		Command:     args,
		LogPath:     name + ".log",
		Annotations: map[string]string{},
		Labels:      map[string]string{},
		Linux: &runtimeapi.LinuxContainerConfig{
			SecurityContext: &runtimeapi.LinuxContainerSecurityContext{NamespaceOptions: &runtimeapi.NamespaceOption{}},
		},
	}
	for _, f := range change {
		f(config)
	}
	p.label(config.Labels)
	config.Labels["io.kubernetes.container.name"] = name
	r, err := p.runtime().CreateContainer(ctx, &runtimeapi.CreateContainerRequest{
		PodSandboxId: p.ID, Config: config, SandboxConfig: p.Config,
	})
	if err != nil {
		return "", err
	}
	return r.ContainerId, nil
}

// RunContainerErr makes a container as CreateContainerErr does, starts it, and
// returns its id, which it has also if only the start fails.
func (p *Pod) RunContainerErr(ctx context.Context, name, image string, args []string, change ...func(*runtimeapi.ContainerConfig)) (string, error) {
	p.s.tb.Helper()
	id, err := p.CreateContainerErr(ctx, name, image, args, change...)
	if err == nil {
		_, err = p.runtime().StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id})
	}
	return id, err
}

// RunContainer is RunContainerErr for a container that must start.
func (p *Pod) RunContainer(ctx context.Context, name, image string, args []string, change ...func(*runtimeapi.ContainerConfig)) string {
	p.s.tb.Helper()
	id, err := p.RunContainerErr(ctx, name, image, args, change...)
	if err != nil {
		p.s.tb.Fatalf("pod %s: container %s: %v", p.Config.Metadata.Name, name, err)
	}
	return id
}

// Exec runs a process in a container, which must succeed, and returns what it
// wrote on stdout.
func (p *Pod) Exec(ctx context.Context, id string, args ...string) string {
	p.s.tb.Helper()
	r, err := p.runtime().ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: args})
	if err != nil {
		p.s.tb.Fatalf("pod %s: %q: %v", p.Config.Metadata.Name, args, err)
	} else if r.ExitCode != 0 {
		p.s.tb.Fatalf("pod %s: %q: exit code %d\n%s%s", p.Config.Metadata.Name, args, r.ExitCode, r.Stdout, r.Stderr)
	}
	return string(r.Stdout)
}

// Log returns the log of a container, in the CRI's format.
func (p *Pod) Log(name string) string {
	b, _ := os.ReadFile(filepath.Join(p.Config.LogDirectory, name+".log"))
	return string(b)
}

// Bundle returns the folder of a container's bundle.
func (p *Pod) Bundle(id string) string {
	return filepath.Join(p.s.StateDir(), "io.containerd.runtime.v2.task", CRINamespace, id)
}

// Status returns what the CRI knows of a container.
func (p *Pod) Status(ctx context.Context, id string) *runtimeapi.ContainerStatus {
	p.s.tb.Helper()
	r, err := p.runtime().ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id})
	if err != nil {
		p.s.tb.Fatalf("pod %s: %v", p.Config.Metadata.Name, err)
	}
	return r.Status
}

// StopContainer ends a container, by force after some seconds, and returns its exit
// code.
func (p *Pod) StopContainer(ctx context.Context, id string, grace int64) int32 {
	p.s.tb.Helper()
	if _, err := p.runtime().StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: grace}); err != nil {
		p.s.tb.Fatalf("pod %s: stop: %v", p.Config.Metadata.Name, err)
	}
	return p.Status(ctx, id).ExitCode
}

// RemoveContainer removes a container that does not run.
func (p *Pod) RemoveContainer(ctx context.Context, id string) {
	p.s.tb.Helper()
	if _, err := p.runtime().RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: id}); err != nil {
		p.s.tb.Fatalf("pod %s: remove: %v", p.Config.Metadata.Name, err)
	}
}

// IP returns the pod's address.
func (p *Pod) IP(ctx context.Context) string {
	p.s.tb.Helper()
	r, err := p.runtime().PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.ID})
	if err != nil {
		p.s.tb.Fatalf("pod %s: %v", p.Config.Metadata.Name, err)
	}
	return r.Status.GetNetwork().GetIp()
}

// Remove stops and removes the pod with its containers.
func (p *Pod) Remove(ctx context.Context) {
	p.s.tb.Helper()
	if err := p.RemoveErr(ctx); err != nil {
		p.s.tb.Fatalf("pod %s: %v", p.Config.Metadata.Name, err)
	}
}

// RemoveErr is Remove for a pod that may have to be removed again.
func (p *Pod) RemoveErr(ctx context.Context) error { return removePod(ctx, p.runtime(), p.ID) }

func removePod(ctx context.Context, r runtimeapi.RuntimeServiceClient, id string) error {
	stop := func() error {
		_, err := r.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: id})
		return err
	}
	err := stop()
	if err != nil && strings.HasSuffix(err.Error(), "ttrpc: closed: unknown") {
		// containerd 1.7 hangs up when it hears of the sandbox's exit, though it
		// may wait for the answer to its kill. A kubelet tries again, too.
		err = stop()
	}
	if err != nil {
		return fmt.Errorf("stop: %w", err)
	}
	if _, err := r.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: id}); err != nil {
		return fmt.Errorf("remove: %w", err)
	}
	return nil
}

// removePods removes all pods.
func (s *Stack) removePods(ctx context.Context) error {
	r, _ := s.CRI()
	pods, err := r.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return err
	}
	for _, p := range pods.Items {
		if err := removePod(ctx, r, p.Id); err != nil {
			return fmt.Errorf("pod %s: %w", p.Metadata.GetName(), err)
		}
	}
	return nil
}

package integration

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/pkg/oci"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/stasis-run/stasis/integration/stack"
)

// A cluster is the one node of a cluster without a kubelet: tests do what that
// would.
type cluster struct {
	t *testing.T
	*stack.Stack
	ctx context.Context
}

// newCluster starts one; its nodes' archives are in its folder archives.
func newCluster(t *testing.T, opts stack.Options, nodeConfig ...string) *cluster {
	t.Helper()
	opts.CRI = true
	opts.NodeConfig = "\n" // filled below
	c := &cluster{t: t, Stack: stack.Start(t, opts)}
	c.ctx = c.Ctx()
	must(t, os.Mkdir(c.archives(), 0o700))
	c.configure(nodeConfig...)
	return c
}

func (c *cluster) archives() string { return filepath.Join(c.Dir, "archives") }

// configure writes the node's configuration, with the folder for archives.
func (c *cluster) configure(lines ...string) {
	c.t.Helper()
	config := fmt.Sprintf("[restore]\narchives = [%q]\n", c.archives()) + strings.Join(lines, "\n")
	must(c.t, os.WriteFile(c.NodeConfig(), []byte(config), 0o600))
}

// annotated is a pod with annotations, given as keys and values.
func annotated(annotations ...string) func(*runtimeapi.PodSandboxConfig) {
	return func(p *runtimeapi.PodSandboxConfig) {
		for i := 0; i < len(annotations); i += 2 {
			p.Annotations["stasis.run/"+annotations[i]] = annotations[i+1]
		}
	}
}

func inNamespace(name string) func(*runtimeapi.PodSandboxConfig) {
	return func(p *runtimeapi.PodSandboxConfig) { p.Metadata.Namespace = name }
}

// Workload of the tests: it counts, and ends in good order by SIGTERM.
var countingPod = []string{"sh", "-c", `
	trap 'echo terminated; exit 7' TERM
	echo start >>/starts
	i=0
	while :; do i=$((i+1)); echo $i >/count; echo line $i; sleep 0.02; done`}

// stopGrace is how many seconds the workload may take to end in good order. It takes
// milliseconds on an idle machine.
const stopGrace = 60

// logged returns the numbers of the first and the last line in a container's log.
func logged(p *stack.Pod, name string) (first, last int) {
	for line := range strings.Lines(p.Log(name)) {
		_, number, ok := strings.Cut(line, "line ")
		if !ok || !strings.HasSuffix(line, "\n") {
			continue
		}
		var n int
		fmt.Sscan(number, &n)
		if first == 0 {
			first = n
		}
		last = n
	}
	return first, last
}

// runs waits until a container has logged that it goes on.
func (c *cluster) goesOn(p *stack.Pod, name string) {
	c.t.Helper()
	_, before := logged(p, name)
	c.Poll(c.ctx, name+" to go on", func() bool { _, last := logged(p, name); return last > before+2 })
}

// kubelet gives a container the mount by which the kubelet has a termination log,
// in the folder of its pod.
func (c *cluster) kubelet(p *stack.Pod, attempt int) func(*runtimeapi.ContainerConfig) {
	return func(config *runtimeapi.ContainerConfig) {
		c.t.Helper()
		dir := filepath.Join(c.Dir, "kubelet", "pods", p.Config.Metadata.Uid, "containers", config.Metadata.Name)
		must(c.t, os.MkdirAll(dir, 0o750))
		file := filepath.Join(dir, fmt.Sprintf("%08x", attempt))
		must(c.t, os.WriteFile(file, nil, 0o666))
		config.Metadata.Attempt = uint32(attempt)
		config.Mounts = append(config.Mounts, &runtimeapi.Mount{ContainerPath: "/dev/termination-log", HostPath: file})
		config.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_CONTAINER
	}
}

// checkpoint makes a checkpoint of a container and returns its name.
func (c *cluster) checkpoint(id, ref string) string {
	c.t.Helper()
	c.Stasis("--namespace", stack.CRINamespace, "checkpoint", id, ref)
	return ref
}

// archive makes an archive, as the kubelet does, and returns its path.
func (c *cluster) archive(id, name string) string {
	c.t.Helper()
	file := filepath.Join(c.archives(), name)
	runtime, _ := c.CRI()
	_, err := runtime.CheckpointContainer(c.ctx, &runtimeapi.CheckpointContainerRequest{ContainerId: id, Location: file})
	must(c.t, err)
	return file
}

// restored checks that a container goes on where the checkpoint was made, and is
// what the new pod says.
func (c *cluster) restored(p *stack.Pod, name, id string) {
	c.t.Helper()
	c.goesOn(p, name)
	if first, _ := logged(p, name); first < 3 {
		c.t.Errorf("%s: it counts from %d:\n%s", name, first, p.Log(name))
	}
	checkFresh(c, p, id, 1)
	if got := p.Exec(c.ctx, id, "hostname"); got != p.Config.Hostname+"\n" {
		c.t.Errorf("%s: its host is called %q", name, got)
	}
	c.nothingFetched()
}

// checkFresh checks how often the workload was started.
func checkFresh(c *cluster, p *stack.Pod, id string, starts int) {
	c.t.Helper()
	if n := strings.Count(p.Exec(c.ctx, id, "cat", "/starts"), "start"); n != starts {
		c.t.Errorf("it was started %d times, want %d", n, starts)
	}
}

// nothingFetched waits until no copy of a checkpoint is left: they are removed in
// the background.
func (c *cluster) nothingFetched() {
	c.t.Helper()
	c.Poll(c.ctx, "the copies of checkpoints to be removed", func() bool {
		left, err := filepath.Glob(filepath.Join(c.Dir, "root", "io.containerd.runtime.v2.task", "*", "*", "fetched"))
		must(c.t, err)
		return len(left) == 0
	})
}

// TestCRIRestore restores in pods of other names: by the image, by an annotation
// that names an image, and one that names an archive.
func TestCRIRestore(t *testing.T) {
	t.Parallel()
	for _, version := range []string{"2.4", "2.1", "1.7"} {
		t.Run(version, func(t *testing.T) {
			c := newCluster(t, stack.Options{Version: version})
			for _, handler := range []string{stack.HandlerStasis, stack.HandlerDropIn} {
				t.Run(handler, func(t *testing.T) {
					c.t = t
					first := c.RunPod(c.ctx, handler+"-first", handler)
					id := first.RunContainer(c.ctx, "app", stack.Busybox, countingPod, c.kubelet(first, 0))
					c.goesOn(first, "app")
					first.Exec(c.ctx, id, "sh", "-c", "echo changed >/etc/changed; rm /etc/group")
					ref := c.checkpoint(id, "stasis.test/"+handler+":cp")
					archive := ""
					// Of other runtimes than runc's, CRI takes none.
					if version == "2.4" && handler == stack.HandlerDropIn {
						archive = c.archive(id, handler+".tar")
					}
					if code := first.StopContainer(c.ctx, id, stopGrace); code != 7 {
						t.Errorf("stopped: exit code %d", code)
					}
					first.Remove(c.ctx)

					check := func(what, handler, image string, annotations ...string) {
						t.Helper()
						p := c.RunPod(c.ctx, what, handler, annotated(annotations...))
						id, err := p.RunContainerErr(c.ctx, "app", image, countingPod, c.kubelet(p, 0))
						if err != nil {
							t.Fatalf("%s: %v", what, err)
						}
						c.restored(p, "app", id)
						if out := p.Exec(c.ctx, id, "sh", "-c", "cat /etc/changed; ls /etc/group 2>/dev/null; ls -a / | grep stasis; true"); out != "changed\n" {
							t.Errorf("%s: files: %q", what, out)
						}
						runtime, _ := c.CRI()
						stats, err := runtime.ContainerStats(c.ctx, &runtimeapi.ContainerStatsRequest{ContainerId: id})
						if err != nil || stats.Stats.GetMemory().GetUsageBytes().GetValue() == 0 {
							t.Errorf("%s: statistics: %v, %v", what, stats, err)
						}
						if code := p.StopContainer(c.ctx, id, stopGrace); code != 7 {
							t.Errorf("%s: stopped: exit code %d", what, code)
						}
						if !strings.Contains(p.Log("app"), "terminated") {
							t.Errorf("%s: its last words are not in the log", what)
						}
						p.Remove(c.ctx)
					}
					check(handler+"-image", handler, ref)
					check(handler+"-name", handler, stack.Busybox, "restore-from", ref)
					if archive != "" {
						check(handler+"-file", stack.HandlerStasis, stack.Busybox, "restore-from.app", archive)
					}
				})
			}
			checkTidy(t, c.Stack)
		})
	}
}

// TestCRIRestoreCrun is the short of TestCRIRestore under crun.
func TestCRIRestoreCrun(t *testing.T) {
	t.Parallel()
	c := newCluster(t, stack.Options{Crun: true})
	ref := c.source("stasis.test/crun:cp")
	for name, tc := range map[string]struct {
		image       string
		annotations []string
	}{
		"image": {ref, nil},
		"name":  {stack.Busybox, []string{"restore-from", ref}},
	} {
		p := c.RunPod(c.ctx, name, stack.HandlerStasis, annotated(tc.annotations...))
		c.restored(p, "app", p.RunContainer(c.ctx, "app", tc.image, countingPod, c.kubelet(p, 0)))
		p.Remove(c.ctx)
	}
}

// TestAnnotationWithoutPod restores by an annotation what no pod has to do with.
// A container that is started once more is the same, with files that have changed
// since.
func TestAnnotationWithoutPod(t *testing.T) {
	t.Parallel()
	for _, snapshotter := range []string{"overlayfs", "native", "erofs"} {
		t.Run(snapshotter, func(t *testing.T) {
			s := stack.Start(t, stack.Options{Snapshotter: snapshotter})
			ctx := s.Ctx()
			c := s.NewContainer(ctx, "c", stack.Busybox, stack.Args(countingPod...))
			c.Start(ctx)
			c.Stdout.WaitFor(ctx, "line 3\n")
			s.Stasis("checkpoint", "c", "stasis.test/c:cp", "--exit")
			c.Wait(ctx)
			c.Delete(ctx)
			for name, policy := range map[string]string{"fresh": "fresh", "restore": "restore"} {
				d := s.NewContainer(ctx, name, stack.Busybox, stack.Args(countingPod...), oci.WithAnnotations(map[string]string{
					"stasis.run/restore-from": "stasis.test/c:cp", "stasis.run/restart": policy,
				}))
				d.Start(ctx)
				starts := func() int { return strings.Count(d.Exec(ctx, "cat", "/starts"), "start") }
				if n := starts(); n != 1 {
					t.Errorf("%s: restored, it has started %d times", name, n)
				}
				d.Kill(ctx, syscall.SIGKILL)
				d.DeleteTask(ctx)
				err := d.StartErr(ctx)
				if policy == "restore" {
					if err == nil || !strings.Contains(err.Error(), "its files have changed") {
						t.Errorf("restored again, onto other files: %v", err)
					}
					d.Task = nil
					d.Delete(ctx)
					continue
				}
				must(t, err)
				s.Poll(ctx, "a start afresh", func() bool { return starts() == 2 })
				d.Kill(ctx, syscall.SIGKILL)
				d.Delete(ctx)
			}
		})
	}
}

package integration

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/stasis-run/stasis/checkpoint/archive"
	"github.com/stasis-run/stasis/integration/stack"
)

// TestArchiveOfKubelet restores, outside of any pod, archives that containerd's
// CRI writes when the kubelet asks for a checkpoint: with upstream's shim and
// with ours.
func TestArchiveOfKubelet(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{CRI: true})
	ctx := s.Ctx()
	s.Image(ctx, stack.Probe)
	runtime, _ := s.CRI()
	for _, handler := range []string{stack.HandlerRunc, stack.HandlerDropIn} {
		t.Run(handler, func(t *testing.T) {
			s.CRIImage(ctx, stack.Probe)
			p := s.RunPod(ctx, handler, handler)
			// CRI has no options for sockets and locks, and its archive does not have
			// the pod's /dev/shm, where these two are.
			id := p.RunContainer(ctx, "probe", stack.Probe, []string{"/probe", "run", "-skip", "tcp,listen,udp,flock,fcntl,ofd,inotify,tmpfs"},
				func(c *runtimeapi.ContainerConfig) {
					// As the kubelet does: process IDs of its own.
					c.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_CONTAINER
				})
			s.Poll(ctx, "the probe in the pod", func() bool { return strings.Contains(p.Log("probe"), "ready") })
			p.Exec(ctx, id, "sh", "-c", "mkdir /new && echo new >/new/file && rm /etc/group && rm -r /var/tmp")
			file := filepath.Join(s.Dir, handler+".tar")
			if _, err := runtime.CheckpointContainer(ctx, &runtimeapi.CheckpointContainerRequest{ContainerId: id, Location: file}); err != nil {
				t.Fatal(err)
			}
			f, err := os.Open(file)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			dir := filepath.Join(s.Dir, "archive-"+handler)
			taken, err := archive.Read(ctx, f, dir, archive.Limits{})
			if err != nil {
				t.Fatal(err)
			}
			i := taken.Info
			if i.ContainerID != id || i.ContainerName != "probe" || i.Pod == nil || i.Pod.Name != handler || i.Engine.Name != "containerd" ||
				i.Runtime == "" || i.Base.Config == "" {
				t.Errorf("info %+v, pod %+v", i, i.Pod)
			}
			// The pod is gone, as on another host.
			p.Remove(ctx)
			for _, network := range []string{"", "none"} {
				if _, err := s.StasisErr("restore", file, "nowhere", "--network", network, "--allow-new-privs", "--allow-unmask", "all"); err == nil || !strings.Contains(err.Error(), "network namespace") {
					t.Errorf("restored with --network %q: %v", network, err)
				}
			}
			netns := s.NewNetns()
			c := restoreForeign(ctx, t, s, file, "from-"+handler, "--network", "join="+netns.Path, "--allow-new-privs", "--allow-unmask", "all")
			c.Probe(ctx)
			out := c.Exec(ctx, "sh", "-c", "cat /new/file; ls -d /etc/group /var/tmp 2>/dev/null; stat -c '%a %n' /etc/hosts /etc/resolv.conf; ip -o addr")
			if files, ok := strings.CutPrefix(out, "new\n644 /etc/hosts\n644 /etc/resolv.conf\n"); !ok || !strings.Contains(files, netns.Addr) {
				t.Errorf("files and addresses: %q", out)
			}
			c.Kill(ctx, syscall.SIGKILL)
			c.Delete(ctx)
		})
	}
	checkNoFiles(ctx, t, s)
	checkTidy(t, s)
}

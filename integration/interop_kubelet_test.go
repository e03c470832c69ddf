package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/client"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/stasis-run/stasis/checkpoint/archive"
	"github.com/stasis-run/stasis/integration/stack"
)

// TestArchiveOfKubelet restores, outside of any pod, archives that containerd's
// CRI writes when the kubelet asks for a checkpoint: with upstream's shim and
// with ours.
func TestArchiveOfKubelet(t *testing.T) {
	s := stack.Start(t, stack.Options{CRI: true})
	ctx := s.Ctx()
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
			c := s.NewContainer(ctx, "from-"+handler, stack.Probe, specOf(t, taken, dir), s.NewNetns().With())
			if err := c.Create(ctx, client.WithRestoreImagePath(taken.Images)); err != nil {
				t.Fatal(err)
			}
			applyLayer(ctx, t, taken.Layer, filepath.Join(c.Bundle(), "rootfs"))
			if err := c.Task.Start(ctx); err != nil {
				t.Fatalf("%v\n%s", err, c.CRIULog("restore", taken.Images))
			}
			c.Probe(ctx)
		})
	}
}

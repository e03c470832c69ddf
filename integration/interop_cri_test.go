package integration

import (
	"path/filepath"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/stasis-run/stasis/integration/stack"
)

// TestRunnableUnderCRI has a kubelet's containerd run a runnable image under
// upstream's shim: it starts afresh, on the files that were saved. containerd 2.1
// to 2.3 restore images that look like CRI-O's checkpoints by themselves, and
// would fail at this one if they took it for such.
func TestRunnableUnderCRI(t *testing.T) {
	t.Parallel()
	for _, version := range []string{"2.4", "2.1", "1.7"} {
		t.Run(version, func(t *testing.T) {
			s := stack.Start(t, stack.Options{Version: version, CRI: true})
			ctx := s.Ctx()
			c := s.NewContainer(ctx, "c", stack.Busybox, stack.Args("sh", "-c", "echo saved >/etc/saved; echo up; exec sleep 1000"))
			c.Start(ctx)
			c.Stdout.WaitFor(ctx, "up")
			const runnable, podmans = "stasis.test/cp:runnable", "stasis.test/cp:podman"
			s.Stasis("checkpoint", "c", runnable, "--exit")
			c.Wait(ctx)
			c.Delete(ctx)
			s.Stasis("convert", runnable, podmans, "--format", "podman")
			_, images := s.CRI()
			for _, ref := range []string{runnable, podmans} {
				file := filepath.Join(s.Dir, "layout.tar")
				s.Stasis("export", ref, file, "--format", "oci")
				s.Stasis("--namespace", stack.CRINamespace, "import", file)
				s.Poll(ctx, "the CRI to know "+ref, func() bool {
					r, err := images.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
					return err == nil && r.Image != nil
				})
			}
			p := s.RunPod(ctx, "pod", stack.HandlerRunc)
			id := p.RunContainer(ctx, "a", runnable, []string{"sh", "-c", "echo afresh on $(cat /etc/saved); exec sleep 1000"})
			s.Poll(ctx, "the container's log", func() bool { return strings.Contains(p.Log("a"), "afresh on saved") })
			if out := p.Exec(ctx, id, "cat", "/etc/saved"); out != "saved\n" {
				t.Errorf("exec printed %q", out)
			}
			// The other format shows that this one does look: it misses what a restore
			// needs.
			if _, err := p.CreateContainerErr(ctx, "b", podmans, []string{"sleep", "1"}); (err != nil) != (version == "2.1") {
				t.Errorf("Podman's format: %v", err)
			}
			p.Remove(ctx)
		})
	}
}

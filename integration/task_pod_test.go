package integration

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/oci"

	"github.com/stasis-run/stasis/integration/stack"
)

// TestOneShimPerPod checks that the containers of a group share a shim, which
// outlives each of them but not the last.
func TestOneShimPerPod(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		opts       stack.Options
		annotation string
	}{
		"sandbox":      {stack.Options{}, "io.kubernetes.cri.sandbox-id"},
		"group":        {stack.Options{}, "io.containerd.runc.v2.group"},
		"1.7, sandbox": {stack.Options{Version: "1.7", DropIn: true}, "io.kubernetes.cri.sandbox-id"},
	} {
		t.Run(name, func(t *testing.T) {
			s := stack.Start(t, tc.opts)
			ctx := s.Ctx()
			var pod []*stack.Container
			for _, id := range []string{"one", "two", "three"} {
				c := s.NewContainerWith(ctx, id, stack.Busybox,
					[]client.NewContainerOpts{client.WithContainerLabels(map[string]string{tc.annotation: "pod"})},
					stack.Args("sleep", "1000"), oci.WithAnnotations(map[string]string{tc.annotation: "pod"}))
				c.Start(ctx)
				pod = append(pod, c)
			}
			other := s.NewContainer(ctx, "other", stack.Busybox, stack.Args("sleep", "1000"))
			other.Start(ctx)

			shim := shimPid(t, pod[0])
			for _, c := range pod[1:] {
				if got := shimPid(t, c); got != shim {
					t.Errorf("container %s has shim %d, want %d", c.ID(), got, shim)
				}
			}
			if got := shimPid(t, other); got == shim {
				t.Errorf("a container of no group is in the pod's shim")
			}
			// The first one too, though the shim has its name.
			for i, c := range pod {
				c.Kill(ctx, syscall.SIGKILL)
				c.Delete(ctx)
				for _, left := range pod[i+1:] {
					if out := left.Exec(ctx, "echo", "alive"); out != "alive\n" {
						t.Errorf("exec in %s printed %q", left.ID(), out)
					}
				}
			}
			s.Poll(ctx, "the pod's shim to end", func() bool { return !runs(shim, "containerd-shim") })
			if out := other.Exec(ctx, "echo", "alive"); out != "alive\n" {
				t.Errorf("exec in the other container printed %q", out)
			}
		})
	}
}

// runs tells whether a process is there, and one of the program named.
func runs(pid int, program string) bool {
	cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return strings.Contains(string(cmdline), program)
}

// TestBadGroup checks that a group cannot lead out of the namespace's shims.
func TestBadGroup(t *testing.T) {
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	c := s.NewContainer(ctx, "c", stack.Busybox, oci.WithAnnotations(map[string]string{"io.kubernetes.cri.sandbox-id": "../other/pod"}))
	if err := c.Create(ctx); err == nil || !strings.Contains(err.Error(), "io.kubernetes.cri.sandbox-id") {
		t.Errorf("create: %v; want an error that names the annotation", err)
	}
}

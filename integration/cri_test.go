package integration

import (
	"strings"
	"testing"

	"github.com/stasis-run/stasis/integration/stack"
)

// TestSmokeCRI runs a pod of two containers under each runtime handler.
func TestSmokeCRI(t *testing.T) {
	t.Parallel()
	for _, version := range []string{"2.4", "2.1", "1.7"} {
		t.Run(version, func(t *testing.T) {
			s := stack.Start(t, stack.Options{Version: version, CRI: true})
			ctx := s.Ctx()
			for _, handler := range []string{stack.HandlerStasis, stack.HandlerDropIn, stack.HandlerRunc} {
				p := s.RunPod(ctx, handler, handler)
				if p.IP(ctx) == "" {
					t.Errorf("%s: the pod has no address", handler)
				}
				a := p.RunContainer(ctx, "a", stack.Busybox, []string{"sh", "-c", "echo hello; exec sleep 1000"})
				p.RunContainer(ctx, "b", stack.Busybox, []string{"sleep", "1000"})
				if out := p.Exec(ctx, a, "hostname"); out != handler+"\n" {
					t.Errorf("%s: exec printed %q", handler, out)
				}
				s.Poll(ctx, "the container's log", func() bool { return strings.Contains(p.Log("a"), "hello") })
				p.Remove(ctx)
			}
			// This one is left to the stack.
			s.RunPod(ctx, "left", stack.HandlerStasis).RunContainer(ctx, "a", stack.Busybox, []string{"sleep", "1000"})
		})
	}
}

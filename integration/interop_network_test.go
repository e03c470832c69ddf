package integration

import (
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/pkg/oci"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/stasis-run/stasis/integration/stack"
)

// TestRestoreNetwork restores a container into a network namespace that is not
// the one it was in, where CRIU can do that, and is told where it cannot.
func TestRestoreNetwork(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	first, second := s.NewNetns(), s.NewNetns()
	checkpointed := func(name string, opts ...oci.SpecOpts) string {
		c := s.NewContainer(ctx, name, stack.Busybox, append(opts, stack.Args("sleep", "1000"))...)
		c.Start(ctx)
		ref := "stasis.test/cp:" + name
		s.Stasis("checkpoint", name, ref, "--exit")
		c.Wait(ctx)
		c.Delete(ctx)
		return ref
	}
	refs := map[string]string{"own": checkpointed("own"), "made": checkpointed("made", first.With()), "host": checkpointed("host", oci.WithHostNamespace(specs.NetworkNamespace))}
	host, err := os.Readlink("/proc/self/ns/net")
	must(t, err)
	for _, c := range []struct {
		ref, network string
		refused      bool
		has          string // an address, or the host's namespace
	}{
		{"own", "none", false, ""}, {"own", "", false, ""}, {"own", "host", true, ""}, {"own", "join=" + second.Path, true, ""},
		{"made", "", false, first.Addr}, {"made", "join=" + second.Path, false, second.Addr}, {"made", "host", false, host}, {"made", "none", true, ""},
		{"host", "", false, host}, {"host", "host", false, host}, {"host", "none", true, ""}, {"host", "join=" + second.Path, true, ""},
	} {
		if c.refused {
			if _, err := s.StasisErr("restore", refs[c.ref], "nowhere", "--network", c.network); err == nil || !strings.Contains(err.Error(), "network namespace") {
				t.Errorf("%s, --network %q: %v", c.ref, c.network, err)
			}
			continue
		}
		r := restoreForeign(ctx, t, s, refs[c.ref], "again", "--network", c.network, "--allow-host", "network", "--allow-host", first.Path)
		out := r.Exec(ctx, "sh", "-c", "readlink /proc/1/ns/net; ip -o addr")
		if !strings.Contains(out, c.has) || strings.Contains(out, host) != (c.has == host) {
			t.Errorf("%s, --network %q: %s", c.ref, c.network, out)
		}
		if c.network == "host" {
			// The host's is not somebody's, so it is there for the next one, too.
			s.Stasis("checkpoint", "again", "stasis.test/cp:again")
			more := restoreForeign(ctx, t, s, "stasis.test/cp:again", "once-more", "--allow-host", "network", "--allow-host", "/proc/self/ns/net")
			more.Kill(ctx, syscall.SIGKILL)
			more.Delete(ctx)
		}
		r.Kill(ctx, syscall.SIGKILL)
		r.Delete(ctx)
	}
}

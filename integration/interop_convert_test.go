package integration

import (
	"fmt"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/stasis-run/stasis/integration/stack"
)

// TestConvertAndRestore takes a checkpoint from every format to every other, each
// from what the step before has made, and restores the last of each format.
func TestConvertAndRestore(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	c := startProbe(ctx, s, "c", stack.ProbeArgs("-skip", "tcp"))
	c.Exec(ctx, "sh", "-c", "mkdir -m 700 /new; echo new >/new/file; rm -r /var/tmp; mkdir /var/tmp; rm /etc/group; chmod 711 /")
	before := c.Probe(ctx)
	at := "stasis.test/cp:0"
	s.Stasis("checkpoint", "c", at, "--file-locks", "--exit")
	c.Wait(ctx)
	c.Delete(ctx)

	last := map[string]string{}
	// Each ordered pair of the four is in it once.
	for i, format := range []string{"index", "podman", "archive", "runnable", "podman", "runnable", "archive", "index", "archive", "podman", "index", "runnable"} {
		to := fmt.Sprintf("stasis.test/cp:%d", i+1)
		if format == "archive" {
			to = filepath.Join(s.Dir, fmt.Sprintf("%d.tar", i+1))
		}
		s.Stasis("convert", at, to, "--format", format, "--compress", []string{"none", "gzip", "zstd"}[i%3])
		at, last[format] = to, to
	}
	for format, from := range last {
		r := restoreForeign(ctx, t, s, from, format)
		checkSame(t, before, r.Probe(ctx))
		out := r.Exec(ctx, "sh", "-c", "cat /new/file; stat -c %a /new /; ls -A /var/tmp; ls -d /etc/group 2>/dev/null; true")
		if out != "new\n700\n711\n" {
			t.Errorf("%s: the root filesystem is %q", format, out)
		}
		r.Kill(ctx, syscall.SIGKILL)
		r.Delete(ctx)
	}
	checkTidy(t, s)
}

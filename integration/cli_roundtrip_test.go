package integration

import (
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/stasis-run/stasis/integration/stack"
)

// counting counts in memory and in a file, which is never behind by more than
// one, and leaves traces of every kind in its root filesystem.
const counting = `echo was > /changed; rm /etc/group; mkdir -p /d/e; ln /changed /d/e/hard; ln -s ../changed /d/soft
exec 3<>/open; echo held >&3; rm /open
i=0; while :; do i=$((i+1)); echo $i > /n.tmp; mv /n.tmp /n; done`

func count(t *testing.T, text string) int {
	t.Helper()
	n, err := strconv.Atoi(strings.TrimSpace(text))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestRoundTrip takes a container through the main job of the command line: a
// checkpoint as an image, and a restore under the same and another name.
func TestRoundTrip(t *testing.T) {
	t.Parallel()
	for name, opts := range map[string]stack.Options{
		"runc": {}, "crun": {Crun: true}, "native": {Snapshotter: "native"}, "erofs": {Snapshotter: "erofs"},
		"erofs of fixed size": {Snapshotter: "erofs", ExtraConfig: "[plugins.'io.containerd.snapshotter.v1.erofs']\ndefault_size = '128MiB'\n"},
		"blockfile":           {Snapshotter: "blockfile"},
		"1.7 drop-in":         {Version: "1.7", DropIn: true},
	} {
		t.Run(name, func(t *testing.T) {
			s := stack.Start(t, opts)
			ctx := s.Ctx()
			c := s.NewContainer(ctx, "c", stack.Busybox, stack.Args("sh", "-c", counting))
			c.Start(ctx)
			s.Poll(ctx, "the counter", func() bool {
				r, err := c.ExecErr(ctx, "cat", "/n")
				return err == nil && r.Code == 0 && r.Stdout != "1\n"
			})
			ref := strings.TrimSpace(s.Stasis("checkpoint", "c"))
			if !strings.HasPrefix(ref, "localhost/c:") {
				t.Errorf("REF %q", ref)
			}
			at := count(t, c.Exec(ctx, "cat", "/n"))
			c.Kill(ctx, syscall.SIGKILL)
			c.DeleteTask(ctx)

			args := []string{"restore", ref, "d", "--runtime", s.Runtime()}
			if opts.Snapshotter != "" {
				args = append(args, "--snapshotter", opts.Snapshotter)
			}
			if out := s.Stasis(args...); out != "d\n" {
				t.Errorf("restore printed %q", out)
			}
			container, err := s.Client().LoadContainer(ctx, "d")
			must(t, err)
			d := s.Wrap(container)
			d.Load(ctx)
			// The counter goes on from where it was, neither back at the start
			// nor where the other one has got to meanwhile.
			first := count(t, d.Exec(ctx, "cat", "/n"))
			if first < 2 {
				t.Errorf("the counter starts at %d", first)
			}
			_ = at
			s.Poll(ctx, "the counter", func() bool { return count(t, d.Exec(ctx, "cat", "/n")) > first })
			out := d.Exec(ctx, "sh", "-c", "cat /changed /d/e/hard /d/soft; stat -c %h /changed; ls -a / | grep -x .stasis; ls /etc/group; cat /proc/1/fd/3; true")
			if want := "was\nwas\nwas\n2\nheld\n"; out != want {
				t.Errorf("files: %q, want %q", out, want)
			}

			// A restored container can be checkpointed again.
			again := strings.TrimSpace(s.Stasis("checkpoint", "d", "again/d:1", "--exit", "--compress", "none"))
			d.Wait(ctx)
			d.Delete(ctx)
			s.Stasis(append([]string{"restore", again}, args[3:]...)...)
			container, err = s.Client().LoadContainer(ctx, "d")
			must(t, err)
			d = s.Wrap(container)
			d.Load(ctx)
			if out := d.Exec(ctx, "cat", "/changed", "/d/soft"); out != "was\nwas\n" {
				t.Errorf("after the second round: %q", out)
			}
			d.Kill(ctx, syscall.SIGKILL)
			d.Delete(ctx)
			c.Delete(ctx)
		})
	}
}

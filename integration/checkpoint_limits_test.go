package integration

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/cgroups/v3"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/pkg/oci"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/stasis-run/stasis/integration/stack"
)

// A limit is something that cannot be dumped, or not without more ado.
type limit struct {
	image string
	opts  []oci.SpecOpts
	asked *options.CheckpointOptions // of the dump that fails
	// says is the error, as docs/limits.md has it: … stands for anything.
	says string
	// With options or a configuration for CRIU, if there are any, it can be
	// dumped and restored.
	options *options.CheckpointOptions
	config  string
}

// TestLimits checks each row of the table in docs/limits.md: that CRIU fails with
// these words, that the container runs on, and that what to do helps.
func TestLimits(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	network := s.NewNetns()
	volume := filepath.Join(s.Dir, "volume")
	if err := os.Mkdir(volume, 0o755); err != nil {
		t.Fatal(err)
	}
	mount := oci.WithMounts([]specs.Mount{{Type: "bind", Source: volume, Destination: "/volume", Options: []string{"rbind"}}})
	python := func(script string) oci.SpecOpts {
		return stack.Args("python3", "-u", "-c", `
import ctypes, os, socket, time
libc = ctypes.CDLL(None)
`+script+`
print("ready")
time.sleep(1000)`)
	}
	shell := func(script string) oci.SpecOpts {
		return stack.Args("sh", "-c", script+"; echo ready; sleep 1000 & wait")
	}
	probe := func(item string) []oci.SpecOpts { return []oci.SpecOpts{stack.ProbeArgs("-items", item)} }
	nested := func(flag string) limit {
		// It has a namespace of its own when it has left the shell's.
		return limit{image: stack.Busybox, opts: []oci.SpecOpts{oci.WithPrivileged, shell(
			`unshare ` + flag + ` sh -c 'echo > /left; sleep 1000' & until [ -e /left ]; do :; done`)}}
	}
	with := func(l limit, says string) limit { l.says = says; return l }

	// A neighbour in the same pod, with sockets in a volume that they share.
	neighbour := s.NewContainer(ctx, "neighbour", stack.Python, network.With(), mount, python(`
for kind in "DGRAM", "STREAM":
    s = socket.socket(socket.AF_UNIX, getattr(socket, "SOCK_" + kind)); s.bind("/volume/" + kind)
    globals()[kind] = s
s.listen()
print("ready")
conns = []
while True: conns.append(s.accept()); print("accepted")`))
	neighbour.Start(ctx)
	neighbour.Stdout.WaitFor(ctx, "ready")
	connect := func(kind string) oci.SpecOpts {
		return python(`s = socket.socket(socket.AF_UNIX, socket.SOCK_` + kind + `); s.connect("/volume/` + kind + `")`)
	}

	limits := map[string]limit{
		"tcp": {image: stack.Probe, opts: probe("tcp"), options: &options.CheckpointOptions{OpenTcp: true},
			says: "Connected TCP socket, consider using --tcp-established option"},
		"file lock": {image: stack.Probe, opts: probe("flock"), options: &options.CheckpointOptions{FileLocks: true},
			says: noFileLocks},
		"unix datagram": {image: stack.Python, opts: []oci.SpecOpts{network.With(), mount, connect("DGRAM")},
			options: &options.CheckpointOptions{ExternalUnixSockets: true},
			says:    "External socket is used. Consider using --ext-unix-sk option."},
		"unix stream": {image: stack.Python, opts: []oci.SpecOpts{network.With(), mount, connect("STREAM")},
			asked: &options.CheckpointOptions{ExternalUnixSockets: true},
			says:  "Can't dump half of stream unix connection"},
		"unix datagram of another network": {image: stack.Python, opts: []oci.SpecOpts{mount, connect("DGRAM")},
			says: "Unix socket … without peer …"},
		"unix stream of another network": {image: stack.Python, opts: []oci.SpecOpts{mount, connect("STREAM")},
			asked: &options.CheckpointOptions{ExternalUnixSockets: true},
			says:  "Can't dump half of stream unix connection"},
		"deleted file": {image: stack.Busybox, opts: []oci.SpecOpts{shell("dd if=/dev/zero of=/f bs=1M count=3; exec 3</f; rm /f")},
			config: "ghost-limit 1G", says: "Can't dump ghost file … of … size, increase limit"},
		"deleted name": {image: stack.Probe, opts: probe("unlinked"), config: "link-remap",
			says: "Can't create link remap for … Use link-remap option."},
		"inotify": {image: stack.Probe, opts: probe("inotify-rootfs"), config: "force-irmap\nirmap-scan-path /var/probe",
			says: "Can't dump that handle"},
		"mptcp":   {image: stack.Probe, opts: probe("mptcp"), says: "Unsupported proto 262 for socket …"},
		"iouring": {image: stack.Probe, opts: probe("iouring"), says: "Can't retrieve FDs from socket"},
		"vsock": {image: stack.Python, opts: []oci.SpecOpts{oci.WithPrivileged, python(`s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)`)},
			says: "Unknown socket collected (family 40)"},
		"device": {image: stack.Busybox, opts: []oci.SpecOpts{oci.WithLinuxDevice("/dev/fuse", "rwm"), shell("exec 3<>/dev/fuse")},
			says: "Can't dump file … of that type … (chr …)"},
		"landlock": {image: stack.Python, opts: []oci.SpecOpts{python(`assert libc.syscall(444, (ctypes.c_uint64 * 1)(1), 8, 0) > 0`)},
			says: "Can't dump file … of that type … (anon …)"},
		"message queue": {image: stack.Python, opts: []oci.SpecOpts{python(`assert libc.mq_open(b"/q", os.O_CREAT | os.O_RDWR, 0o600, None) > 0`)},
			says: "Can't lookup mount=… for fd=… path=…"},
		"secret memory": {image: stack.Python, opts: []oci.SpecOpts{python(`assert libc.syscall(447, 0) > 0`)},
			says: "Can't lookup mount=… for fd=… path=…"},
		"nested uts":     with(nested("-u"), "Can't dump nested … namespace for …"),
		"nested ipc":     with(nested("-i"), "Can't dump nested … namespace for …"),
		"nested pid":     with(nested("-f -p"), "Can't dump nested … namespace for …"),
		"nested user":    with(nested("-U"), "Can't dump nested … namespace for …"),
		"nested network": with(nested("-n"), "Unable to dump more than one netns if the --emptyns is set"),
	}
	const stopped = "process … is stopped by a signal, which CRIU cannot dump on a host with cgroup v1"
	if cgroups.Mode() != cgroups.Unified {
		limits["stopped"] = limit{image: stack.Probe, opts: probe("stopped"), says: stopped}
	}

	documented, produced := limitsInDocs(t), map[string]bool{stopped: true}
	for name, l := range limits {
		t.Run(name, func(t *testing.T) {
			if !documented[l.says] {
				t.Errorf("docs/limits.md does not have %q", l.says)
			}
			id := strings.ReplaceAll(name, " ", "-")
			dir := filepath.Join(s.Dir, "checkpoints", id)
			accepted := func() int { return strings.Count(neighbour.Stdout.String(), "accepted") }
			before := accepted()
			c := s.NewContainer(ctx, id, l.image, l.opts...)
			c.Start(ctx)
			c.Stdout.WaitFor(ctx, "ready")
			if strings.HasPrefix(name, "unix stream") {
				s.Poll(ctx, "the neighbour to accept the connection", func() bool { return accepted() > before })
			}
			err := c.CheckpointErr(ctx, dir, l.asked)
			text := strings.ReplaceAll(regexp.QuoteMeta(l.says), "…", ".*")
			if err == nil || !regexp.MustCompile(text).MatchString(err.Error()) {
				t.Errorf("checkpoint: %v; want %s", err, l.says)
			}
			runsOn(t, ctx, c)
			c.Kill(ctx, syscall.SIGKILL)
			c.Delete(ctx)

			if l.options == nil && l.config == "" {
				return
			}
			if l.config != "" {
				conf := filepath.Join(s.Dir, id+".conf")
				if err := os.WriteFile(conf, []byte(l.config+"\n"), 0o600); err != nil {
					t.Fatal(err)
				}
				l.opts = append(l.opts, oci.WithAnnotations(map[string]string{"org.criu.config": conf}))
				l.options = &options.CheckpointOptions{}
			}
			c = s.NewContainer(ctx, id+"-helped", l.image, l.opts...)
			c.Start(ctx)
			c.Stdout.WaitFor(ctx, "ready")
			l.options.Exit = true
			if err := c.CheckpointErr(ctx, dir, l.options); err != nil {
				t.Fatal(err)
			}
			if err := c.RestoreErr(ctx, dir); err != nil {
				t.Fatal(err)
			}
			if l.image == stack.Probe {
				c.Probe(ctx)
			}
			runsOn(t, ctx, c)
		})
		produced[l.says] = true
	}
	for says := range documented {
		if !produced[says] {
			t.Errorf("docs/limits.md has %q, which nothing produces", says)
		}
	}
}

// limitsInDocs returns the errors in the table of docs/limits.md.
func limitsInDocs(t *testing.T) map[string]bool {
	t.Helper()
	data, err := os.ReadFile("../docs/limits.md")
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]bool{}
	for line := range strings.Lines(string(data)) {
		cells := strings.Split(line, "|")
		if len(cells) != 5 || strings.HasPrefix(cells[1], "-") {
			continue
		}
		for i, part := range strings.Split(cells[2], "`") {
			if i%2 == 1 {
				found[part] = true
			}
		}
	}
	return found
}

// TestLimitsExec checks that a process that was started by exec is no part of a
// checkpoint, with a terminal or without, and is none the worse for it.
func TestLimitsExec(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	c := sleeper(ctx, s, "c")
	dir := filepath.Join(s.Dir, "checkpoint")
	startExec(ctx, t, c, "pipes", "exec sleep 1001", false)
	startExec(ctx, t, c, "terminal", "exec sleep 1002", true)
	c.Checkpoint(ctx, dir, nil)
	if ps := c.Exec(ctx, "ps"); !strings.Contains(ps, "sleep 1001") || !strings.Contains(ps, "sleep 1002") {
		t.Errorf("after a checkpoint there are:\n%s", ps)
	}
	c.Checkpoint(ctx, dir, &options.CheckpointOptions{Exit: true})
	c.Restore(ctx, dir)
	if ps := c.Exec(ctx, "ps"); strings.Contains(ps, "sleep 1001") || strings.Contains(ps, "sleep 1002") {
		t.Errorf("after a restore there are:\n%s", ps)
	}
}

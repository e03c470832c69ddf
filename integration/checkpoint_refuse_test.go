package integration

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	core "github.com/checkpoint-restore/go-criu/v8/crit/images/criu-core"
	"github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/stasis-run/stasis/integration/stack"
)

// A damage is something that is wrong with a checkpoint.
type damage struct {
	do func(dir string) error
	// What the error says, besides naming the folder.
	want []string
}

// damages are ways in which a checkpoint can be bad, to a copy of a good one.
var damages = map[string]damage{
	"missing folder":  {os.RemoveAll, []string{"no such folder"}},
	"file, no folder": {func(dir string) error { return errors.Join(os.RemoveAll(dir), os.WriteFile(dir, nil, 0o600)) }, []string{"not a folder"}},
	"empty folder":    {func(dir string) error { return errors.Join(os.RemoveAll(dir), os.Mkdir(dir, 0o700)) }, []string{"inventory.img"}},
	"missing file":    {remove("pstree.img"), []string{"pstree.img", "missing"}},
	"truncated pages": {truncate("pages-1.img"), []string{"pages-1.img", "truncated"}},
	"longer pages":    {grow("pages-1.img"), []string{"pages-1.img", "altered"}},
	"altered byte":    {alter("core-1.img"), []string{"core-1.img", "altered", "blake3"}},
	"altered pages":   {alter("pages-1.img"), []string{"pages-1.img", "altered", "blake3"}},
	"added image":     {write("core-99.img", "x"), []string{"core-99.img", "not listed"}},
	"added file":      {write("evil.sh", "x"), []string{"evil.sh", "not listed"}},
	"link": {func(dir string) error { return os.Symlink("/etc/shadow", filepath.Join(dir, "core-99.img")) },
		[]string{"core-99.img", "symbolic link"}},
	"link for a file": {func(dir string) error {
		return errors.Join(os.Rename(filepath.Join(dir, "core-1.img"), dir+".img"), os.Symlink(dir+".img", filepath.Join(dir, "core-1.img")))
	}, []string{"core-1.img", "symbolic link"}},
	"subfolder": {func(dir string) error { return os.Mkdir(filepath.Join(dir, "sub"), 0o700) }, []string{"sub", "folder"}},
	"fifo":      {func(dir string) error { return unix.Mkfifo(filepath.Join(dir, "core-99.img"), 0o600) }, []string{"core-99.img", "FIFO"}},

	"other architecture":  {manifest(`"architecture": "`+runtime.GOARCH+`"`, `"architecture": "z80"`), []string{"made on z80", runtime.GOARCH}},
	"other CPU":           {manifest(`"cpu_features": [`, `"cpu_features": ["quantum",`), []string{"quantum", "CPU"}},
	"newer version":       {manifest(`"version": 3,`, `"version": 99,`), []string{"stasis.json", "version 99", "newer"}},
	"unknown key":         {manifest(`"version": 3,`, `"version": 3, "trust_me": true,`), []string{"stasis.json", "trust_me"}},
	"garbage manifest":    {write("stasis.json", "{"), []string{"stasis.json"}},
	"empty manifest":      {write("stasis.json", ""), []string{"stasis.json"}},
	"path in manifest":    {manifest(`"core-1.img"`, `"../core-1.img"`), []string{"stasis.json", "../core-1.img"}},
	"signed and altered":  {edit("stasis.json", func(b []byte) ([]byte, error) { return append(b, '\n'), nil }), []string{"stasis.json is not what was signed"}},
	"signed, no manifest": {remove("stasis.json"), []string{"stasis.sig.json"}},
	"altered signature":   {alter("stasis.sig.json"), []string{"stasis.sig.json"}},
	"bad option":          {manifest(`"options": {`, `"options": {"cgroups_mode": "--evil",`), []string{"stasis.json", "--evil"}},
	"unfinished":          {remove("inventory.img"), []string{"unfinished"}},

	"no manifest, missing core":    {without(remove("core-1.img")), []string{"core-1.img", "missing"}},
	"no manifest, missing pages":   {without(remove("pages-1.img")), []string{"pages-1.img", "missing"}},
	"no manifest, truncated pages": {without(truncate("pages-1.img")), []string{"pages-1.img", "truncated"}},
	"no manifest, truncated core":  {without(truncate("core-1.img")), []string{"core-1.img", "truncated"}},
	"no manifest, added file":      {without(write("evil.sh", "x")), []string{"evil.sh"}},
	"no manifest, other architecture": {without(otherArchitecture), []string{
		"made on " + map[bool]string{true: "amd64", false: "arm64"}[runtime.GOARCH == "arm64"], runtime.GOARCH}},
}

func remove(name string) func(string) error {
	return func(dir string) error { return os.Remove(filepath.Join(dir, name)) }
}

func write(name, text string) func(string) error {
	return func(dir string) error { return os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600) }
}

// edit changes a file's content.
func edit(name string, change func([]byte) ([]byte, error)) func(string) error {
	return func(dir string) error {
		path := filepath.Join(dir, name)
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if data, err = change(data); err != nil {
			return err
		}
		return os.WriteFile(path, data, 0o600)
	}
}

func truncate(name string) func(string) error {
	return edit(name, func(b []byte) ([]byte, error) { return b[:len(b)-1], nil })
}

func grow(name string) func(string) error {
	return edit(name, func(b []byte) ([]byte, error) { return append(b, 0), nil })
}

func alter(name string) func(string) error {
	return edit(name, func(b []byte) ([]byte, error) { b[len(b)/2] ^= 1; return b, nil })
}

// manifest alters a manifest, which then nobody has signed.
func manifest(old, with string) func(string) error {
	change := edit("stasis.json", func(b []byte) ([]byte, error) {
		if !bytes.Contains(b, []byte(old)) {
			return nil, fmt.Errorf("no %s in the manifest", old)
		}
		return bytes.Replace(b, []byte(old), []byte(with), 1), nil
	})
	return func(dir string) error { return errors.Join(change(dir), remove("stasis.sig.json")(dir)) }
}

// without damages a checkpoint that has no manifest.
func without(do func(string) error) func(string) error {
	return func(dir string) error {
		return errors.Join(remove("stasis.json")(dir), remove("stasis.sig.json")(dir), do(dir))
	}
}

// otherArchitecture makes the first process one of another architecture.
func otherArchitecture(dir string) error {
	return edit("core-1.img", func(b []byte) ([]byte, error) {
		const head = 8 // two magic numbers; then length and message
		var entry core.CoreEntry
		if err := (proto.UnmarshalOptions{AllowPartial: true}).Unmarshal(b[head+4:], &entry); err != nil {
			return nil, err
		}
		entry.Mtype = core.CoreEntry_AARCH64.Enum()
		if runtime.GOARCH == "arm64" {
			entry.Mtype = core.CoreEntry_X86_64.Enum()
		}
		msg, err := proto.MarshalOptions{AllowPartial: true}.Marshal(&entry)
		return append(binary.LittleEndian.AppendUint32(b[:head:head], uint32(len(msg))), msg...), err
	})(dir)
}

// TestRefuse checks that Create refuses a bad checkpoint before it does
// anything, and that a restore never becomes a cold start.
func TestRefuse(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	faults := s.Faults()
	c := s.NewContainer(ctx, "c", stack.Probe, stack.ProbeArgs("-items", "heap"))
	c.StartProbe(ctx)
	before := c.Probe(ctx)
	good := filepath.Join(s.Dir, "good")
	c.Checkpoint(ctx, good, &options.CheckpointOptions{Exit: true, FileLocks: true})
	for name, d := range damages {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(s.Dir, "bad", strings.ReplaceAll(name, " ", "-"))
			if err := os.CopyFS(dir, os.DirFS(good)); err != nil {
				t.Fatal(err)
			}
			if err := d.do(dir); err != nil {
				t.Fatal(err)
			}
			seen := len(faults.Calls())
			err := c.RestoreErr(ctx, dir)
			if err == nil {
				t.Fatal("restored")
			}
			if !strings.Contains(err.Error(), "create task") {
				t.Errorf("refused late: %v", err)
			}
			for _, want := range append(d.want, dir) {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%v; want %q in it", err, want)
				}
			}
			if calls := faults.Calls()[seen:]; len(calls) > 0 && !onlyDelete(calls) {
				t.Errorf("the runtime was called: %q", calls)
			}
			nothingOf(ctx, t, s, c)
		})
	}
	// A change that leaves the size as it is, and the file where it is.
	t.Run("altered in place", func(t *testing.T) {
		if err := alter("pages-1.img")(good); err != nil {
			t.Fatal(err)
		}
		if err := c.RestoreErr(ctx, good); err == nil || !strings.Contains(err.Error(), "pages-1.img") {
			t.Errorf("restore: %v; want it to be noticed", err)
		}
		nothingOf(ctx, t, s, c)
		if err := alter("pages-1.img")(good); err != nil {
			t.Fatal(err)
		}
	})
	// After all that, the good one, as it was again.
	c.Restore(ctx, good)
	checkSame(t, before, c.Probe(ctx))
	// And a shim that has other containers serves on: see TestRefuseInPod.
}

// onlyDelete tells if all calls are those of containerd cleaning up.
func onlyDelete(calls []string) bool {
	for _, call := range calls {
		if !strings.Contains(call, " delete ") {
			return false
		}
	}
	return true
}

// nothingOf checks that there is nothing of a container's task.
func nothingOf(ctx context.Context, t *testing.T, s *stack.Stack, c *stack.Container) {
	t.Helper()
	if task, err := c.Container.Task(ctx, nil); !errdefs.IsNotFound(err) {
		t.Errorf("task %v, %v; want none", task, err)
	}
	if _, err := os.Stat(c.Bundle()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("bundle: %v; want none", err)
	}
	notRunning(t, s, c)
}

// notRunning checks that there is no process of a container, no control group,
// and that the runtime does not know it.
func notRunning(t *testing.T, s *stack.Stack, c *stack.Container) {
	t.Helper()
	if groups := s.ContainerCgroups(c.ID()); len(groups) > 0 {
		t.Errorf("control groups %v; want none", groups)
	}
	if _, err := os.Stat(filepath.Join("/run/containerd/runc", s.Namespace, c.ID())); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("state of the runtime: %v; want none", err)
	}
}

// TestRefuseInPod checks that a shim that refuses a checkpoint goes on to serve
// its other containers.
func TestRefuseInPod(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	pod := oci.WithAnnotations(map[string]string{"io.containerd.runc.v2.group": "pod"})
	first := sleeper(ctx, s, "first", pod)
	second := s.NewContainer(ctx, "second", stack.Busybox, pod, stack.Args("sleep", "1000"))
	for range 2 {
		if err := second.RestoreErr(ctx, filepath.Join(s.Dir, "nowhere")); err == nil || !strings.Contains(err.Error(), "no such folder") {
			t.Errorf("restore: %v", err)
		}
		nothingOf(ctx, t, s, second)
		runsOn(t, ctx, first)
	}
	second.Start(ctx)
	if shimPid(t, first) != shimPid(t, second) {
		t.Error("two shims")
	}
}

// TestRestoreFails checks that a restore that fails in CRIU leaves nothing, says
// why, and can be tried again.
func TestRestoreFails(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	network := s.NewNetns()
	// An init that collects the children of others.
	anchor := s.NewContainer(ctx, "anchor", stack.Busybox, stack.Args("sh", "-c", "sleep 1000 & wait"))
	anchor.Start(ctx)
	listen := stack.Args("nc", "-ll", "-p", "7777", "-e", "cat")
	shared := filepath.Join(s.Dir, "shared")
	var pid string // of the container's init, in its pid namespace
	for name, tc := range map[string]struct {
		opts []oci.SpecOpts
		// ready tells when the container can be checkpointed.
		ready func(c *stack.Container) bool
		// breaks makes the next restore fail, with an error that says want.
		breaks func(c *stack.Container) (mend func(), err error)
		want   string
	}{
		"missing file": {
			opts:  []oci.SpecOpts{stack.Args("sh", "-c", "exec 3>>/data; echo up; sleep 1000")},
			ready: func(c *stack.Container) bool { return c.Stdout.String() == "up\n" },
			breaks: func(c *stack.Container) (func(), error) {
				// The rootfs is mounted by Create.
				file := filepath.Join(c.Bundle(), "rootfs", "data")
				return func() {
					if err := os.WriteFile(file, nil, 0o644); err != nil {
						t.Error(err)
					}
				}, os.Remove(file)
			},
			want: "Can't open file data on restore: No such file or directory",
		},
		"missing bind mount": {
			opts: []oci.SpecOpts{stack.Args("sh", "-c", "exec 3</mnt; echo up; sleep 1000"), oci.WithMounts([]specs.Mount{
				{Type: "bind", Source: shared, Destination: "/mnt", Options: []string{"bind", "ro"}}})},
			ready: func(c *stack.Container) bool { return c.Stdout.String() == "up\n" },
			breaks: func(*stack.Container) (func(), error) {
				return func() {
					if err := os.Rename(shared+".old", shared); err != nil {
						t.Error(err)
					}
				}, os.Rename(shared, shared+".old")
			},
			want: shared,
		},
		"port in use": {
			opts:  []oci.SpecOpts{listen, network.With()},
			ready: func(c *stack.Container) bool { return listens(c) },
			breaks: func(*stack.Container) (func(), error) {
				other := s.NewContainer(ctx, "other", stack.Busybox, listen, network.With())
				other.Start(ctx)
				s.Poll(ctx, "listener", func() bool { return listens(other) })
				return func() {
					other.Kill(ctx, syscall.SIGKILL)
					other.Delete(ctx)
				}, nil
			},
			want: "Can't bind inet socket",
		},
		"pid in use": {
			opts: []oci.SpecOpts{stack.Args("sleep", "1000"), oci.WithLinuxNamespace(specs.LinuxNamespace{
				Type: specs.PIDNamespace, Path: procFile(anchor, "ns/pid")})},
			ready:  func(*stack.Container) bool { return true },
			breaks: func(*stack.Container) (func(), error) { return occupy(s, anchor, pid) },
			want:   "File exists",
		},
	} {
		t.Run(name, func(t *testing.T) {
			if err := os.WriteFile(shared, []byte("shared"), 0o644); err != nil {
				t.Fatal(err)
			}
			c := s.NewContainer(ctx, strings.ReplaceAll(name, " ", "-"), stack.Busybox, tc.opts...)
			c.Start(ctx)
			s.Poll(ctx, "container to be ready", func() bool { return tc.ready(c) })
			pids := strings.Fields(procField(t, int(c.Task.Pid()), "NSpid"))
			pid = pids[len(pids)-1]
			dir := filepath.Join(s.Dir, "checkpoints", c.ID())
			if err := c.CheckpointErr(ctx, dir, &options.CheckpointOptions{Exit: true}); err != nil {
				t.Fatal(err)
			}
			if err := c.Create(ctx, client.WithRestoreImagePath(dir)); err != nil {
				t.Fatal(err)
			}
			mend, err := tc.breaks(c)
			if err != nil {
				t.Fatal(err)
			}
			for range 2 {
				// Not by the client's task, which would close the streams.
				_, err := s.Client().TaskService().Start(ctx, &tasks.StartRequest{ContainerID: c.ID()})
				if err == nil {
					t.Fatal("restored")
				}
				if !strings.Contains(err.Error(), tc.want) {
					t.Errorf("%v; want %q in it", err, tc.want)
				}
				if status := c.Status(ctx); status != client.Created {
					t.Errorf("status %s, want created", status)
				}
				notRunning(t, s, c)
				if _, err := os.Lstat(filepath.Join(c.Bundle(), "rootfs", "bin", "sh")); err != nil {
					t.Errorf("rootfs: %v", err)
				}
			}
			mend()
			if err := c.Task.Start(ctx); err != nil {
				t.Fatalf("after what was wrong is right again: %v", err)
			}
			runsOn(t, ctx, c)
			c.Kill(ctx, syscall.SIGKILL)
			c.Delete(ctx)
		})
	}
}

// listens tells if a process of the container's network namespace listens.
func listens(c *stack.Container) bool {
	data, _ := os.ReadFile(procFile(c, "net/tcp6"))
	more, _ := os.ReadFile(procFile(c, "net/tcp"))
	return strings.Contains(string(data)+string(more), ":1E61 ") // 7777
}

// occupy starts a process with the given pid in a container's pid namespace.
func occupy(s *stack.Stack, c *stack.Container, pid string) (end func(), err error) {
	inside := func(script string) *exec.Cmd {
		return exec.Command("nsenter", "--target", fmt.Sprint(c.Task.Pid()), "--pid", "--", "sh", "-c", script)
	}
	cmd := inside(fmt.Sprintf(`until [ "$p" = %[1]s ]; do
		kill $p; echo $((%[1]s - 1)) > /proc/sys/kernel/ns_last_pid; sleep 1000 & p=$!
	done; echo up; wait`, pid))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	_, err = out.Read(make([]byte, 3))
	return func() {
		syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		cmd.Wait()
		s.Poll(s.Ctx(), "pid to be free", func() bool { return inside("kill -0 "+pid).Run() != nil })
	}, err
}

package criu

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/cgroups/v3"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/stasis-run/stasis/checkpoint/criu/standin"
	"github.com/stasis-run/stasis/process"
)

// In these tests the runtime is the test, and both the stand-in for CRIU and CRIU are
// the test binary, which are called criu.
const fakeEnv = "STASIS_TEST_CRIU"

func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == standin.Name {
		if err := fakeCRIU(os.Args, os.Getenv(fakeEnv)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// message is fields with numbers or bytes.
func message(fields ...any) (m []byte) {
	for i := 0; i < len(fields); i += 2 {
		n := protowire.Number(fields[i].(int))
		switch v := fields[i+1].(type) {
		case int:
			m = protowire.AppendVarint(protowire.AppendTag(m, n, protowire.VarintType), uint64(v))
		case []byte:
			m = protowire.AppendBytes(protowire.AppendTag(m, n, protowire.BytesType), v)
		case string:
			m = protowire.AppendString(protowire.AppendTag(m, n, protowire.BytesType), v)
		}
	}
	return m
}

const (
	typeRestore = 2
	typeNotify  = 6
)

func receive(fd int) ([]byte, error) {
	buf := make([]byte, 4096)
	n, err := unix.Read(fd, buf)
	if err == nil && n == 0 {
		err = errors.New("end of messages")
	}
	return buf[:max(n, 0)], err
}

// fakeCRIU restores one process, which it holds, and tells the folder that the request
// names.
func fakeCRIU(args []string, how string) error {
	runtime.LockOSThread()
	fd, err := strconv.Atoi(args[2])
	if err != nil {
		return err
	}
	request, err := receive(fd)
	if err != nil {
		return err
	}
	if m, err := parseMessage(request); err != nil || m.kind == messageDump {
		return cmp.Or(err, fakeDump(fd, how))
	}
	peer, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return err
	}
	folder := ""
	err = eachField(request, func(n protowire.Number, _, opts []byte, _ uint64) error {
		if n != 2 {
			return nil
		}
		return eachField(opts, func(n protowire.Number, _, _ []byte, number uint64) (err error) {
			if n == 1 {
				folder, err = os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", peer.Pid, number))
			}
			return err
		})
	})
	if err != nil {
		return err
	}
	child := exec.Command("sleep", "1000")
	if err := child.Start(); err != nil {
		return err
	}
	pid := child.Process.Pid
	if err := os.WriteFile(os.Getenv(fakeEnv+"_PID"), []byte(strconv.Itoa(pid)), 0o600); err != nil {
		return err
	}
	if group := os.Getenv(fakeEnv + "_GROUP"); group != "" {
		if err := os.WriteFile(filepath.Join(group, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
			return err
		}
	}
	if how != "loose" {
		if err := unix.PtraceSeize(pid); err != nil {
			return err
		}
		if err := unix.PtraceInterrupt(pid); err != nil {
			return err
		}
		if _, err := unix.Wait4(pid, nil, 0, nil); err != nil {
			return err
		}
	}
	tell := func(script string) error { return tell(fd, script, pid) }
	if err := tell("post-restore"); err != nil {
		_ = child.Process.Kill()
		return err
	}
	if how == "dies" {
		return errors.New("dies")
	}
	if how != "silent" {
		_ = tell("pre-resume") // like CRIU, which goes on
	}
	if how != "loose" {
		_ = unix.PtraceDetach(pid)
	}
	_, err = unix.Write(fd, message(1, typeRestore, 2, 1, 9, folder))
	return err
}

// tell tells what CRIU does, and waits for an answer.
func tell(fd int, script string, pid int) error {
	notify := message(1, script)
	if script == "post-restore" {
		notify = message(1, script, 2, pid)
	}
	if _, err := unix.Write(fd, message(1, typeNotify, 2, 1, 5, notify)); err != nil {
		return err
	}
	_, err := receive(fd)
	return err
}

// fakeDump is a dump that fails if it dies, and does not say that it begins if it is silent.
func fakeDump(fd int, how string) error {
	if how != "silent" {
		if err := tell(fd, "pre-dump", 0); err != nil {
			return err
		}
	}
	if how == "dies" {
		return errors.New("dies")
	}
	if err := tell(fd, "post-dump", 0); err != nil {
		return err
	}
	success := 1
	if how == "fails" {
		success = 0
	}
	_, err := unix.Write(fd, message(1, messageDump, 2, success))
	return err
}

// callCRIU is a runtime's part: it asks for a dump or a restore. It returns init and the
// folder that CRIU was given.
func callCRIU(ctx context.Context, t *testing.T, kind int, env []string, dir *os.File, notified func(script string)) (init int, folder string, err error) {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[0])
	theirs := os.NewFile(uintptr(pair[1]), "theirs")
	path := strings.TrimPrefix(env[slices.IndexFunc(env, func(v string) bool { return strings.HasPrefix(v, "PATH=") })], "PATH=")
	bin, _, _ := strings.Cut(path, ":")
	cmd := exec.CommandContext(ctx, filepath.Join(bin, standin.Name), "swrk", "3")
	cmd.Args[0] = standin.Name
	cmd.Env = append(os.Environ(), env...)
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	defer cmd.Wait()
	if _, err := unix.Write(pair[0], message(1, kind, 2, message(1, int(dir.Fd()), 13, "/root"))); err != nil {
		return 0, "", err
	}
	for {
		answer, err := receive(pair[0])
		if err != nil {
			return 0, "", err
		}
		m, err := parseMessage(answer)
		if err != nil {
			return 0, "", err
		}
		if m.script == "" {
			if m.kind == messageDump {
				notified("")
				if !m.success {
					err = errors.New("criu failed")
				}
				return 0, "", err
			}
			err := eachField(answer, func(n protowire.Number, _, value []byte, _ uint64) error {
				if n == 9 {
					folder = string(value)
				}
				return nil
			})
			_ = unix.Shutdown(pair[0], unix.SHUT_WR)
			return init, folder, err
		}
		if m.pid != 0 {
			init = m.pid
		}
		notified(m.script)
		if _, err := unix.Write(pair[0], message(1, typeNotify, 3, 1)); err != nil {
			return 0, "", err
		}
	}
}

// makeGroup makes a control group for a test, and has fakeCRIU put its process there.
func makeGroup(t *testing.T) string {
	t.Helper()
	group := fmt.Sprintf("/stasis-test-relay-%d-%d", os.Getpid(), time.Now().UnixNano())
	dir := filepath.Join("/sys/fs/cgroup", group)
	if cgroups.Mode() != cgroups.Unified {
		dir = filepath.Join("/sys/fs/cgroup/freezer", group)
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() {
		process.KillCgroup(group)
		_ = process.RemoveCgroup(group)
	})
	t.Setenv(fakeEnv+"_GROUP", dir)
	return group
}

// startSleep starts a process in a control group, both of which end with the test.
func startSleep(t *testing.T) (pid int, group string, cg *process.Cgroup) {
	t.Helper()
	group = makeGroup(t)
	sleep := exec.Command("sleep", "1000")
	if err := sleep.Start(); err != nil {
		t.Fatal(err)
	}
	pid = sleep.Process.Pid
	t.Cleanup(func() {
		process.KillCgroup(group)
		_ = sleep.Process.Kill() // if it is not in the group yet
		_ = sleep.Wait()         // it was killed
	})
	if err := os.WriteFile(filepath.Join(os.Getenv(fakeEnv+"_GROUP"), "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
		t.Fatal(err)
	}
	cg, err := process.LoadCgroup(pid, group)
	if err != nil {
		t.Fatal(err)
	}
	return pid, group, cg
}

func frozen(t *testing.T, pid int, group string) bool {
	t.Helper()
	cg, err := process.LoadCgroup(pid, group)
	if err != nil {
		t.Fatal(err)
	}
	frozen, err := cg.Frozen()
	if err != nil {
		t.Error(err)
	}
	return frozen
}

// installCRIU makes the test binary the criu of PATH, and returns it.
func installCRIU(t *testing.T) (self string) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	bin := t.TempDir()
	if err := os.Symlink(self, filepath.Join(bin, standin.Name)); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	return self
}

// TestDumpRelay: a container runs until CRIU is about to look at it, stands still from then
// on, and runs on when CRIU has left it and what was done beside it has ended: before the
// runtime hears of it.
func TestDumpRelay(t *testing.T) {
	self := installCRIU(t)
	bad := errors.New("no space left")
	for name, c := range map[string]struct {
		how   string // of fakeDump
		while bool
		werr  error // of what is done beside it
		berr  error // of what is done when it stands still
		exit  bool
		want  string // of the error
	}{
		"good":                      {},
		"fails":                     {how: "fails", want: "criu failed"},
		"dies":                      {how: "dies", want: "end of messages"},
		"silent":                    {how: "silent"},
		"ends":                      {exit: true},
		"no room":                   {berr: bad, exit: true, want: bad.Error()},
		"no room for a copy":        {berr: bad, while: true, want: bad.Error()},
		"with a copy":               {while: true},
		"with a copy that fails":    {while: true, werr: bad, want: bad.Error()},
		"with a copy, fails":        {how: "fails", while: true, want: "criu failed"},
		"with a copy, dies":         {how: "dies", while: true, want: "end of messages"},
		"with a copy, but silent":   {how: "silent", while: true, want: "has not told"},
		"with a copy, fails, fails": {how: "fails", while: true, werr: bad, want: "criu failed"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv(fakeEnv, c.how)
			pid, group, cg := startSleep(t)
			r := &DumpRequest{Cgroup: cg, InitPid: pid, Bundle: t.TempDir(), Self: self, Exit: c.exit}
			copied := make(chan struct{}) // the copy may end
			var copying atomic.Bool
			if c.while {
				r.While = func(ctx context.Context) error {
					if !frozen(t, pid, group) {
						t.Error("it runs while its files are copied")
					}
					copying.Store(true)
					defer copying.Store(false)
					select {
					case <-copied:
						return c.werr
					case <-ctx.Done():
						return context.Cause(ctx)
					}
				}
			}
			folder, err := os.Open(r.Bundle)
			if err != nil {
				t.Fatal(err)
			}
			defer folder.Close()
			written, told, begun := false, false, 0
			w, err := r.frozen(t.Context(), moments{func() error {
				begun++
				if !frozen(t, pid, group) {
					t.Error("it runs when it is said to stand still")
				}
				return c.berr
			}, func() {
				written = true
				if c.how != "silent" && !frozen(t, pid, group) {
					t.Error("it runs before its memory is known to be written")
				}
			}}, func(env []string) error {
				if frozen(t, pid, group) {
					t.Error("it stands still before CRIU has begun")
				}
				_, _, err := callCRIU(t.Context(), t, messageDump, env, folder, func(script string) {
					switch is := frozen(t, pid, group); {
					case script == "pre-dump":
						told = true
						if !is {
							t.Error("it runs when CRIU begins")
						}
					case script != "":
					case c.how == "" && !c.while && !c.exit && is:
						t.Error("it still stands still when the runtime hears that it is dumped")
					case c.while && told && !is:
						t.Error("it runs while its files are copied")
					}
				})
				close(copied)
				return err
			})
			if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
			if copying.Load() {
				t.Error("its files are still copied")
			}
			silent, good := c.how == "silent", c.how == "" && c.berr == nil
			if written != (good || silent) {
				t.Errorf("written: %t", written)
			}
			runs := silent || good && !c.exit && c.werr == nil
			if frozen(t, pid, group) == runs {
				t.Errorf("it runs: %t, want %t", !runs, runs)
			}
			if told != (!silent && c.berr == nil) || begun == 1 == silent || w.begun.IsZero() != silent {
				t.Errorf("told: %t, %d times, from %v", told, begun, w.begun)
			}
			if !w.ended.IsZero() && !w.ended.After(w.begun) || w.ended.IsZero() != (!runs || silent) {
				t.Errorf("from %v to %v", w.begun, w.ended)
			}
			if _, err := os.Stat(filepath.Join(r.Bundle, relayDir)); !os.IsNotExist(err) {
				t.Errorf("left in the bundle: %v", err)
			}
		})
	}
}

// TestDumpRelayCannotFreeze: a container that cannot be frozen is not dumped, and the error
// says why; CRIU, which waits for it, is told. It is not waited for any more when CRIU ends.
func TestDumpRelayCannotFreeze(t *testing.T) {
	self := installCRIU(t)
	t.Setenv(fakeEnv, "")
	pid, group, cg := startSleep(t)
	if !cg.IsV1() {
		t.Skip("a process that a signal has stopped can be frozen with cgroup v2")
	}
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	for !process.IsStopped(pid) {
		runtime.Gosched()
	}
	copied := false
	r := &DumpRequest{Cgroup: cg, InitPid: pid, Bundle: t.TempDir(), Self: self, While: func(context.Context) error { copied = true; return nil }}
	folder, err := os.Open(r.Bundle)
	if err != nil {
		t.Fatal(err)
	}
	defer folder.Close()
	never := func() { t.Error("it is dumped") }
	_, err = r.frozen(t.Context(), moments{func() error { never(); return nil }, never}, func(env []string) error {
		_, _, err := callCRIU(t.Context(), t, messageDump, env, folder, func(script string) { t.Errorf("the runtime hears %q", script) })
		return err
	})
	if own := (*ownError)(nil); !errors.As(err, &own) || !strings.Contains(err.Error(), "is stopped by a signal") {
		t.Errorf("%v", err)
	}
	if copied || frozen(t, pid, group) {
		t.Errorf("copied: %t, frozen: %t", copied, frozen(t, pid, group))
	}

	d := newDumpRelay(t.Context(), r, moments{})
	d.criu.Store(7)
	d.ended(6) // a runtime asked it for its version
	if d.freezing.Err() != nil {
		t.Error("it gives up for another CRIU")
	}
	d.ended(7)
	if d.freezing.Err() == nil {
		t.Error("it still tries to freeze the container after CRIU has ended")
	}
}

// TestRelayWithoutSocket: a CRIU whose socket does not come through fails, and does not
// hang; the error says why.
func TestRelayWithoutSocket(t *testing.T) {
	self := installCRIU(t)
	l, env, err := newRelay(t.TempDir(), self, &dumpRelay{})
	if err != nil {
		t.Fatal(err)
	}
	socket := strings.TrimPrefix(env[slices.IndexFunc(env, func(v string) bool { return strings.HasPrefix(v, standin.RelayEnv+"=") })], standin.RelayEnv+"=")
	s, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(s)
	if err := unix.Connect(s, &unix.SockaddrUnix{Name: socket}); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Write(s, []byte{0}); err != nil { // without a descriptor
		t.Fatal(err)
	}
	if n, err := unix.Read(s, make([]byte, 1)); n > 0 {
		t.Errorf("%d bytes, %v", n, err)
	}
	if err := l.explain(errors.New("EOF")); !strings.Contains(err.Error(), "0 sockets") {
		t.Errorf("%v", err)
	}
	l.close()
}

// TestRelay has the messages pass, and the process end unless it was held, looked at
// and found good.
func TestRelay(t *testing.T) {
	self := installCRIU(t)
	bad := errors.New("it has the host's files")
	for name, c := range map[string]struct {
		how    string // of fakeCRIU
		check  error
		cancel string // when the restore is cancelled: on which notification, or in the check
		want   string // of the error
		group  bool   // the process is in a control group
	}{
		"good":                {},
		"in a group":          {group: true},
		"bad in a group":      {group: true, check: bad, want: bad.Error()},
		"bad":                 {check: bad, want: bad.Error()},
		"not held":            {how: "loose", want: "is not held by CRIU"},
		"not told":            {how: "silent", want: "has not told"},
		"dead":                {how: "dies", want: "end of messages"},
		"cancelled, not told": {cancel: "post-restore", want: "canceled"},
		"cancelled in check":  {cancel: "check", want: "canceled"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv(fakeEnv, c.how)
			note := filepath.Join(t.TempDir(), "pid")
			t.Setenv(fakeEnv+"_PID", note)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			runCtx, end := context.WithCancel(context.Background())
			defer end()
			looked := 0
			group := ""
			if c.group {
				group = makeGroup(t)
			}
			spec := &specs.Spec{Linux: &specs.Linux{CgroupsPath: group}}
			r := &RestoreRequest{Bundle: t.TempDir(), Self: self, Spec: spec, Check: func(ctx context.Context, pids []int) error {
				looked++
				if c.group && !frozen(t, pids[0], group) {
					t.Error("its control group runs while it is looked at")
				}
				if c.cancel == "check" {
					cancel()
				}
				return c.check
			}}
			l, env, err := r.newRelay(ctx, end)
			if err != nil {
				t.Fatal(err)
			}
			folder, err := os.Open(r.Bundle)
			if err != nil {
				t.Fatal(err)
			}
			defer folder.Close()
			cancelled := make(chan struct{})
			stop := context.AfterFunc(ctx, func() {
				defer close(cancelled)
				l.cancel()
			})
			pid, got, err := callCRIU(runCtx, t, typeRestore, env, folder, func(script string) {
				if script == c.cancel {
					cancel()
				}
			})
			if !stop() {
				<-cancelled
			}
			pid, err = l.verdict(pid, err)
			l.close()
			data, rerr := os.ReadFile(note)
			if rerr != nil {
				t.Fatal(rerr)
			}
			made, _ := strconv.Atoi(string(data))
			defer func() { _ = unix.Kill(made, unix.SIGKILL) }()
			if c.want == "" {
				if err != nil || pid != made || got != r.Bundle || looked != 1 || unix.Kill(made, 0) != nil {
					t.Errorf("process %d of %d, folder %q, looked at %d times: %v", pid, made, got, looked, err)
				}
				if c.group && frozen(t, made, group) {
					t.Error("its control group is frozen for good")
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), c.want) && ctx.Err() == nil {
				t.Errorf("%v, want %q", err, c.want)
			}
			// Nobody waits for it: it is a zombie at most.
			for {
				stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", made))
				if err != nil || strings.Contains(string(stat), ") Z ") {
					break
				}
				if t.Context().Err() != nil {
					t.Fatalf("%s: it lives", stat)
				}
				runtime.Gosched()
			}
			if _, err := os.Stat(filepath.Join(r.Bundle, relayDir)); !os.IsNotExist(err) {
				t.Errorf("left in the bundle: %v", err)
			}
		})
	}
}

// TestFolders: an open folder would keep the file system that the checkpoint is in
// from being unmounted.
func TestFolders(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[1])
	conn, err := unixConn(pair[0])
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	var opened []*os.File
	func() {
		var f folders
		defer f.close()
		got, err := f.translate(message(2, message(1, int(dir.Fd()), 17, -1)), conn)
		if err != nil || len(f) != 1 {
			t.Fatalf("%d folders, %v", len(f), err)
		}
		if want := message(2, message(1, int(f[0].Fd()), 17, -1, 12, 1)); !slices.Equal(got, want) {
			t.Errorf("request %x, want %x", got, want)
		}
		opened = slices.Clone(f)
	}()
	if _, err := opened[0].Stat(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("the folder is still open: %v", err)
	}
}

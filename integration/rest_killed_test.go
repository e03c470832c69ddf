package integration

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/integration/stack"
)

// TestRESTKilled kills stasisd at points of each call that changes something. When it
// runs again, a container runs or is gone, a checkpoint is there whole or not at all,
// nothing else is left, and the same call succeeds.
func TestRESTKilled(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	f := s.Faults()
	// stasisd names no OCI runtime, so it is the one in the PATH.
	script := fmt.Sprintf("#!/bin/sh\nexec %s \"$@\"\n", s.OCIRuntime())
	if err := os.WriteFile(filepath.Join(s.Dir, "bin", "runc"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	bundle := s.Bundle("c", "busybox", stack.Args("sleep", "100000"))
	d := s.StartStasisd("--allow-path", filepath.Dir(bundle))

	start := fmt.Sprintf(`{"bundlePath":%q}`, bundle)
	restore := fmt.Sprintf(`{"bundlePath":%q,"checkpoint":"kept"}`, bundle)
	pid := func() int {
		t.Helper()
		for _, c := range getState(t, d).Containers {
			return c.Processes[0].Pid
		}
		return 0
	}
	checkpoints := func() string {
		_, body := d.Curl("GET", "/containers/c/checkpoint", "")
		return body
	}
	stop := func(t *testing.T) {
		t.Helper()
		if pid() != 0 {
			want(t, d, 200, "PATCH", "/containers/c", `{"signal":9}`)
		}
		s.Poll(ctx, "its end", func() bool {
			left, err := s.Client().Containers(ctx)
			return err == nil && len(left) == 0
		})
	}
	// once kills stasisd while a call waits in the OCI runtime, and runs it again when
	// that has gone on; or before, and then the shim is still at work.
	once := func(t *testing.T, command string, w stack.When, early bool, method, path, body string) {
		t.Helper()
		f.Hold(command, w)
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, _, _ = d.CurlErr(method, path, body)
		}()
		f.WaitReached(ctx, command, w)
		d.End(syscall.SIGKILL)
		<-done
		if early {
			go func() {
				// It recovers meanwhile.
				select {
				case <-time.After(500 * time.Millisecond):
				case <-ctx.Done():
				}
				f.Release(command, w)
			}()
		} else {
			f.Release(command, w)
		}
		d.Start()
		f.Reset()
	}
	nothingLeft := func(t *testing.T) {
		t.Helper()
		if left, _ := filepath.Glob(filepath.Join(s.Dir, "stasis", "saving", "*")); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	}

	for _, when := range []struct {
		name string
		stack.When
	}{{"before", stack.Before}, {"after", stack.After}} {
		for _, early := range []bool{false, true} {
			name := when.name
			if early {
				name += ", early"
			}
			commands := []string{"create"}
			if !early {
				commands = append(commands, "start")
			}
			for _, command := range commands {
				t.Run("start/"+command+" "+name, func(t *testing.T) {
					once(t, command, when.When, early, "POST", "/containers/c", start)
					startAgain(ctx, t, s, d, start, pid)
					stop(t)
				})
			}
			exec := func(t *testing.T) {
				want(t, d, 201, "POST", "/containers/c", start)
				before := pid()
				once(t, "exec", when.When, early, "PUT", "/containers/c/process", `{"args":["sleep","1000"]}`)
				if after := pid(); after != before {
					t.Errorf("pid %d, was %d", after, before)
				}
				want(t, d, 200, "PUT", "/containers/c/process", `{"args":["sleep","1000"]}`)
				stop(t)
			}
			if !early { // else there is nothing to recover
				t.Run("exec/"+name, exec)
			}
			for _, exit := range []bool{false, true} {
				t.Run(fmt.Sprintf("checkpoint/exit=%v %s", exit, name), func(t *testing.T) {
					want(t, d, 201, "POST", "/containers/c", start)
					before := pid()
					body := fmt.Sprintf(`{"exit":%v}`, exit)
					once(t, "checkpoint", when.When, early, "POST", "/containers/c/checkpoint/x", body)
					s.Poll(ctx, "either", func() bool { return (pid() == 0) == strings.Contains(checkpoints(), `"x"`) || pid() == before && !exit })
					nothingLeft(t)
					if pid() == 0 {
						if !exit {
							t.Fatal("the container is gone")
						}
						want(t, d, 201, "POST", "/containers/c", strings.Replace(restore, "kept", "x", 1))
						want(t, d, 200, "DELETE", "/containers/c/checkpoint/x", "")
					} else if strings.Contains(checkpoints(), `"x"`) {
						want(t, d, 200, "DELETE", "/containers/c/checkpoint/x", "")
					}
					want(t, d, 201, "POST", "/containers/c/checkpoint/x", body)
					want(t, d, 200, "DELETE", "/containers/c/checkpoint/x", "")
					stop(t)
				})
			}
			t.Run("restore/"+name, func(t *testing.T) {
				want(t, d, 201, "POST", "/containers/c", start)
				want(t, d, 201, "POST", "/containers/c/checkpoint/kept", `{"exit":true}`)
				stop(t)
				once(t, "restore", when.When, early, "POST", "/containers/c", restore)
				startAgain(ctx, t, s, d, restore, pid)
				want(t, d, 200, "DELETE", "/containers/c/checkpoint/kept", "")
				stop(t)
			})
		}
	}
}

// startAgain starts the container, if it does not run. What a stasisd that was killed had
// begun may still be there, and has to go by itself.
func startAgain(ctx context.Context, t *testing.T, s *stack.Stack, d *stack.Stasisd, body string, pid func() int) {
	t.Helper()
	s.Poll(ctx, "the container to run", func() bool {
		if pid() != 0 {
			return true
		}
		_, _ = d.Curl("POST", "/containers/c", body)
		return false
	})
}

// TestRESTNamedKilled kills stasisd while a call of interface B waits in the OCI runtime,
// and runs it again. The container runs, or its checkpoint is whole; nothing else is left,
// and the same call succeeds.
func TestRESTNamedKilled(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	f := s.Faults()
	folders := filepath.Join(s.Dir, "checkpoints")
	must(t, os.Mkdir(folders, 0o700))
	d := s.StartStasisd("--allow-path", folders)
	root := "/run/containerd/runc/" + s.Namespace
	for name, when := range map[string]stack.When{"before": stack.Before, "after": stack.After} {
		for _, path := range []string{"/checkpoint", "/containerd/checkpoint"} {
			for _, exit := range []bool{false, true} {
				if exit && path == "/checkpoint" {
					continue // it always leaves the container running
				}
				t.Run(fmt.Sprintf("%s %s exit=%v", path, name, exit), func(t *testing.T) {
					c := s.NewContainer(ctx, "c", stack.Busybox, stack.Args("sleep", "100000"))
					c.Start(ctx)
					dir := filepath.Join(folders, strings.ReplaceAll(t.Name(), "/", "-"))
					body := func(n int) string {
						b := fmt.Sprintf(`"checkpoint_data":{"container_name":"c","checkpoint_path":"%s-%d","root":%q}`, dir, n, root)
						if path != "/checkpoint" {
							b += fmt.Sprintf(`,"rootfs_checkpoint_data":{"container_name":"c","image_ref":"stasis.test/c:1"},"leave_running":%t`, !exit)
						}
						return "{" + b + "}"
					}
					f.Hold("checkpoint", when)
					done := make(chan struct{})
					go func() {
						defer close(done)
						_, _, _ = d.CurlErr("POST", path, body(1))
					}()
					f.WaitReached(ctx, "checkpoint", when)
					d.End(syscall.SIGKILL)
					<-done
					f.Reset()
					d.Start()
					whole := func() bool { return checkpoint.Uncommitted(dir+"-1") == "" && !checkpoint.IsBeingWritten(dir+"-1") }
					s.Poll(ctx, "the shim to end what it was asked for", whole)
					if _, err := checkpoint.Open(ctx, dir+"-1"); err != nil {
						if _, serr := os.Lstat(dir + "-1"); serr == nil {
							t.Errorf("a folder that is no checkpoint: %v", err)
						}
					}
					if c.Status(ctx) == client.Running {
						c.Exec(ctx, "true") // which a frozen one cannot
						want(t, d, 200, "POST", path, body(2))
					} else if _, err := checkpoint.Open(ctx, dir+"-1"); err != nil || !exit {
						t.Errorf("the container is gone: %v", err)
					}
					s.Stasis("prune") // the folder of its work
					checkTidy(t, s)
					if c.Status(ctx) == client.Running {
						c.Kill(ctx, syscall.SIGKILL)
					}
					c.Delete(ctx)
				})
			}
		}
	}
}

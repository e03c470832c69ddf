// Package stack runs a private containerd, with Stasis as its runtime, for
// tests, benchmarks and the demo. Everything is real: containerd, the shim,
// runc or crun, CRIU, cgroups and namespaces. So it must run as root, and finds
// its programs in a cache that contrib/setup.sh fills.
//
// Every test starts its own Stack, which takes a few hundredths of a second,
// and which shares nothing with others or with the host's own containerd. When
// the test ends, the Stack deletes what is left in it and then looks for leaks:
// processes, mounts, cgroups, temporary files, sockets, network namespaces and
// firewall rules. Each is an error of the test.
//
//	func TestExitStatus(t *testing.T) {
//		s := stack.Start(t, stack.Options{})
//		ctx := s.Ctx()
//		c := s.NewContainer(ctx, "c", stack.Busybox, stack.Args("sh", "-c", "echo hi; sleep 1000"))
//		c.Start(ctx)
//		c.Stdout.WaitFor(ctx, "hi")
//		if out := c.Exec(ctx, "echo", "there"); out != "there\n" {
//			t.Errorf("exec printed %q", out)
//		}
//		if code := c.Kill(ctx, syscall.SIGKILL); code != 137 {
//			t.Errorf("exit code %d, want 137", code)
//		}
//		c.Delete(ctx)
//	}
//
// A checkpoint into a folder and a restore of it, which continue on the same
// container:
//
//	c.Checkpoint(ctx, dir, &options.CheckpointOptions{Exit: true})
//	c.Restore(ctx, dir)
//
// Methods of Stack and Container that take no error back fail the test at once,
// so they belong on the test's own goroutine. Where a test expects a failure,
// it uses the containerd client itself: Container embeds client.Container, and
// Stack.Client is the client.
//
// # Environment
//
//   - STASIS_CACHE: what contrib/setup.sh filled; ~/.cache/stasis if not set.
//   - STASIS_BIN: the folder of the shim; <repository>/bin if not set.
//   - STASIS_TEST_BIN: a folder with what BuildTestProgram builds; if not set
//     it is built when needed (a machine without Go sets it).
//   - STASIS_TEST_CONTAINERD: the release of containerd that a Stack runs whose
//     Options name none; 2.4 if not set.
//   - STASIS_TEST_SYSTEMD=1: as Options.SystemdCgroup, for every Stack.
//   - STASIS_TEST_SLOW: how many times longer than on an ordinary machine things
//     may take before a test gives up; 1 if not set. See Patience.
//   - STASIS_UPSTREAM=1: every Stack runs containerd's own shim instead of
//     Stasis, to see whether a test or Stasis is at fault.
//   - STASIS_DEBUG=1: containerd and the shims log at level debug.
//   - STASIS_KEEP=1: keep the folder of a Stack whose test failed.
package stack

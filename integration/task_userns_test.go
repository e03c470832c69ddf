package integration

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/oci"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/stasis-run/stasis/integration/stack"
)

// idMap maps a container's users to some of the host's that are no one's.
var idMap = []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100000, Size: 65536}}

// TestUserNamespace runs a container whose root is nobody on the host.
func TestUserNamespace(t *testing.T) {
	t.Parallel()
	for name, opts := range map[string]stack.Options{"runc": {}, "crun": {Crun: true}} {
		t.Run(name, func(t *testing.T) {
			s := stack.Start(t, opts)
			ctx := s.Ctx()
			c := newUserNamespaceContainer(t, s, "c", stack.Args("sh", "-c", "cat /proc/self/uid_map; id -u; exec sleep 1000"))
			c.Start(ctx)
			c.Stdout.WaitFor(ctx, "0     100000      65536\n0\n")
			if uid := strings.Fields(procField(t, int(c.Task.Pid()), "Uid"))[0]; uid != "100000" {
				t.Errorf("init has uid %s on the host, want 100000", uid)
			}
			// What exec writes by a pipe, and makes, is its own.
			if out := c.Exec(ctx, "sh", "-c", "touch /file && stat -c %u:%g /file /proc/self/fd/1"); out != "0:0\n0:0\n" {
				t.Errorf("exec printed %q", out)
			}
			if code := c.Kill(ctx, syscall.SIGKILL); code != 137 {
				t.Errorf("exit code %d, want 137", code)
			}
			c.Delete(ctx)
		})
	}
}

// newUserNamespaceContainer makes a container in a user namespace.
func newUserNamespaceContainer(t *testing.T, s *stack.Stack, name string, opts ...oci.SpecOpts) *stack.Container {
	t.Helper()
	ctx := s.Ctx()
	// Its root is one of those who must get to the rootfs.
	if err := os.Chmod(s.Dir, 0o711); err != nil {
		t.Fatal(err)
	}
	ropts := s.RuncOptions("")
	// Pipes must be the container's to open again, by /proc/self/fd.
	ropts.IoUid, ropts.IoGid = idMap[0].HostID, idMap[0].HostID
	return s.NewContainerWith(ctx, name, stack.Busybox, []client.NewContainerOpts{
		client.WithUserNSRemappedSnapshot(name+"-mapped", s.Image(ctx, stack.Busybox), idMap, idMap),
		client.WithRuntime(s.Runtime(), ropts),
	}, append([]oci.SpecOpts{oci.WithUserNamespace(idMap, idMap)}, opts...)...)
}

// TestIDMappedMount gives a container in a user namespace a folder of the host's
// root as its own root's.
func TestIDMappedMount(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	dir := filepath.Join(s.Dir, "volume")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	c := newUserNamespaceContainer(t, s, "c", stack.Args("sleep", "1000"), oci.WithMounts([]specs.Mount{{
		Destination: "/volume", Type: "bind", Source: dir, Options: []string{"rbind", "idmap"},
		UIDMappings: idMap, GIDMappings: idMap,
	}}))
	c.Start(ctx)
	if out := c.Exec(ctx, "sh", "-c", "echo data > /volume/file && stat -c %u:%g /volume /volume/file"); out != "0:0\n0:0\n" {
		t.Errorf("exec printed %q", out)
	}
	info, err := os.Stat(filepath.Join(dir, "file"))
	if err != nil {
		t.Fatal(err)
	}
	if st := info.Sys().(*syscall.Stat_t); st.Uid != 0 || st.Gid != 0 {
		t.Errorf("the file is %d:%d's on the host, want 0:0's", st.Uid, st.Gid)
	}
}

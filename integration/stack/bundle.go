package stack

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/oci"
)

// BundleDir is the folder that Bundle makes bundles in.
func (s *Stack) BundleDir() string { return s.path("bundles") }

// Bundle makes an OCI bundle of one of the stack's root filesystems.
func (s *Stack) Bundle(name, rootfs string, opts ...oci.SpecOpts) string {
	s.tb.Helper()
	dir := filepath.Join(s.BundleDir(), name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		s.tb.Fatalf("%v", err)
	}
	if out, err := exec.Command("cp", "-a", Rootfs(rootfs), filepath.Join(dir, "rootfs")).CombinedOutput(); err != nil {
		s.tb.Fatalf("cp: %v: %s", err, out)
	}
	spec, err := oci.GenerateSpec(s.Ctx(), s.Client(), &containers.Container{ID: name}, append([]oci.SpecOpts{oci.WithCgroup(s.CgroupPath(name)), oci.WithRootFSPath("rootfs"), oci.WithDefaultPathEnv}, opts...)...)
	if err != nil {
		s.tb.Fatalf("%v", err)
	}
	data, err := json.Marshal(spec)
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "config.json"), data, 0o600)
	}
	if err != nil {
		s.tb.Fatalf("%v", err)
	}
	return dir
}

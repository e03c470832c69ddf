package process

import (
	"bytes"
	"context"
)

// SupportsCheckpoint tells whether the OCI runtime, a path or a name in PATH, has the
// commands checkpoint and restore, of which those of runc are the definition. Whether
// it finds a CRIU is another question. Podman's crutils has it as
// CRRuntimeSupportsCheckpointRestore.
func SupportsCheckpoint(ctx context.Context, runtime string) bool {
	for _, command := range []string{"checkpoint", "restore"} {
		if _, err := Output(ctx, runtime, command, "--help"); err != nil {
			return false
		}
	}
	return true
}

// SupportsPodRestore tells whether the OCI runtime can restore a container into a pod
// on a host with SELinux, where the container's mounts get the pod's label
// (--lsm-mount-context, which CRIU has since 3.16). Podman's crutils has it as
// CRRuntimeSupportsPodCheckpointRestore.
func SupportsPodRestore(ctx context.Context, runtime string) bool {
	help, err := Output(ctx, runtime, "restore", "--help")
	return err == nil && bytes.Contains(help, []byte("--lsm-mount-context"))
}

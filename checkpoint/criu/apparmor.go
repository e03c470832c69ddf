package criu

import (
	"fmt"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/inventory"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/stasis-run/stasis/checkpoint"
)

// lsmConfig is what CRIU's configuration has to say for the container to run under
// the AppArmor profile of its spec: CRIU would bring back the one that each process
// had, which may be none of this host's. Processes that had none get none, and are refused
// before (package policy).
func lsmConfig(ckpt *checkpoint.Checkpoint, spec *specs.Spec) (string, error) {
	if spec.Process == nil || spec.Process.ApparmorProfile == "" {
		return "", nil
	}
	profile := spec.Process.ApparmorProfile
	inv, err := ckpt.Inventory()
	if err != nil {
		return "", err
	}
	if inv.GetLsmtype() != inventory.Lsmtype_APPARMOR || profile == checkpoint.Unconfined {
		return "", nil
	}
	// It becomes a word of a configuration file.
	if !plainWord(profile) {
		return "", fmt.Errorf("apparmorProfile %q: CRIU cannot be given a name with such characters: %w", profile, errdefs.ErrInvalidArgument)
	}
	return "lsm-profile apparmor:" + profile + "\n", nil
}

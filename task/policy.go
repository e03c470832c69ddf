package task

import (
	"context"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/policy"
)

// checks says what a checkpoint may ask for. A service has policyChecks; only tests have
// another, to refuse at a step of a restore.
type checks interface {
	// Check looks at the CRIU images, in Create.
	Check(ctx context.Context, ckpt *checkpoint.Checkpoint, spec *specs.Spec) error
	// CheckMounts looks at them again when the root filesystem is complete, in Start.
	CheckMounts(ctx context.Context, ckpt *checkpoint.Checkpoint, spec *specs.Spec, rootfs string) error
	// CheckProcesses looks at the restored processes, none of which has run.
	CheckProcesses(ctx context.Context, spec *specs.Spec, pids []int) error
}

// policyChecks is package policy.
type policyChecks struct{}

func (policyChecks) Check(ctx context.Context, ckpt *checkpoint.Checkpoint, spec *specs.Spec) error {
	return policy.Check(ctx, ckpt, spec)
}

func (policyChecks) CheckMounts(ctx context.Context, ckpt *checkpoint.Checkpoint, spec *specs.Spec, rootfs string) error {
	return policy.CheckMounts(ctx, ckpt, spec, rootfs)
}

func (policyChecks) CheckProcesses(ctx context.Context, spec *specs.Spec, pids []int) error {
	return policy.CheckProcesses(ctx, spec, pids)
}

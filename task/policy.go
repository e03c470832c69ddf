package task

import (
	"context"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/trust"
)

// policy says what a checkpoint may ask for. A service has trustPolicy; only tests have
// another, to refuse at a step of a restore.
type policy interface {
	// Check looks at the CRIU images, in Create.
	Check(ctx context.Context, ckpt *checkpoint.Checkpoint, spec *specs.Spec) error
	// CheckMounts looks at them again when the root filesystem is complete, in Start.
	CheckMounts(ctx context.Context, ckpt *checkpoint.Checkpoint, spec *specs.Spec, rootfs string) error
	// CheckProcesses looks at the restored processes, none of which has run.
	CheckProcesses(ctx context.Context, spec *specs.Spec, pids []int) error
}

// trustPolicy is package trust.
type trustPolicy struct{}

func (trustPolicy) Check(ctx context.Context, ckpt *checkpoint.Checkpoint, spec *specs.Spec) error {
	return trust.Check(ctx, ckpt, spec)
}

func (trustPolicy) CheckMounts(ctx context.Context, ckpt *checkpoint.Checkpoint, spec *specs.Spec, rootfs string) error {
	return trust.CheckMounts(ctx, ckpt, spec, rootfs)
}

func (trustPolicy) CheckProcesses(ctx context.Context, spec *specs.Spec, pids []int) error {
	return trust.CheckProcesses(ctx, spec, pids)
}

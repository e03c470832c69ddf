package rootfs

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
)

// fault is an error whose text is for people alone, and that matches one of
// errdefs' errors without carrying that one's words as well.
type fault struct {
	kind error
	text string
}

func (f *fault) Error() string { return f.text }
func (f *fault) Unwrap() error { return f.kind }

// invalid says that a tar or a list is not what it should be.
func invalid(format string, args ...any) error {
	return &fault{errdefs.ErrInvalidArgument, fmt.Sprintf(format, args...)}
}

// unusable says that something good cannot be used for this.
func unusable(format string, args ...any) error {
	return &fault{errdefs.ErrFailedPrecondition, fmt.Sprintf(format, args...)}
}

// ended returns why ctx has ended, or nil.
func ended(ctx context.Context) error {
	if ctx.Err() == nil {
		return nil
	}
	return context.Cause(ctx)
}

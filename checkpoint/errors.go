package checkpoint

import (
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

// invalid says that a checkpoint is not one, or not as it was made.
func invalid(format string, args ...any) error {
	return &fault{errdefs.ErrInvalidArgument, fmt.Sprintf(format, args...)}
}

// unusable says that a checkpoint cannot be used here and now.
func unusable(format string, args ...any) error {
	return &fault{errdefs.ErrFailedPrecondition, fmt.Sprintf(format, args...)}
}

// wrap says whose error it is.
func wrap(dir string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("checkpoint %s: %w", dir, err)
}

package image

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

// invalid says that an image is no checkpoint, or none of those we know.
func invalid(format string, args ...any) error {
	return &fault{errdefs.ErrInvalidArgument, fmt.Sprintf(format, args...)}
}

// unusable says that something else has to be done first.
func unusable(format string, args ...any) error {
	return &fault{errdefs.ErrFailedPrecondition, fmt.Sprintf(format, args...)}
}

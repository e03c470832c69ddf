// Package fault makes errors for people that programs can tell apart: the text is
// all that is shown, and errors.Is finds one of errdefs' errors, without that
// one's own words in the text.
package fault

import (
	"fmt"

	"github.com/containerd/errdefs"
)

type fault struct {
	kind error
	text string
}

func (f *fault) Error() string { return f.text }
func (f *fault) Unwrap() error { return f.kind }

// New returns an error that matches kind.
func New(kind error, format string, args ...any) error {
	return &fault{kind, fmt.Sprintf(format, args...)}
}

// Invalid says that something is not what it should be, or not as it was made:
// errdefs.ErrInvalidArgument.
func Invalid(format string, args ...any) error {
	return New(errdefs.ErrInvalidArgument, format, args...)
}

// Unusable says that something good cannot be used for this, here and now:
// errdefs.ErrFailedPrecondition.
func Unusable(format string, args ...any) error {
	return New(errdefs.ErrFailedPrecondition, format, args...)
}

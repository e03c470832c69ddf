package task

import (
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
)

// oneLine makes one line of an error of a pod's container: it becomes one of the
// pod's events.
func (c *container) oneLine(err error) error {
	if _, inPod := c.config.podNamespace(); err == nil || !inPod || !strings.Contains(err.Error(), "\n") {
		return err
	}
	var lines []string
	for line := range strings.Lines(err.Error()) {
		if line = strings.TrimSpace(line); line != "" {
			lines = append(lines, line)
		}
	}
	return &reworded{err, strings.Join(lines, "; ")}
}

// reworded is an error with other words.
type reworded struct {
	error
	text string
}

func (r *reworded) Error() string { return r.text }
func (r *reworded) Unwrap() error { return r.error }

func invalid(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}

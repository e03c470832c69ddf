package checkpoint

import (
	"fmt"
)

// wrap says whose error it is.
func wrap(dir string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("checkpoint %s: %w", dir, err)
}

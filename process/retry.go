package process

import "time"

// retry calls fn until it succeeds, a hundred times in a second at most, and
// returns its last error.
func retry(fn func() error) error {
	var err error
	for range 100 {
		if err = fn(); err == nil {
			return nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return err
}

package process

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"

	runc "github.com/containerd/go-runc"
)

// Output runs a command and returns what it writes to stdout. It waits through
// go-runc's monitor, which in a shim is the reaper: nobody else may wait for a
// child. An error has what the command wrote to stderr.
func Output(ctx context.Context, name string, args ...string) ([]byte, error) {
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	exits, err := runc.Monitor.Start(cmd)
	if err != nil {
		return nil, err
	}
	status, err := runc.Monitor.Wait(cmd, exits)
	if err == nil && status != 0 {
		err = fmt.Errorf("exit status %d", status)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %s", cmd, err, bytes.TrimSpace(stderr.Bytes()))
	}
	return stdout.Bytes(), nil
}

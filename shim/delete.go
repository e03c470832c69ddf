package shim

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/log"
	"google.golang.org/protobuf/proto"
)

// deleteTask removes what a container left whose shim died, and prints how it
// ended.
func deleteTask(ctx context.Context, f flags, stdout io.Writer, rt Runtime) error {
	if f.debug {
		_ = log.SetLevel(log.DebugLevel.String())
	}
	bundle := f.bundle
	if bundle == "" {
		// The working directory is the bundle, or for a container that shares
		// its shim, maybe that of another: all have the same parent.
		cwd, err := os.Getwd()
		if err != nil {
			return err
		}
		bundle = filepath.Join(filepath.Dir(cwd), f.id)
	}
	bundle, err := filepath.Abs(bundle)
	if err != nil {
		return err
	}
	response, err := rt.Cleanup(ctx, f.namespace, bundle, f.id)
	if err != nil {
		return err
	}
	// A shim that was killed left its socket. A live one keeps it: it may
	// serve other containers of the group.
	if data, err := os.ReadFile(filepath.Join(bundle, "address")); err == nil {
		if path, ok := strings.CutPrefix(string(data), "unix://"); ok {
			if err := removeStaleSocket(path); err != nil {
				log.G(ctx).WithError(err).Warn("remove the socket of the shim that died")
			}
		}
	}
	data, err := proto.Marshal(response)
	if err != nil {
		return fmt.Errorf("encode the answer: %w", err)
	}
	_, err = stdout.Write(data)
	return err
}

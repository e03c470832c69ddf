package checkpoint

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"

	runc "github.com/containerd/go-runc"
)

// criuConfigEnv names a configuration file for CRIU. It is the way to options
// that the runtime's command line lacks (tcp-close in runc, link-remap in crun),
// for one call of it; the file that org.criu.config names is read as well, after
// this one.
const criuConfigEnv = "CRIU_CONFIG_FILE"

// withCRIUConfig returns a context in which the runtime has CRIU read lines as
// its configuration, from a file in dir, which is the container's own: a work
// folder may serve several. Call remove when the runtime has ended.
func withCRIUConfig(ctx context.Context, dir, lines string) (_ context.Context, remove func(), _ error) {
	if lines == "" {
		return ctx, func() {}, nil
	}
	var config bytes.Buffer
	if host := os.Getenv(criuConfigEnv); host != "" {
		data, err := os.ReadFile(host)
		if err != nil {
			return nil, nil, fmt.Errorf("read CRIU's configuration of this host: %w", err)
		}
		config.Write(data)
		config.WriteByte('\n')
	}
	config.WriteString(lines)
	path := filepath.Join(dir, "criu.conf")
	if err := os.WriteFile(path, config.Bytes(), 0o600); err != nil {
		return nil, nil, fmt.Errorf("write CRIU's configuration: %w", err)
	}
	return runc.WithExtraEnv(ctx, criuConfigEnv+"="+path), func() { _ = os.Remove(path) }, nil
}

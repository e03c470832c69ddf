package criu

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"unicode"

	"github.com/containerd/cgroups/v3"
	runc "github.com/containerd/go-runc"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/stasis-run/stasis/process"
)

// criuConfigEnv names a configuration file for CRIU. It is the way to options
// that the runtime's command line lacks (tcp-close in runc, link-remap in crun),
// for one call of it; the file that org.criu.config names is read as well, after
// this one.
const criuConfigEnv = "CRIU_CONFIG_FILE"

// plainWord tells whether CRIU reads a word of its configuration as it is.
func plainWord(word string) bool {
	return word != "" && !strings.ContainsFunc(word, func(r rune) bool {
		return unicode.IsSpace(r) || unicode.IsControl(r) || strings.ContainsRune(`#"'\\`, r)
	})
}

// cgroupConfig is what CRIU's configuration has to say for a container to come back
// in the control group of its spec, on a host with version 2: runc before 1.2 leaves
// CRIU to take the group that the container was in. Newer ones say the same.
func cgroupConfig(spec *specs.Spec) string {
	if cgroups.Mode() != cgroups.Unified || spec.Linux == nil {
		return ""
	}
	group := process.GroupOf(spec.Linux.CgroupsPath)
	if group == "/" || !plainWord(group) {
		return "" // the runtime chooses one
	}
	return "cgroup-root " + group + "\n"
}

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

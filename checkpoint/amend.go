package checkpoint

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// ActionLoopback is the argument with which the program RestoreRequest.Self
// names runs LoopbackHook.
const ActionLoopback = "loopback"

// annotationCRIUConfig names a CRIU configuration file for runc and crun. It is
// the way to options that the runtime's command line lacks (tcp-close in runc).
const annotationCRIUConfig = "org.criu.config"

// runtimeCRIUConfigs are the files that the runtimes use without the
// annotation.
var runtimeCRIUConfigs = []string{"/etc/criu/runc.conf", "/etc/criu/crun.conf"}

// amendSpec changes the bundle's config.json for a restore: criuConfig, if not
// empty, are lines for a CRIU configuration file, and a network namespace of the
// container's own needs a hook that brings its loopback device up. Done once, it
// serves further tries of the same restore.
func (r *RestoreRequest) amendSpec(criuConfig string) error {
	changes := map[string]any{}
	if criuConfig != "" {
		current := r.Spec.Annotations[annotationCRIUConfig]
		if err := writeCRIUConfig(r.criuConfigPath(), current, criuConfig); err != nil {
			return fmt.Errorf("write CRIU's configuration: %w", err)
		}
		if current != r.criuConfigPath() {
			if r.Spec.Annotations == nil {
				r.Spec.Annotations = map[string]string{}
			}
			r.Spec.Annotations[annotationCRIUConfig] = r.criuConfigPath()
			changes["annotations"] = r.Spec.Annotations
		}
	}
	if _, own := networkNamespace(r.Spec); own && !r.hasLoopbackHook() {
		if r.Spec.Hooks == nil {
			r.Spec.Hooks = &specs.Hooks{}
		}
		// The first, as others may want to use the network.
		r.Spec.Hooks.CreateRuntime = append([]specs.Hook{{
			Path: r.Self,
			Args: []string{filepath.Base(r.Self), ActionLoopback},
		}}, r.Spec.Hooks.CreateRuntime...)
		changes["hooks"] = r.Spec.Hooks
	}
	if len(changes) == 0 {
		return nil
	}
	return rewriteSpec(filepath.Join(r.Bundle, "config.json"), changes)
}

func (r *RestoreRequest) hasLoopbackHook() bool {
	return r.Spec.Hooks != nil && len(r.Spec.Hooks.CreateRuntime) > 0 && r.Spec.Hooks.CreateRuntime[0].Path == r.Self
}

func (r *RestoreRequest) criuConfigPath() string { return filepath.Join(r.Bundle, "criu.conf") }

// endCRIUConfig takes the lines out of CRIU's configuration file again: the
// runtime will use it in further checkpoints of the container too, and they
// decide for themselves.
func (r *RestoreRequest) endCRIUConfig(lines string) error {
	if lines == "" {
		return nil
	}
	data, err := os.ReadFile(r.criuConfigPath())
	if err != nil {
		return err
	}
	return os.WriteFile(r.criuConfigPath(), bytes.TrimSuffix(data, []byte(lines)), 0o600)
}

// writeCRIUConfig writes a CRIU configuration file: the file that the runtime
// would have used, and lines.
func writeCRIUConfig(path, base, lines string) error {
	candidates := runtimeCRIUConfigs
	if base != "" {
		candidates = []string{base}
	}
	var config strings.Builder
	for _, c := range candidates {
		data, err := os.ReadFile(c)
		if errors.Is(err, os.ErrNotExist) && base == "" {
			continue
		}
		if err != nil {
			return err
		}
		config.Write(data)
		if !bytes.HasSuffix(data, []byte("\n")) {
			config.WriteByte('\n')
		}
		break
	}
	config.WriteString(lines)
	return os.WriteFile(path, []byte(config.String()), 0o600)
}

// rewriteSpec replaces some of config.json's keys and leaves the rest as it is,
// what this build does not know included.
func rewriteSpec(path string, changes map[string]any) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var config map[string]json.RawMessage
	if err := json.Unmarshal(data, &config); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	for key, value := range changes {
		if config[key], err = json.Marshal(value); err != nil {
			return err
		}
	}
	if data, err = json.Marshal(config); err != nil {
		return err
	}
	tmp := path + ".tmp"
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

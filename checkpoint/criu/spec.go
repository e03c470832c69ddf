package criu

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// ActionLoopback is the argument with which the program RestoreRequest.Self
// names runs LoopbackHook.
const ActionLoopback = "loopback"

// patchSpec changes the bundle's config.json for a restore: a network namespace
// of the container's own needs a hook that brings its loopback device up. Done again,
// for a further try of the same restore, it changes nothing. r.Spec stays as it is.
func (r *RestoreRequest) patchSpec() error {
	if _, own := networkNamespace(r.Spec); !own || r.hasLoopbackHook() {
		return nil
	}
	hooks := specs.Hooks{}
	if r.Spec.Hooks != nil {
		hooks = *r.Spec.Hooks
	}
	// The first, as others may want to use the network.
	hooks.CreateRuntime = append([]specs.Hook{{
		Path: r.Self,
		Args: []string{filepath.Base(r.Self), ActionLoopback},
	}}, hooks.CreateRuntime...)
	return rewriteSpec(filepath.Join(r.Bundle, "config.json"), map[string]any{"hooks": hooks})
}

func (r *RestoreRequest) hasLoopbackHook() bool {
	return r.Spec.Hooks != nil && len(r.Spec.Hooks.CreateRuntime) > 0 && r.Spec.Hooks.CreateRuntime[0].Path == r.Self
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

package oci

import (
	"encoding/json"
	"fmt"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/fault"
)

// checkSpec refuses a spec that is no JSON object.
func checkSpec(data []byte) error {
	if err := capture.CheckJSON(data); err != nil {
		return err
	}
	var object map[string]json.RawMessage
	if err := json.Unmarshal(data, &object); err != nil {
		return fault.Invalid("no valid JSON object: %v", err)
	}
	if object == nil {
		return fault.Invalid("no JSON object")
	}
	return nil
}

// named says of which file an error is.
func named(name string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", name, err)
}

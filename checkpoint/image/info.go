package image

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/fault"
)

// encodeInfo makes info.json.
func encodeInfo(i capture.Info) ([]byte, error) {
	i.Version = formatVersion
	return json.Marshal(i)
}

// decodeInfo reads info.json. It refuses keys that it does not know: they would
// be something that the writer found necessary to say.
func decodeInfo(data []byte) (capture.Info, error) {
	var head struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(data, &head); err != nil {
		return capture.Info{}, fault.Invalid("no valid JSON: %v", err)
	}
	switch {
	case head.Version > formatVersion:
		return capture.Info{}, fault.Unusable("format version %d is newer than %d, the newest this Stasis knows; use a newer Stasis", head.Version, formatVersion)
	case head.Version < 1:
		return capture.Info{}, fault.Invalid("no valid format version (%d)", head.Version)
	}
	var i capture.Info
	if err := strictJSON(data, &i); err != nil {
		return capture.Info{}, err
	}
	return i, nil
}

// checkSpec refuses a spec that is no JSON object.
func checkSpec(data []byte) error {
	var object map[string]json.RawMessage
	if err := json.Unmarshal(data, &object); err != nil {
		return fault.Invalid("no valid JSON object: %v", err)
	}
	if object == nil {
		return fault.Invalid("no JSON object")
	}
	return nil
}

// strictJSON decodes one value and refuses keys that it has no place for.
func strictJSON(data []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return fault.Invalid("no valid JSON: %v", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return fault.Invalid("more after the JSON")
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

package capture

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"

	"github.com/stasis-run/stasis/checkpoint/fault"
)

// InfoVersion is Info's as JSON.
const InfoVersion = 1

// MaxInfo bounds an info.json, in bytes.
const MaxInfo = 16 << 20

// EncodeInfo makes info.json.
func EncodeInfo(i Info) ([]byte, error) {
	i.Version = InfoVersion
	return json.Marshal(i)
}

// DecodeInfo reads info.json. It refuses keys that it does not know: they would
// be something that the writer found necessary to say.
func DecodeInfo(data []byte) (Info, error) {
	if err := CheckJSON(data); err != nil {
		return Info{}, err
	}
	var head struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(data, &head); err != nil {
		return Info{}, fault.Invalid("no valid JSON: %v", err)
	}
	switch {
	case head.Version > InfoVersion:
		return Info{}, fault.Unusable("format version %d is newer than %d, the newest this Stasis knows; use a newer Stasis", head.Version, InfoVersion)
	case head.Version < 1:
		return Info{}, fault.Invalid("no valid format version (%d)", head.Version)
	}
	var i Info
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(&i); err != nil {
		return Info{}, fault.Invalid("no valid JSON: %v", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return Info{}, fault.Invalid("more after the JSON")
	}
	return i, nil
}

package allow

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"reflect"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/stasis-run/stasis/checkpoint/fault"
)

// maxUnknown bounds how many unknown fields Parse names.
const maxUnknown = 20

// Parse reads a spec. unknown are the fields that the runtime specification, as
// this version knows it, does not have, at most a handful.
func Parse(data []byte) (spec *specs.Spec, unknown []string, _ error) {
	spec = &specs.Spec{}
	d := json.NewDecoder(bytes.NewReader(data))
	if err := d.Decode(spec); err != nil {
		return nil, nil, fault.Invalid("the spec in the checkpoint: %v", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, nil, fault.Invalid("the spec in the checkpoint: more after the JSON")
	}
	if spec.Process == nil || spec.Linux == nil || spec.Root == nil {
		return nil, nil, fault.Invalid("the spec in the checkpoint describes no Linux container")
	}
	var tree any
	if err := json.Unmarshal(data, &tree); err != nil {
		return nil, nil, fault.Invalid("the spec in the checkpoint: %v", err)
	}
	unknownFields("", tree, reflect.TypeFor[specs.Spec](), &unknown)
	return spec, unknown, nil
}

// unknownFields finds the keys of a JSON value for which a type has no field.
func unknownFields(path string, v any, t reflect.Type, found *[]string) {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	switch v := v.(type) {
	case []any:
		if t.Kind() != reflect.Slice {
			return
		}
		for _, e := range v {
			unknownFields(path+"[]", e, t.Elem(), found)
		}
	case map[string]any:
		for _, key := range slices.Sorted(maps.Keys(v)) {
			at := strings.TrimPrefix(path+"."+key, ".")
			switch t.Kind() {
			case reflect.Map:
				unknownFields(at, v[key], t.Elem(), found)
			case reflect.Struct:
				if f := fieldOf(t, key); f != nil {
					unknownFields(at, v[key], f, found)
				} else if len(*found) < maxUnknown && !slices.Contains(*found, at) {
					*found = append(*found, at)
				}
			}
		}
	}
}

// fieldOf returns the type of a struct's field by its name in JSON, or nil. Like
// encoding/json it passes over the case of letters.
func fieldOf(t reflect.Type, key string) reflect.Type {
	for _, f := range reflect.VisibleFields(t) {
		if name, _, _ := strings.Cut(f.Tag.Get("json"), ","); !f.Anonymous && strings.EqualFold(name, key) {
			return f.Type
		}
	}
	return nil
}

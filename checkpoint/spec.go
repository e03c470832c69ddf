package checkpoint

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"strings"

	"github.com/stasis-run/stasis/checkpoint/fault"
)

// Unconfined is the AppArmor profile that confines nothing.
const Unconfined = "unconfined"

// maxSpecDepth is far more than a spec has of objects within objects.
const maxSpecDepth = 64

// SpecDigest is "sha256:" and the digest in hex of a container's spec, however that is
// written: formats of a checkpoint keep what it says, and not each blank. What it is of:
// the JSON without blanks, keys sorted, "annotations" left out if there are none.
//
// A spec that says something twice is an error: readers disagree on what counts.
func SpecDigest(spec []byte) (string, error) {
	d := json.NewDecoder(bytes.NewReader(spec))
	d.UseNumber()
	value, err := onlyOnce(d, 0)
	if err == nil {
		if _, err = d.Token(); errors.Is(err, io.EOF) {
			err = nil
		} else if err == nil {
			err = errors.New("something follows it")
		}
	}
	object, ok := value.(map[string]any)
	if err == nil && !ok {
		err = errors.New("no object")
	}
	if err != nil {
		return "", fault.Invalid("no valid spec of a container: %v", err)
	}
	if as, ok := object["annotations"].(map[string]any); ok && len(as) == 0 {
		delete(object, "annotations")
	}
	data, err := json.Marshal(object)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(data)
	return "sha256:" + hex.EncodeToString(sum[:]), nil
}

// onlyOnce decodes a value in which no object has two keys that a decoder could take
// for the same: Go's does not tell upper case from lower.
func onlyOnce(d *json.Decoder, depth int) (any, error) {
	token, err := d.Token()
	if err != nil {
		return nil, err
	}
	if depth > maxSpecDepth {
		return nil, errors.New("too deep")
	}
	switch token {
	case json.Delim('['):
		list := []any{}
		for d.More() {
			value, err := onlyOnce(d, depth+1)
			if err != nil {
				return nil, err
			}
			list = append(list, value)
		}
		_, err := d.Token()
		return list, err
	case json.Delim('{'):
		object, seen := map[string]any{}, map[string]bool{}
		for d.More() {
			key, err := d.Token()
			if err != nil {
				return nil, err
			}
			name := key.(string)
			folded := strings.ToUpper(strings.ToLower(name))
			if seen[folded] {
				return nil, fault.Invalid("%.80q is there twice", name)
			}
			seen[folded] = true
			if object[name], err = onlyOnce(d, depth+1); err != nil {
				return nil, err
			}
		}
		_, err := d.Token()
		return object, err
	}
	return token, nil
}

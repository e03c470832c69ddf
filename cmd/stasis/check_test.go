package main

import (
	"encoding/json"
	"testing"

	"github.com/stasis-run/stasis/node"
)

// Without containerd a host is not fit.
func TestCheck(t *testing.T) {
	code, out, errs := stasis(t, "check", "-o", "json")
	var r struct {
		Fit      bool
		Findings []node.Finding
	}
	must0(t, json.Unmarshal([]byte(out), &r))
	if code != exitFailed || errs != "" || r.Fit || len(r.Findings) < 5 {
		t.Errorf("exit code %d, %q, %+v", code, errs, r)
	}
}

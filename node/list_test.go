package node

import (
	"slices"
	"testing"

	"github.com/stasis-run/stasis/checkpoint/sign"
)

// Of several signers, the one that is shown is trusted here if one of them is.
func TestTrustedFirst(t *testing.T) {
	keys := []sign.Signer{{KeyID: "own", Own: true}, {KeyID: "other"}}
	for _, tc := range []struct {
		ids, want []string
		trusted   bool
	}{
		{nil, nil, false},
		{[]string{"x"}, []string{"x"}, false},
		{[]string{"own"}, []string{"own"}, true},
		{[]string{"x", "other"}, []string{"other", "x"}, true},
		{[]string{"x", "other", "y", "own"}, []string{"other", "own", "x", "y"}, true},
	} {
		ids := slices.Clone(tc.ids)
		if trusted := trustedFirst(ids, keys); trusted != tc.trusted || !slices.Equal(ids, tc.want) {
			t.Errorf("%q: %q, %v; want %q, %v", tc.ids, ids, trusted, tc.want, tc.trusted)
		}
	}
}

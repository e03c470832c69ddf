package node

import (
	"strings"
	"unicode"

	"github.com/docker/go-units"
)

// Printable replaces what would move the cursor or change the terminal: names
// in a checkpoint are whatever its maker wanted.
func Printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return unicode.ReplacementChar
	}, s)
}

// Size is a number of bytes for people.
func Size(n int64) string { return units.BytesSize(float64(n)) }

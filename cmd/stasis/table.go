package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"

	"github.com/stasis-run/stasis/node"
)

// table prints rows in columns for people.
type table struct {
	w *tabwriter.Writer
}

// newTable begins a table; without columns it has no heading.
func newTable(out io.Writer, columns ...string) *table {
	t := &table{tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)}
	if len(columns) > 0 {
		fmt.Fprintln(t.w, strings.Join(columns, "\t"))
	}
	return t
}

// row adds a row. An empty cell is a dash, so that columns stay columns for awk.
func (t *table) row(cells ...string) {
	for i, c := range cells {
		if c == "" {
			c = "-"
		}
		cells[i] = node.Printable(c)
	}
	fmt.Fprintln(t.w, strings.Join(cells, "\t"))
}

// end prints what was added.
func (t *table) end() error { return t.w.Flush() }

// printJSON prints a value for programs: one document, indented.
func printJSON(out io.Writer, v any) error {
	e := json.NewEncoder(out)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// size is a number of bytes for people.
func size(n int64) string { return node.Size(n) }

// ago is a time for people.
func ago(t, now time.Time) string {
	if t.IsZero() {
		return ""
	}
	return units.HumanDuration(now.Sub(t)) + " ago"
}

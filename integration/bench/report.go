package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
)

// report is the outcome of a run.
type report struct {
	Machine machine `json:"machine"`
	Rows    []*row  `json:"rows"`
}

// row is one thing that was measured.
type row struct {
	Name string
	Unit string
	// Target is what Stasis is meant to reach, if anything.
	Target target
	// samples are by contender, in the order of the rounds.
	samples map[string][]float64
}

// target is a bound on the ratio of Stasis to another contender; without one, on Stasis's
// own median.
type target struct {
	of  string
	max float64
}

func (r *row) add(contender string, value float64) {
	if r.samples == nil {
		r.samples = map[string][]float64{}
	}
	r.samples[contender] = append(r.samples[contender], value)
}

// ratio is that of Stasis to the other, and whether there is one.
func (r *row) ratio(other string) (float64, bool) {
	if len(r.samples[other]) == 0 {
		return 0, false
	}
	return pairedRatio(r.samples[stasis], r.samples[other]), true
}

// met tells whether the target is met: to two digits, which is as much as a
// measurement can tell.
func (r *row) met() bool {
	if r.Target.of == "" {
		return quantile(r.samples[stasis], 0.5) <= r.Target.max
	}
	ratio, ok := r.ratio(r.Target.of)
	return ok && ratio < r.Target.max+0.005
}

// print prints a table.
func (r *report) print(w io.Writer) {
	m := r.Machine
	fmt.Fprintf(w, "\n%s, %d × %s, %s, Linux %s\n", m.Time.Format("2006-01-02"), m.Cores, m.CPU, m.Memory, m.Kernel)
	for i, v := range m.Versions {
		fmt.Fprintf(w, "%s%s %s", map[bool]string{true: ", "}[i > 0], v.Program, v.Version)
	}
	fmt.Fprint(w, "\n\nMedian (95th percentile); ratios are medians of those within a round.\n\n")
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "\tstasis\tupstream\trunc\tpodman\tcommand line\t/upstream\t/runc\t/podman\t/command line\ttarget")
	for _, row := range r.Rows {
		cells := []string{row.Name}
		for _, contender := range []string{stasis, upstream, raw, podmanName, cli} {
			cells = append(cells, row.cell(contender))
		}
		for _, other := range []string{upstream, raw, podmanName, cli} {
			if ratio, ok := row.ratio(other); ok {
				cells = append(cells, fmt.Sprintf("%.2f", ratio))
			} else {
				cells = append(cells, "")
			}
		}
		if row.Target.max != 0 {
			verdict := "missed"
			if row.met() {
				verdict = "met"
			}
			of := row.Target.of
			if of == "" {
				of = row.Unit
			}
			cells = append(cells, fmt.Sprintf("≤ %.4g %s: %s", row.Target.max, of, verdict))
		}
		fmt.Fprintln(t, strings.Join(cells, "\t"))
	}
	t.Flush()
}

func (r *row) cell(contender string) string {
	v := r.samples[contender]
	if len(v) == 0 {
		return "-"
	}
	// Three digits of a millisecond's worth are noise.
	format := "%.1f"
	median := quantile(v, 0.5)
	if median >= 100 {
		format = "%.0f"
	}
	return fmt.Sprintf(format+" ("+format+") %s", median, quantile(v, 0.95), r.Unit)
}

// MarshalJSON implements json.Marshaler.
func (r *row) MarshalJSON() ([]byte, error) {
	type figure struct {
		Median  float64   `json:"median"`
		P95     float64   `json:"p95"`
		Samples []float64 `json:"samples"`
	}
	type bound struct {
		Of  string  `json:"of"`
		Max float64 `json:"max"`
		Met bool    `json:"met"`
	}
	out := struct {
		Name    string             `json:"name"`
		Unit    string             `json:"unit"`
		Figures map[string]figure  `json:"figures"`
		Ratios  map[string]float64 `json:"ratios"` // Stasis's to each other contender
		Target  *bound             `json:"target,omitempty"`
	}{Name: strings.TrimSpace(r.Name), Unit: r.Unit, Figures: map[string]figure{}, Ratios: map[string]float64{}}
	for contender, v := range r.samples {
		out.Figures[contender] = figure{quantile(v, 0.5), quantile(v, 0.95), v}
		if ratio, ok := r.ratio(contender); ok && contender != stasis {
			out.Ratios[contender] = ratio
		}
	}
	if r.Target.max != 0 {
		out.Target = &bound{r.Target.of, r.Target.max, r.met()}
	}
	return json.Marshal(out)
}

// write writes all figures to a file.
func (r *report) write(path string) error {
	data, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, append(data, '\n'), 0o644)
}

package main

import (
	"math"
	"slices"
	"time"
)

// A contender is one of those that a row compares.
type contender struct {
	name string
	// once does the thing once and returns a value for each of the rows.
	once func() []float64
}

// rounds runs the contenders in turn, n times each after one round that does
// not count. Each round begins with another of them, so that none always comes
// after the same.
func (b *bench) rounds(n int, rows []*row, contenders ...contender) {
	for round := range n + 1 {
		if b.ctx.Err() != nil {
			b.tb.Fatalf("interrupted")
		}
		for i := range contenders {
			c := contenders[(round+i)%len(contenders)]
			values := c.once()
			if round == 0 {
				continue
			}
			for j, row := range rows {
				row.add(c.name, values[j])
			}
		}
	}
	b.report.Rows = append(b.report.Rows, rows...)
}

func ms(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e6 }

// since is for timing one thing.
func since(t time.Time) []float64 { return []float64{ms(time.Since(t))} }

// quantile returns the q-quantile of values, by linear interpolation.
func quantile(values []float64, q float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	v := slices.Sorted(slices.Values(values))
	at := q * float64(len(v)-1)
	i := int(at)
	if i+1 == len(v) {
		return v[i]
	}
	return v[i] + (at-float64(i))*(v[i+1]-v[i])
}

// pairedRatio is the median of the ratios a/b of each round.
func pairedRatio(a, b []float64) float64 {
	var ratios []float64
	for i := range min(len(a), len(b)) {
		ratios = append(ratios, a[i]/b[i])
	}
	return quantile(ratios, 0.5)
}

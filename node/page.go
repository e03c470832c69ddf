package node

import (
	_ "embed"
	"fmt"
	"html/template"
	"io"
	"math"
	"strings"

	"github.com/stasis-run/stasis/checkpoint/inspect"
)

//go:embed page.html
var pageHTML string

// page is what WritePage fills in. It refers to nothing
// outside, and html/template escapes whatever the processes named themselves.
var page = template.Must(template.New("inspect").Funcs(template.FuncMap{
	"size": Size, "bars": memoryBars, "width": mapWidth,
	"indent": func(n int) string { return strings.Repeat("\u2003", min(n, 40)) },
	"needs":  NeedsFacts,
	"sub60":  func(saved float64) float64 { return 60 - saved },
}).Parse(pageHTML))

// WritePage writes what is in a checkpoint as a page of HTML, with a map of the memory.
func (in *Inspection) WritePage(w io.Writer, name string) error {
	return page.Execute(w, struct {
		Name  string
		Facts []Fact
		*inspect.Report
	}{name, in.Facts(), in.Report})
}

// mapWidth is that of the memory map in pixels.
func mapWidth() int { return 1000 }

// bar is one mapping in the picture of the memory of a process.
type bar struct {
	X, Width float64 // pixels
	Saved    float64 // height of the part that the checkpoint holds, of 60
	Kind     string
	Title    string
}

// memoryBars draws the mappings in the order of their addresses. Those are far
// too sparse for a scale, and sizes too different: the width grows with the
// square root of the size.
func memoryBars(m inspect.Memory) (bars []bar) {
	shown := m.Mappings[:min(len(m.Mappings), 2000)]
	var total float64
	for _, a := range shown {
		total += math.Sqrt(float64(a.Size))
	}
	x := 0.0
	for _, a := range shown {
		if a.Size <= 0 {
			continue
		}
		width := float64(mapWidth()) * math.Sqrt(float64(a.Size)) / total
		bars = append(bars, bar{x, width, 60 * float64(a.Dumped) / float64(a.Size), a.Kind,
			fmt.Sprintf("%s %s %s: %s, %s saved", a.Start, a.Protection, a.What(), Size(a.Size), Size(a.Dumped))})
		x += width
	}
	return bars
}

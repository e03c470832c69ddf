package task

import (
	"go/ast"
	"go/parser"
	"go/token"
	"strings"
	"testing"
)

// The table in the comment on the states is what people read; the code has to
// agree with it.
func TestTableIsTheCode(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "state.go", nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	var comment string
	for _, d := range file.Decls {
		if g, ok := d.(*ast.GenDecl); ok && g.Tok == token.CONST && strings.Contains(g.Doc.Text(), "start pause") {
			comment = g.Doc.Text()
		}
	}
	columns := []string{"start", "pause", "resume", "checkpoint", "update", "exec", "kill", "resize", "delete"}
	var header string
	rows := 0
	for line := range strings.Lines(comment) {
		line = strings.TrimRight(line, "\n")
		if strings.Contains(line, "start pause") {
			header = line
			continue
		}
		name, _, _ := strings.Cut(strings.TrimSpace(line), " ")
		for s := Created; s <= Stopped; s++ {
			if name != strings.ToUpper(s.String()[:1])+s.String()[1:] || !strings.Contains(line, " x") {
				continue
			}
			rows++
			for o, column := range columns {
				at := strings.Index(header, column)
				cell := ""
				if at < len(line) {
					cell = line[at:min(len(line), at+len(column))]
				}
				if marked := strings.Contains(cell, "x"); marked != allowed[s][o] {
					t.Errorf("%s, %s: the comment says %v, the code %v", s, column, marked, allowed[s][o])
				}
			}
		}
	}
	if rows != len(stateNames) {
		t.Errorf("found %d rows, want %d:\n%s", rows, len(stateNames), comment)
	}
}

func TestCheckNamesTheState(t *testing.T) {
	err := Paused.check(opExec, "container", "db")
	if err == nil || !strings.Contains(err.Error(), "cannot exec in a paused container: db is paused") {
		t.Errorf("error %v", err)
	}
	if err := Running.check(opPause, "container", "db"); err != nil {
		t.Error(err)
	}
}

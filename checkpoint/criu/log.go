package criu

import (
	"bytes"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/stasis-run/stasis/checkpoint/capture"
)

const (
	// logTail is how many bytes of a log's end are searched for errors: CRIU
	// stops soon after one, so the reason is there.
	logTail = 1 << 20
	logHead = 8 << 10
	// logLine is in bytes, of a line that is handed on.
	logLine = 400
)

// logError is one of CRIU's own error lines. It follows the time and, within a
// restored task, that task's pid, and names the line of CRIU's source.
//
//	(00.107297)      1: Error (criu/tty.c:1435): tty: No task found with sid 5
var logError = lazyRegexp(`^(?:\(\d+\.\d+\) *)?(?:\d+: *)?(Error \([^() ]+:\d+\): .*)$`)

// logConsequences are errors that only say that there was another.
var logConsequences = []string{
	"Dumping FAILED", "Restoring FAILED", "Pre-dumping FAILED", ": Dump files (pid:", "Unable to open fd=",
	"killed by signal 9", "exited, status=", "recv req error",
}

// logHarmless are errors that CRIU prints in runs that succeed.
var logHarmless = []string{
	"Can't setup RLIMIT_NOFILE for self", "Unexpected EOF on (empty-image)",
}

// LogErrors returns CRIU's own error lines from a dump.log or restore.log, in
// their order, without time and pid, each once: at most the last limit, and what
// only says that there was an error only if that is all there is. A log that
// cannot be read has none.
func LogErrors(path string, limit int) []string {
	data, err := capture.ReadPart(path, logTail, true)
	if err != nil {
		return nil
	}
	return logErrors(data, limit)
}

func logErrors(data []byte, limit int) []string {
	var causes, consequences []string
	for line := range bytes.Lines(data) {
		m := logError().FindSubmatch(bytes.TrimRight(line, "\r\n"))
		if m == nil {
			continue
		}
		text := printable(m[1])
		is := func(part string) bool { return strings.Contains(text, part) }
		list := &causes
		switch {
		case slices.ContainsFunc(logHarmless, is):
			continue
		case slices.ContainsFunc(logConsequences, is):
			list = &consequences
		}
		if !slices.Contains(*list, text) {
			*list = append(*list, text)
		}
		// Only the last are of interest; a log may have any number.
		if len(*list) > limit {
			*list = (*list)[1:]
		}
	}
	if len(causes) == 0 {
		return consequences
	}
	return causes
}

var logVersion = lazyRegexp(`(?m)^(?:\(\d+\.\d+\) *)?Version: (\d[0-9A-Za-z.+~-]{0,40})(?: |$)`)

// lazyRegexp compiles a regular expression at its first use. There is a shim for
// every pod, and most never need any of them: not their memory, nor the time
// that they would take at the shim's start.
func lazyRegexp(expr string) func() *regexp.Regexp {
	return sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(expr) })
}

// LogVersion returns the version that CRIU writes at the head of its logs, such
// as "4.2.1", or "" if there is none.
func LogVersion(path string) string {
	data, err := capture.ReadPart(path, logHead, false)
	if err != nil {
		return ""
	}
	if m := logVersion().FindSubmatch(data); m != nil {
		return string(m[1])
	}
	return ""
}

// printable makes one line of text of what may be anything: a log quotes names
// that the container's processes chose.
func printable(b []byte) string {
	s := strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r == '\uFFFD' {
			return '?'
		}
		return r
	}, strings.ToValidUTF8(string(b[:min(len(b), logLine)]), "?"))
	if len(b) > logLine {
		s += "…"
	}
	return s
}

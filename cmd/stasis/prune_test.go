package main

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/image"
)

func TestPruneChooses(t *testing.T) {
	now := time.Date(2026, 1, 10, 0, 0, 0, 0, time.UTC)
	entry := func(ref, container string, days int, pod *capture.Pod) listed {
		info := capture.Info{ContainerName: container, ContainerID: container + "-id", Pod: pod}
		return listed{Ref: ref, Created: now.AddDate(0, 0, -days), Summary: image.Summary{Form: image.Runnable, Info: info}}
	}
	pod := &capture.Pod{Name: "p", Namespace: "n"}
	// The newest first, as checkpoints returns them.
	all := []listed{
		entry("db:1", "db", 1, nil), entry("web:1", "web", 2, nil), entry("db:3", "db", 3, nil),
		entry("pod:4", "db", 4, pod), entry("db:5", "db", 5, nil), entry("web:6", "web", 6, nil),
	}
	day := age(24 * time.Hour)
	for _, tc := range []struct {
		name  string
		flags pruneFlags
		want  []string
	}{
		{"nothing said", pruneFlags{keep: -1}, nil},
		{"keep none", pruneFlags{keep: 0}, []string{"db:1", "web:1", "db:3", "pod:4", "db:5", "web:6"}},
		{"keep one of each", pruneFlags{keep: 1}, []string{"db:3", "db:5", "web:6"}},
		{"old", pruneFlags{keep: -1, olderThan: 4 * day}, []string{"pod:4", "db:5", "web:6"}},
		{"old, but keep", pruneFlags{keep: 1, olderThan: 4 * day}, []string{"db:5", "web:6"}},
		{"by name, not the pod's", pruneFlags{keep: 2, container: "web"}, nil},
		{"by ID", pruneFlags{keep: 1, container: "web-id"}, []string{"web:6"}},
		{"by pod", pruneFlags{keep: 0, container: "n/p/db"}, []string{"pod:4"}},
	} {
		var got []string
		for _, l := range tc.flags.choose(all, now) {
			got = append(got, l.Ref)
		}
		if !slices.Equal(got, tc.want) {
			t.Errorf("%s: %v, want %v", tc.name, got, tc.want)
		}
	}
}

func TestAge(t *testing.T) {
	for s, want := range map[string]time.Duration{"90m": 90 * time.Minute, "7d": 7 * 24 * time.Hour, "1.5d": 36 * time.Hour, "d": 0, "-1h": 0, "": 0, "7": 0} {
		var a age
		err := a.Set(s)
		if time.Duration(a) != want || (err == nil) != (want > 0) {
			t.Errorf("%q: %v, %v", s, a.String(), err)
		}
	}
}

// What nobody works at any more is removed, and nothing else.
func TestPruneLeftovers(t *testing.T) {
	state := filepath.Join(t.TempDir(), "state")
	a := &app{state: state}
	busy, err := a.newWork()
	must0(t, err)
	crashed, err := a.newWork()
	must0(t, err)
	must0(t, os.WriteFile(filepath.Join(crashed.dir, "pages-1.img"), []byte("x"), 0o600))
	crashed.release() // as the end of its process does
	must0(t, os.WriteFile(filepath.Join(state, "work", "file"), nil, 0o600))

	run := func(args ...string) string {
		code, out, errs := stasis(t, append([]string{"--state", state, "prune"}, args...)...)
		if code != 0 {
			t.Fatalf("exit code %d: %s", code, errs)
		}
		return out
	}
	if out := run("--dry-run"); out != crashed.dir+"\n" {
		t.Errorf("%q", out)
	}
	if out := run(); out != crashed.dir+"\n" {
		t.Errorf("%q", out)
	}
	if out := run(); out != "" {
		t.Errorf("a second time: %q", out)
	}
	if _, err := os.Stat(busy.dir); err != nil {
		t.Error(err)
	}
	must0(t, busy.remove())
}

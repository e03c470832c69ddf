package criu

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestLogErrors(t *testing.T) {
	for _, tc := range []struct {
		log  string
		want []string
	}{
		{"dump-tcp.log", []string{"Error (criu/sk-inet.c:200): inet: Connected TCP socket, consider using --tcp-established option."}},
		{"restore-net.log", []string{"Error (soccr/soccr.c:529): Can't connect inet socket back: Network is unreachable"}},
		{"restore-unix.log", []string{"Error (criu/sk-unix.c:1406): unix: Can't connect 89478 socket: No such file or directory"}},
		{"dump-good.log", nil},
		{"none.log", nil},
	} {
		if got := LogErrors(filepath.Join("testdata", "logs", tc.log), 4); !slices.Equal(got, tc.want) {
			t.Errorf("%s: %q, want %q", tc.log, got, tc.want)
		}
	}
}

func TestLogErrorsOf(t *testing.T) {
	for _, tc := range []struct {
		name, log string
		want      []string
	}{
		{"only the consequence", "(00.1) Error (criu/cr-dump.c:1): Dumping FAILED.\n", []string{"Error (criu/cr-dump.c:1): Dumping FAILED."}},
		{"the last two, once each", "Error (a.c:1): one\n(0.1)     7: Error (a.c:2): two\nError (a.c:3): three\nError (a.c:2): two\n",
			[]string{"Error (a.c:2): two", "Error (a.c:3): three"}},
		{"what is no error of CRIU's", "Error: x\n(0.1) Warn  (criu/x.c:1): y\nsome Error (a.c:1): z\nError (a b.c:1): z\n", nil},
		{"control characters", "Error (a.c:1): a\x1b[2Jb\xffc\r\n", []string{"Error (a.c:1): a?[2Jb?c"}},
		{"no end of line", "Error (a.c:1): cut o", []string{"Error (a.c:1): cut o"}},
	} {
		if got := logErrors([]byte(tc.log), 2); !slices.Equal(got, tc.want) {
			t.Errorf("%s: %q, want %q", tc.name, got, tc.want)
		}
	}
}

// A log of any size is searched at its end only.
func TestLogErrorsOfHugeLog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "dump.log")
	f, err := os.Create(path)
	must(t, err)
	fmt.Fprintln(f, "(00.000081) Version: 4.2.1 (gitid 0)")
	must(t, f.Truncate(8<<30))
	_, err = f.Seek(0, 2)
	must(t, err)
	fmt.Fprintf(f, "\n(01.0) Error (a.c:1): %s\n", strings.Repeat("long ", 1000))
	must(t, f.Close())
	got := LogErrors(path, 4)
	if len(got) != 1 || len(got[0]) > logLine+len("…") || !strings.HasPrefix(got[0], "Error (a.c:1): long long") {
		t.Errorf("%.100q", got)
	}
	if v := LogVersion(path); v != "4.2.1" {
		t.Errorf("version %q", v)
	}
}

func TestLogVersion(t *testing.T) {
	for log, want := range map[string]string{"dump-tcp.log": "4.2.1", "dump-good.log": "4.1.1", "none.log": ""} {
		if got := LogVersion(filepath.Join("testdata", "logs", log)); got != want {
			t.Errorf("%s: %q, want %q", log, got, want)
		}
	}
}

func FuzzLogErrors(f *testing.F) {
	paths, err := filepath.Glob("testdata/logs/*.log")
	must(f, err)
	if len(paths) == 0 {
		f.Fatal("no seeds")
	}
	for _, path := range paths {
		data, err := os.ReadFile(path)
		must(f, err)
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		lines := logErrors(data, 3)
		if len(lines) > 3 {
			t.Fatalf("%d lines", len(lines))
		}
		for _, line := range lines {
			if len(line) > logLine+len("…") || !strings.HasPrefix(line, "Error (") || strings.ContainsAny(line, "\n\r\x00\x1b") {
				t.Fatalf("%q", line)
			}
		}
	})
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

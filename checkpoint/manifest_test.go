package checkpoint

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/stasis-run/stasis/checkpoint/layout"
)

const (
	goodFile     = `{"name":"inventory.img","size":1,"sum":"sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"}`
	goodManifest = `{"version":1,"created":"2026-01-02T03:04:05Z","container":{"id":"c"},"options":{"open_tcp":true},` +
		`"architecture":"amd64","cpu_features":["avx2"],"files":[` + goodFile + `]}`
)

func TestDecodeManifest(t *testing.T) {
	m, err := decodeManifest([]byte(goodManifest))
	must(t, err)
	if m.Container.ID != "c" || !m.Options.OpenTCP || len(m.Files) != 1 || m.Created.Year() != 2026 {
		t.Errorf("%+v", m)
	}
	for _, tc := range []struct {
		name, old, new string
		kind           error
		part           string
	}{
		{"newer", `"version":1`, `"version":4`, errdefs.ErrFailedPrecondition, "newer"},
		{"no version", `"version":1,`, ``, errdefs.ErrInvalidArgument, "version (0)"},
		{"version is text", `"version":1`, `"version":"1"`, errdefs.ErrInvalidArgument, "JSON"},
		{"unknown key", `"version":1`, `"version":1,"lazy":true`, errdefs.ErrInvalidArgument, `"lazy"`},
		{"unknown option", `"open_tcp":true`, `"open_udp":true`, errdefs.ErrInvalidArgument, `"open_udp"`},
		{"something after it", `]}`, `]} {}`, errdefs.ErrInvalidArgument, "JSON"},
		{"no architecture", `"amd64"`, `""`, errdefs.ErrInvalidArgument, "architecture"},
		{"no inventory", `inventory.img`, `core-1.img`, errdefs.ErrInvalidArgument, "inventory.img is not listed"},
		{"path", `inventory.img`, `../inventory.img`, errdefs.ErrInvalidArgument, "plain file name"},
		{"hidden", `inventory.img`, `.partial`, errdefs.ErrInvalidArgument, "plain file name"},
		{"itself", `inventory.img`, `stasis.json`, errdefs.ErrInvalidArgument, "plain file name"},
		{"no name", `inventory.img`, ``, errdefs.ErrInvalidArgument, "plain file name"},
		{"line break", `inventory.img`, `a\nb`, errdefs.ErrInvalidArgument, "plain file name"},
		{"twice", goodFile, goodFile + "," + goodFile, errdefs.ErrInvalidArgument, "listed twice"},
		{"negative size", `"size":1`, `"size":-1`, errdefs.ErrInvalidArgument, "size -1"},
		{"short sum", `aaaa"`, `"`, errdefs.ErrInvalidArgument, "no valid sum"},
		{"sum of another kind", `sha256:`, `xxh64:`, errdefs.ErrInvalidArgument, "no valid sum"},
		{"sum of no kind", `sha256:`, ``, errdefs.ErrInvalidArgument, "no valid sum"},
		{"sum that is no number", `aaaa"`, `zzzz"`, errdefs.ErrInvalidArgument, "no valid sum"},
		{"old sum in a new version", `"version":1`, `"version":3`, errdefs.ErrInvalidArgument, "no valid sum"},
		{"new sum in an old version", `sha256:`, `blake3:`, errdefs.ErrInvalidArgument, "no valid sum"},
		{"chunks in an old version", `"size":1`, `"size":1,"chunks":"AAAA"`, errdefs.ErrInvalidArgument, "no valid sum"},
		{"its envelope", `inventory.img`, `stasis.sig.json`, errdefs.ErrInvalidArgument, "plain file name"},
		{"control group outside", `"options"`, `"cgroups":[{"path":"../c"}],"options"`, errdefs.ErrInvalidArgument, "cgroups[0].path"},
		{"no such mode", `"open_tcp":true`, `"cgroups_mode":"--evil"`, errdefs.ErrInvalidArgument, "cgroups_mode"},
		{"no such namespace", `"open_tcp":true`, `"empty_namespaces":["--evil"]`, errdefs.ErrInvalidArgument, "empty_namespaces"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			text := strings.Replace(goodManifest, tc.old, tc.new, 1)
			if text == goodManifest {
				t.Fatal("nothing replaced")
			}
			_, err := decodeManifest([]byte(text))
			if err == nil {
				t.Fatal("accepted")
			}
			wantError(t, err, tc.kind, tc.part)
		})
	}
}

func TestManifestTooLarge(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, layout.Manifest)
	write(t, path, nil)
	must(t, os.Truncate(path, 1<<40))
	_, err := readManifest(dir)
	wantError(t, err, errdefs.ErrInvalidArgument, "larger than")
}

func TestParseCPUFeatures(t *testing.T) {
	const x86 = "processor\t: 0\nflags\t\t: fpu vme sse4_1 vmx avx2 avx512f avx512_bf16 nx xsaves amx_tile aes\n\nprocessor\t: 1\nflags\t\t: mmx\n"
	const arm = "processor\t: 0\nFeatures\t: fp asimd evtstrm sve2 svei8mm paca\n"
	for _, tc := range []struct{ cpuinfo, want string }{
		{x86, "aes amx_tile avx2 avx512_bf16 avx512f sse4_1"},
		{arm, "asimd fp paca sve2 svei8mm"},
		{"nothing", ""},
	} {
		if got := strings.Join(parseCPUFeatures(strings.NewReader(tc.cpuinfo)), " "); got != tc.want {
			t.Errorf("%q, want %q", got, tc.want)
		}
	}
	if got := HostCPUFeatures(); len(got) == 0 || !slices.IsSorted(got) {
		t.Errorf("this host's: %q", got)
	}
}

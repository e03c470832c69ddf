package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/errdefs"
)

// TestExtract: the two together write each file of an archive, as it is, once.
func TestExtract(t *testing.T) {
	for name, members := range map[string][]member{
		"podman": podmanArchive(t), "cri-o": crioArchive(t), "kubelet": kubeletArchive(t),
		"volumes": append(podmanArchive(t), file("volumes/a/b.tar", "v")),
	} {
		for _, c := range []compression.Compression{compression.Uncompressed, compression.Gzip, compression.Zstd} {
			data := compress(t, tarOf(t, members...), c)
			config, rest := filepath.Join(t.TempDir(), "config"), filepath.Join(t.TempDir(), "rest")
			must(t, ExtractConfig(context.Background(), bytes.NewReader(data), config, Limits{}))
			must(t, ExtractWithoutConfig(context.Background(), bytes.NewReader(data), rest, Limits{}))
			want := map[string]string{}
			for _, m := range members {
				if m.hdr.Typeflag != tar.TypeDir {
					want[m.name] = m.data
				}
			}
			got := contents(t, config)
			if names := slices.Sorted(maps.Keys(got)); !slices.Equal(names, []string{configName, specName}) {
				t.Errorf("%s: the configuration has %q", name, names)
			}
			maps.Copy(got, contents(t, rest))
			if !maps.Equal(got, want) {
				t.Errorf("%s: extracted %q, want %q", name, slices.Sorted(maps.Keys(got)), slices.Sorted(maps.Keys(want)))
			}
		}
	}
}

// contents are the files below a folder. It fails if one can be read by others.
func contents(t *testing.T, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	must(t, filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s: mode %v", p, info.Mode())
		}
		if d.IsDir() {
			return nil
		}
		data, err := os.ReadFile(p)
		name, _ := filepath.Rel(dir, p)
		files[name] = string(data)
		return err
	}))
	return files
}

func TestExtractRefuses(t *testing.T) {
	for name, tc := range map[string]struct {
		members    []member
		limits     Limits
		noConfig   bool // ExtractConfig fails too
		configOnly bool // only ExtractConfig fails
	}{
		"no config.dump": {members: []member{file(specName, "{}")}, noConfig: true, configOnly: true},
		"no spec.dump":   {members: []member{file(configName, "{}")}, noConfig: true, configOnly: true},
		"a way out":      {members: []member{file("../x", "x")}, noConfig: true},
		"absolute":       {members: []member{file("/x", "x")}, noConfig: true},
		"a link":         {members: []member{{name: "x", hdr: tar.Header{Typeflag: tar.TypeSymlink, Linkname: "/etc"}}}, noConfig: true},
		"twice":          {members: []member{file("x", "x"), file("x", "y")}, noConfig: true},
		"file as folder": {members: []member{file("x", "x"), file("x/y", "y")}},
		"folder as file": {members: []member{file("x/y", "y"), file("x", "x")}},
		"a long name":    {members: []member{file(strings.Repeat("x", 300), "x")}},
		"too large":      {members: []member{file("x", strings.Repeat("x", 2000))}, limits: Limits{Total: 1000}},
		"config too large": {members: []member{file(configName, strings.Repeat("x", 2000)), file(specName, "{}")},
			limits: Limits{Total: 1000}, noConfig: true, configOnly: true},
		"too many": {members: []member{file("x", "x"), file("y", "y")}, limits: Limits{Files: 1}, noConfig: true},
	} {
		t.Run(name, func(t *testing.T) {
			members := tc.members
			if !tc.configOnly {
				members = append(members, file(configName, "{}"), file(specName, "{}"))
			}
			data := tarOf(t, members...)
			parent := t.TempDir()
			for what, tried := range map[string]struct {
				extract func(context.Context, string) error
				fails   bool
			}{
				"config": {func(ctx context.Context, dir string) error {
					return ExtractConfig(ctx, bytes.NewReader(data), dir, tc.limits)
				}, tc.noConfig},
				"rest": {func(ctx context.Context, dir string) error {
					return ExtractWithoutConfig(ctx, bytes.NewReader(data), dir, tc.limits)
				}, !tc.configOnly},
			} {
				dir := filepath.Join(parent, what)
				err := tried.extract(context.Background(), dir)
				if (err != nil) != tried.fails {
					t.Errorf("%s: %v", what, err)
				}
				if err != nil && !errdefs.IsInvalidArgument(err) && tc.limits.Total == 0 {
					t.Errorf("%s: %v is not an invalid argument", what, err)
				}
				if _, serr := os.Lstat(dir); (serr == nil) != (err == nil) {
					t.Errorf("%s: the folder: %v, after %v", what, serr, err)
				}
			}
		})
	}
	dir := t.TempDir()
	if err := ExtractConfig(context.Background(), bytes.NewReader(tarOf(t, podmanArchive(t)...)), dir, Limits{}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("into a folder that exists: %v", err)
	}
}

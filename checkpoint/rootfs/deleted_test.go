package rootfs

import (
	"bytes"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestSplitDeleted(t *testing.T) {
	for _, test := range []struct {
		name    string
		headers []header
		deleted []string
		files   []string
		says    string
	}{
		{name: "both", headers: []header{{name: "./etc/", kind: dir}, {name: "./etc/.wh.motd", kind: file}, {name: ".wh.a", kind: file}, {name: "etc/x", kind: file, content: "1"}},
			deleted: []string{"/a", "/etc/motd"}, files: []string{"./etc/", "etc/x"}},
		{name: "nothing", deleted: []string{}},
		{name: "replaced by a file", headers: []header{{name: ".wh.x", kind: file}, {name: "x", kind: file}}, deleted: []string{}, files: []string{"x"}},
		{name: "made anew", headers: []header{{name: ".wh.d", kind: file}, {name: "d/x", kind: file}}, says: "made anew"},
		{name: "opaque", headers: []header{{name: "d/.wh..wh..opq", kind: file}}, says: "opaque"},
		{name: "not UTF-8", headers: []header{{name: ".wh.\xff", kind: file}}, says: "UTF-8"},
	} {
		t.Run(test.name, func(t *testing.T) {
			var files bytes.Buffer
			deleted, err := SplitDeleted(bytes.NewReader(tarOf(t, test.headers...)), &files)
			if test.says != "" {
				if !errors.Is(err, errdefs.ErrFailedPrecondition) || !strings.Contains(err.Error(), test.says) {
					t.Fatalf("%v", err)
				}
				return
			}
			must(t, err)
			if !slices.Equal(deleted, test.deleted) || deleted == nil {
				t.Errorf("deleted %q", deleted)
			}
			if names := entries(t, files.Bytes()); !slices.Equal(names, test.files) {
				t.Errorf("files %q", names)
			}
		})
	}
}

func TestJoinDeleted(t *testing.T) {
	var layer bytes.Buffer
	must(t, JoinDeleted(bytes.NewReader(tarOf(t,
		header{name: "d/", kind: dir},
		header{name: "d/x", kind: file, content: "1"},
		header{name: "e/f/g", kind: file},
		header{name: "z", kind: file},
	)), []string{"/q", "d/b", "/d/a", "/e/f", "z", "/none/x", "/q"}, &layer))
	want := []string{"d/", "d/.wh.a", "d/.wh.b", "d/x", "e/.wh.f", "e/f/g", ".wh.z", "z", "none/.wh.x", ".wh.q"}
	if have := entries(t, layer.Bytes()); !slices.Equal(have, want) {
		t.Errorf("%q", have)
	}
	for _, deleted := range []string{"", "/", "..", "../x", "/a/../../b", "a\x00b", ".wh.x"} {
		if err := JoinDeleted(bytes.NewReader(tarOf(t)), []string{deleted}, &layer); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%q: %v", deleted, err)
		}
	}
	if err := JoinDeleted(bytes.NewReader(tarOf(t, header{name: ".wh.x", kind: file})), nil, &layer); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("a whiteout: %v", err)
	}
}

func TestRemoveDeleted(t *testing.T) {
	j := newJail(t)
	j.dir("d/sub")
	j.file("d/sub/f", "1")
	j.file("f", "1")
	j.symlink(j.outside, "link")
	j.symlink(j.outside, "d/sub/link")
	must(t, RemoveDeleted(j.root, []string{"/d", "f", "/none/at/all", "/etc/passwd/x"}))
	for _, path := range []string{"d", "f"} {
		if _, err := os.Lstat(j.at(path)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %v", path, err)
		}
	}
	j.intact()
	for _, deleted := range []string{"/", "", ".", "..", "/../outside", "etc/../../outside", "link/secret"} {
		if err := RemoveDeleted(j.root, []string{deleted}); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%q: %v", deleted, err)
		}
		j.intact()
	}
	must(t, RemoveDeleted(j.root, []string{"link"}))
	if _, err := os.Lstat(j.at("link")); !errors.Is(err, os.ErrNotExist) {
		t.Error("the link is there")
	}
	j.intact()
	// All or nothing.
	if err := RemoveDeleted(j.root, []string{"etc", ".."}); err == nil {
		t.Error("no error")
	}
	if _, err := os.Lstat(j.at("etc/passwd")); err != nil {
		t.Error(err)
	}
}

func TestCreateLabeled(t *testing.T) {
	f := tree{t, t.TempDir()}
	const label = "system_u:object_r:container_file_t:s0:c1,c2"
	must(t, CreateLabeled(f.at("log"), label))
	if value, _, err := xattrsAt(f.at("log")).value("security.selinux"); err != nil || string(value) != label {
		t.Errorf("%q %v", value, err)
	}
	st, err := os.Lstat(f.at("log"))
	must(t, err)
	if st.Mode() != 0o600 || st.Size() != 0 {
		t.Error(st.Mode(), st.Size())
	}
	must(t, CreateLabeled(f.at("plain"), ""))
	f.symlink("nowhere", "link")
	for _, path := range []string{"log", "link"} {
		if err := CreateLabeled(f.at(path), label); !errors.Is(err, os.ErrExist) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

package capture

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func TestLimit(t *testing.T) {
	if n, err := Limit(t.TempDir(), 5); n != 5 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	dir := t.TempDir()
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	free := int64(st.Bavail) * st.Bsize
	if n, err := Limit(dir, 0); err != nil || n < free/4 || n > free*3/4 {
		t.Errorf("%d of %d, %v", n, free, err)
	}
	if _, err := Limit(filepath.Join(dir, "none"), 0); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v", err)
	}
	if err := TooLarge("x", 7); !errors.Is(err, ErrTooLarge) || !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "x: larger than is allowed: a checkpoint may have 7 bytes") {
		t.Errorf("%v", err)
	}
}

func TestCheckJSON(t *testing.T) {
	for text, ok := range map[string]bool{
		`{"a":[{}]}`: true,
		"[" + strings.Repeat("{},", maxNodes) + "{}]":   false,
		"[" + strings.Repeat("[],", maxNodes) + "[]]":   false,
		"[" + strings.Repeat(`"a",`, maxNodes) + `"a"]`: true,
	} {
		if err := CheckJSON([]byte(text)); ok != (err == nil) || err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%.20s: %v", text, err)
		}
	}
}

func TestReadSmall(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, []byte("12345"), 0o600); err != nil {
		t.Fatal(err)
	}
	if data, err := ReadSmall(path, 5); err != nil || string(data) != "12345" {
		t.Errorf("%q, %v", data, err)
	}
	if _, err := ReadSmall(path, 4); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "f: larger than 4 bytes") {
		t.Errorf("%v", err)
	}
}

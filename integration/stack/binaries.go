package stack

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
)

const (
	stasisShim   = "containerd-shim-stasis-v1"
	upstreamShim = "containerd-shim-runc-v2"
)

// binaries are the programs that a Stack runs.
type binaries struct {
	containerd, ctr string
	runtime         string
	// path has what is put first in containerd's PATH: name to target.
	path map[string]string
}

func findBinaries(opts Options) (binaries, error) {
	dir := filepath.Join(cacheDir(), "bin")
	var release string
	switch opts.Version {
	case "2.4":
		release = dir
	case "1.7", "2.1":
		release = filepath.Join(cacheDir(), "containerd-"+opts.Version, "bin")
	default:
		return binaries{}, fmt.Errorf("no containerd %q", opts.Version)
	}
	b := binaries{
		containerd: filepath.Join(release, "containerd"),
		ctr:        filepath.Join(release, "ctr"),
		runtime:    filepath.Join(dir, "runc"),
		path:       map[string]string{upstreamShim: filepath.Join(release, upstreamShim)},
	}
	if opts.Crun {
		b.runtime = filepath.Join(dir, "crun")
	}
	for _, f := range []string{b.containerd, b.ctr, b.runtime, b.path[upstreamShim], filepath.Join(dir, "criu")} {
		if _, err := os.Stat(f); err != nil {
			return binaries{}, fmt.Errorf("%w: run contrib/setup.sh", err)
		}
	}
	if opts.Upstream {
		return b, nil
	}
	shim, err := Shim()
	if err != nil {
		return binaries{}, err
	}
	b.path[stasisShim] = shim
	if opts.DropIn {
		b.path[upstreamShim] = shim
	}
	return b, nil
}

// Shim returns the path of Stasis's shim.
func Shim() (string, error) {
	dir := os.Getenv("STASIS_BIN")
	if dir == "" {
		root, err := repository()
		if err != nil {
			return "", fmt.Errorf("STASIS_BIN is not set, and %w", err)
		}
		dir = filepath.Join(root, "bin")
	}
	shim, err := filepath.Abs(filepath.Join(dir, stasisShim))
	if err != nil {
		return "", err
	}
	if _, err := os.Stat(shim); err != nil {
		return "", fmt.Errorf("%w: run `make build`", err)
	}
	return shim, nil
}

// Program returns the path of a program out of the cache's folder bin.
func Program(name string) (string, error) {
	path := filepath.Join(cacheDir(), "bin", name)
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("%w: run contrib/setup.sh", err)
	}
	return path, nil
}

// cacheDir returns the folder that contrib/setup.sh fills.
func cacheDir() string {
	if dir := os.Getenv("STASIS_CACHE"); dir != "" {
		return dir
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		dir = "/root/.cache"
	}
	return filepath.Join(dir, "stasis")
}

// repository returns the root of the checkout that the working directory is in.
func repository() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		mod, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if err == nil && bytes.HasPrefix(mod, []byte("module github.com/stasis-run/stasis\n")) {
			return dir, nil
		}
		if dir == "/" {
			return "", errors.New("the working directory is not inside a checkout of stasis")
		}
		dir = filepath.Dir(dir)
	}
}

var testProgramMu sync.Mutex

// BuildTestProgram is the command, in the root of the checkout, that builds a
// test program, integration/<name>, or criulog.so, to a path.
func BuildTestProgram(name, path string) []string {
	if name == "criulog.so" {
		return []string{"gcc", "-shared", "-fPIC", "-nostdlib", "-O2", "-Wall", "-Werror", "-o", path, "integration/faultrunc/criulog/criulog.c"}
	}
	return []string{"go", "build", "-trimpath", "-ldflags=-s -w", "-o", path, "./integration/" + name}
}

// TestProgram returns the path of one of the test programs that BuildTestProgram
// knows, and builds it if need be.
func TestProgram(name string) (string, error) {
	if dir := os.Getenv("STASIS_TEST_BIN"); dir != "" {
		return filepath.Join(dir, name), nil
	}
	testProgramMu.Lock()
	defer testProgramMu.Unlock()
	root, err := repository()
	if err != nil {
		return "", err
	}
	// A folder of its own each, to serve as the layer of an image too.
	dir := filepath.Join(cacheDir(), "test", name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), ".build-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	args := BuildTestProgram(name, filepath.Join(tmp, name))
	build := exec.Command(args[0], args[1:]...)
	build.Dir = root
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%q: %w: run contrib/setup.sh\n%s", args, err, out)
	}
	// Left alone if it is the same, for images are cached by their files'
	// times; and replaced by renaming, for other tests may be running it.
	path := filepath.Join(dir, name)
	fresh, err := os.ReadFile(filepath.Join(tmp, name))
	if err != nil {
		return "", err
	}
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, fresh) {
		return path, nil
	}
	return path, os.Rename(filepath.Join(tmp, name), path)
}

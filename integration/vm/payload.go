package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/stasis-run/stasis/integration/stack"
)

// programs are what the machine gets of the setup's cache: files and folders.
var programs = []string{"bin", "containerd-1.7", "containerd-2.1", "private/criu", "private/crun", "private/tools", "rootfs"}

// makePayload makes the second disk.
func (m *machine) makePayload(ctx context.Context, run string, slow int) error {
	dir := filepath.Join(m.dir, "payload")
	for _, d := range []string{"bin", "cache/private", "debian/bin", "test", "variants"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return err
		}
	}
	shim, err := filepath.Abs(filepath.Join(os.Getenv("STASIS_BIN"), "containerd-shim-stasis-v1"))
	if err != nil {
		return err
	}
	if os.Getenv("STASIS_BIN") == "" {
		return errors.New("STASIS_BIN is not set: run `make build`, and set it to the folder bin")
	}
	fmt.Println("vm: building the tests")
	for _, args := range [][]string{
		{"go", "test", "-c", "-trimpath", "-ldflags=-s -w", "-o", filepath.Join(dir, "integration.test"), "./integration"},
		stack.BuildTestProgram("probe", filepath.Join(dir, "test/probe")),
		stack.BuildTestProgram("faultrunc", filepath.Join(dir, "test/faultrunc")),
		stack.BuildTestProgram("criulog.so", filepath.Join(dir, "test/criulog.so")),
		{"cp", "-a", shim, filepath.Join(filepath.Dir(shim), "stasis"), filepath.Join(dir, "bin")},
		{"cp", "-a", "contrib/vm/guest", dir},
	} {
		if err := command(ctx, args...); err != nil {
			return err
		}
	}
	for _, p := range programs {
		if err := command(ctx, "cp", "-a", filepath.Join(m.cache, p), filepath.Dir(filepath.Join(dir, "cache", p))); err != nil {
			if _, serr := os.Lstat(filepath.Join(m.cache, p)); errors.Is(serr, fs.ErrNotExist) {
				continue // the setup has taken the host's own
			}
			return err
		}
	}
	if err := debianPrograms(filepath.Join(dir, "cache/bin"), m.cache); err != nil {
		return err
	}
	// Debian's own programs, as a cache of their own.
	for link, target := range map[string]string{
		"bin/runc": "/usr/bin/runc", "bin/crun": "/usr/bin/crun", "bin/criu": "/usr/sbin/criu",
		"containerd-1.7": "../cache/containerd-1.7", "rootfs": "../cache/rootfs", "images": "../cache/images",
	} {
		if err := os.Symlink(target, filepath.Join(dir, "debian", link)); err != nil {
			return err
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "cache.path"), []byte(m.cache), 0o644); err != nil {
		return err
	}
	if err := os.Mkdir(filepath.Join(dir, "cache/images"), 0o755); err != nil {
		return err
	}
	for _, v := range variants {
		if err := os.Mkdir(filepath.Join(dir, "variants", v.name), 0o755); err != nil {
			return err
		}
		for i, p := range v.passes {
			file := filepath.Join(dir, "variants", v.name, fmt.Sprintf("%d-%s", i+1, p.name))
			if err := os.WriteFile(file, []byte(p.environment(m.cache, run, slow)), 0o644); err != nil {
				return err
			}
		}
	}
	mke2fs := "mke2fs"
	if _, err := exec.LookPath(mke2fs); err != nil {
		mke2fs = "/usr/sbin/mke2fs"
	}
	// Sparse, with room for the archives of images that tests make.
	err = command(ctx, mke2fs, "-q", "-t", "ext4", "-O", "^has_journal", "-d", dir, filepath.Join(m.dir, "payload.img"), "4G")
	return errors.Join(err, os.RemoveAll(dir))
}

// debianPrograms replaces what the setup has linked from the host, which would lack
// its libraries, by the program of that name in the machine.
func debianPrograms(bin, cache string) error {
	entries, err := os.ReadDir(bin)
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := filepath.Join(bin, e.Name())
		target, err := os.Readlink(path)
		if err != nil || !filepath.IsAbs(target) || strings.HasPrefix(target, cache+"/") {
			continue
		}
		where := "/usr/bin/"
		if e.Name() == "criu" {
			where = "/usr/sbin/"
		}
		if err := errors.Join(os.Remove(path), os.Symlink(where+e.Name(), path)); err != nil {
			return err
		}
	}
	return nil
}

func command(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}

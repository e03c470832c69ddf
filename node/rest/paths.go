package rest

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/node"
)

// paths are the folders below which a request may name bundles and files for output. The
// config.json of a bundle decides what root does. A container can write to its root
// filesystem, which lies in its bundle, and to its output; so neither may become a bundle.
type paths []string

// bundle is resolve for a bundle, which does not lie in another.
func (p paths) bundle(field, path string) (string, error) { return p.outside(field, path) }

// output is resolve for a file that a container's output goes to, which does not lie in a
// bundle.
func (p paths) output(field, path string) (string, error) {
	resolved, err := p.outside(field, path)
	if err == nil {
		err = notInCheckpoint(field, path, resolved)
	}
	if err == nil && filepath.Base(resolved) == node.BundleConfig {
		return "", fault.New(errdefs.ErrPermissionDenied, "%s %q has the name that makes a folder a bundle", field, path)
	}
	return resolved, err
}

// folder is resolve for a folder that is made for a checkpoint, which does not lie in a
// bundle, and is none.
func (p paths) folder(field, path string) (string, error) {
	resolved, err := p.outside(field, path)
	if err != nil {
		return "", err
	}
	return resolved, notInCheckpoint(field, path, resolved)
}

// notInCheckpoint refuses what lies in a checkpoint, finished or not: that would not be whole
// any more.
func notInCheckpoint(field, path, resolved string) error {
	for dir := filepath.Dir(resolved); ; dir = filepath.Dir(dir) {
		for _, name := range []string{layout.Partial, layout.Inventory, layout.Manifest} {
			if _, err := os.Lstat(filepath.Join(dir, name)); filepath.Base(dir) == layout.Partial || !errors.Is(err, fs.ErrNotExist) {
				return fault.New(errdefs.ErrPermissionDenied, "%s %q lies in a checkpoint, %s", field, path, dir)
			}
		}
		if dir == filepath.Dir(dir) {
			return nil
		}
	}
}

// outside is resolve for what does not lie in a bundle.
func (p paths) outside(field, path string) (string, error) {
	resolved, err := p.resolve(field, path)
	if err != nil {
		return "", err
	}
	for dir := filepath.Dir(resolved); ; dir = filepath.Dir(dir) {
		if _, err := os.Lstat(filepath.Join(dir, node.BundleConfig)); !errors.Is(err, fs.ErrNotExist) {
			return "", fault.New(errdefs.ErrPermissionDenied, "%s %q lies in a bundle, %s, whose container may write there", field, path, dir)
		}
		if dir == filepath.Dir(dir) {
			return resolved, nil
		}
	}
}

// resolve returns what a path leads to, without links, if that is below an allowed
// folder. The file itself need not exist, its folder has to.
func (p paths) resolve(field, path string) (string, error) {
	if !filepath.IsAbs(path) || strings.ContainsRune(path, 0) {
		return "", fault.Invalid("%s %q is no absolute path", field, path)
	}
	resolved, err := filepath.EvalSymlinks(path)
	if errors.Is(err, fs.ErrNotExist) {
		dir, err := filepath.EvalSymlinks(filepath.Dir(filepath.Clean(path)))
		if err != nil {
			return "", p.denied(field, path)
		}
		resolved = filepath.Join(dir, filepath.Base(filepath.Clean(path)))
	} else if err != nil {
		return "", p.denied(field, path)
	}
	for _, allowed := range p {
		allowed, err := filepath.EvalSymlinks(allowed)
		if err != nil {
			continue
		}
		if rel, err := filepath.Rel(allowed, resolved); err == nil && filepath.IsLocal(rel) {
			return resolved, nil
		}
	}
	return "", p.denied(field, path)
}

// denied is the same for a path that is not there, and one that is: what there is on the
// host is nobody's business.
func (p paths) denied(field, path string) error {
	return fault.New(errdefs.ErrPermissionDenied, "%s %q is below no folder that stasisd is configured to use (allow_paths, --allow-path)", field, path)
}

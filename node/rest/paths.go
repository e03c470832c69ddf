package rest

import (
	"errors"
	"io/fs"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/stasis-run/stasis/checkpoint/fault"
)

// paths are the folders below which a request may name files. What lies there decides
// what root does, so only root should be able to write there.
type paths []string

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

package archive

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/fault"
)

// ExtractConfig writes config.dump and spec.dump of an archive, byte for byte, into
// the folder dir, which it makes. It does not look at what they say; ReadConfig does.
// An archive without one of them gives an error that matches
// errdefs.ErrInvalidArgument, and dir is removed again. Podman's crutils has it as
// CRImportCheckpointConfigOnly.
func ExtractConfig(ctx context.Context, r io.Reader, dir string, limits Limits) error {
	wanted := map[string]bool{configName: true, specName: true}
	return extract(ctx, r, dir, limits, func(in *entries, out *folder, hdr *tar.Header) error {
		if !wanted[hdr.Name] {
			return nil
		}
		delete(wanted, hdr.Name)
		if err := out.write(hdr.Name, hdr.Name, in.tar); err != nil {
			return err
		}
		if len(wanted) == 0 {
			return errEnough
		}
		return nil
	}, func() error {
		for _, name := range []string{configName, specName} {
			if wanted[name] {
				return fault.Invalid("no archive of a checkpoint: there is no %s", name)
			}
		}
		return nil
	})
}

// ExtractWithoutConfig writes all files of an archive but config.dump and spec.dump,
// byte for byte and under their names, into the folder dir, which it makes: for whoever
// goes on with another program, which has a configuration of its own. It refuses what
// Read refuses of names, kinds and sizes of files, and looks into none of them. Podman's
// crutils has it as CRImportCheckpointWithoutConfig.
func ExtractWithoutConfig(ctx context.Context, r io.Reader, dir string, limits Limits) error {
	return extract(ctx, r, dir, limits, func(in *entries, out *folder, hdr *tar.Header) error {
		if hdr.Name == configName || hdr.Name == specName {
			return nil
		}
		err := out.root.MkdirAll(path.Dir(hdr.Name), 0o700)
		if err == nil {
			err = out.write(hdr.Name, hdr.Name, in.tar)
		}
		if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.EISDIR) || errors.Is(err, unix.ENAMETOOLONG) || errors.Is(err, fs.ErrExist) {
			return fault.Invalid("%q: %v", hdr.Name, err)
		}
		return err
	}, func() error { return nil })
}

// errEnough ends the reading of an archive.
var errEnough = errors.New("the rest of the archive is not needed")

// extract makes dir, calls file with each file of an archive until it returns
// errEnough, and then end. Whatever fails, dir is removed again.
func extract(ctx context.Context, r io.Reader, dir string, limits Limits,
	file func(*entries, *folder, *tar.Header) error, end func() error) (err error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return fault.New(errdefs.ErrAlreadyExists, "extract an archive into %s: it exists; give a folder that does not", dir)
		}
		return fmt.Errorf("extract an archive: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("extract the archive of a checkpoint: %w", err), os.RemoveAll(dir))
		}
	}()
	limits = limits.withDefaults()
	total, err := capture.Limit(dir, limits.Total)
	if err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	out := &folder{root: root, limit: total, left: total}
	in, err := openEntries(ctx, r, limits)
	if err != nil {
		return err
	}
	defer in.close()
	for {
		hdr, err := in.next()
		if err == nil {
			err = file(in, out, hdr)
		}
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, errEnough):
			return end()
		case err != nil:
			return err
		}
	}
}

package archive

import (
	"archive/tar"
	"context"
	"errors"
	"io"
	"io/fs"
	"path"

	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/fault"
)

// ExtractConfig writes config.dump and spec.dump of an archive, byte for byte, into
// the folder dir, which it makes. ReadConfig parses them instead. An archive without one
// of them gives an error that matches errdefs.ErrInvalidArgument, and dir is removed
// again. Podman's crutils calls it CRImportCheckpointConfigOnly.
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
				return missing(name)
			}
		}
		return nil
	})
}

// ExtractWithoutConfig writes all files of an archive except config.dump and spec.dump,
// byte for byte and under their names, into the folder dir, which it makes. It is for
// programs that have a configuration of their own. It refuses the names, kinds and sizes
// of files that Read refuses, and does not parse the files. Podman's crutils calls it
// CRImportCheckpointWithoutConfig.
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

// extract makes dir, calls file with each file of an archive until it returns
// errEnough, and then end. Whatever fails, dir is removed again.
func extract(ctx context.Context, r io.Reader, dir string, limits Limits,
	file func(*entries, *folder, *tar.Header) error, end func() error) error {
	return intoNew(dir, "extract", func() error {
		limits = limits.withDefaults()
		out, err := newFolder(dir, limits.Total)
		if err != nil {
			return err
		}
		defer out.root.Close()
		err = eachFile(ctx, r, limits, func(in *entries, hdr *tar.Header) error { return file(in, out, hdr) })
		if err != nil {
			return err
		}
		return end()
	})
}

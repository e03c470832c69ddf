package archive

import (
	"archive/tar"
	"context"
	"fmt"
	"io"

	"github.com/stasis-run/stasis/checkpoint/capture"
)

// ReadConfig reads of an archive what the container was: Info and Spec of a
// capture, which has no Images and no Layer. It stops as soon as it has both:
// archives of Podman and of Write have them first, those of containerd last.
func ReadConfig(ctx context.Context, r io.Reader, limits Limits) (*capture.Capture, error) {
	var meta metadata
	if err := meta.read(ctx, r, limits, func() bool { return meta.config != nil && meta.spec != nil }); err != nil {
		return nil, fmt.Errorf("read the configuration in an archive: %w", err)
	}
	c, err := meta.capture()
	if err != nil {
		return nil, fmt.Errorf("read the configuration in an archive: %w", err)
	}
	return c, nil
}

// ReadRuntime returns the name of the runtime that ran the container in an
// archive: of Podman and of Write that of the OCI runtime, "runc" or "crun"; of
// CRI-O the runtime handler; of containerd the shim. Podman's crutils calls it
// CRGetRuntimeFromArchive.
func ReadRuntime(ctx context.Context, r io.Reader, limits Limits) (string, error) {
	var meta metadata
	err := meta.read(ctx, r, limits, func() bool { return meta.config != nil })
	if err == nil && meta.config == nil {
		err = missing(configName)
	}
	var conf config
	if err == nil {
		conf, err = meta.parseConfig()
	}
	if err != nil {
		return "", fmt.Errorf("read the runtime in an archive: %w", err)
	}
	return conf.Runtime, nil
}

// read reads an archive until enough of its metadata are there.
func (m *metadata) read(ctx context.Context, r io.Reader, limits Limits, enough func() bool) error {
	limits = limits.withDefaults()
	return eachFile(ctx, r, limits, func(in *entries, hdr *tar.Header) (err error) {
		dest, ok := m.of(hdr.Name)
		if !ok {
			return nil
		}
		if *dest, err = in.read(hdr, limits.Metadata); err == nil && enough() {
			err = errEnough
		}
		return err
	})
}

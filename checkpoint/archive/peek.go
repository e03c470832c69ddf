package archive

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/fault"
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
// CRI-O that of the handler; of containerd that of the shim. Podman's crutils has it as
// CRGetRuntimeFromArchive.
func ReadRuntime(ctx context.Context, r io.Reader, limits Limits) (string, error) {
	var meta metadata
	err := meta.read(ctx, r, limits, func() bool { return meta.config != nil })
	if err == nil && meta.config == nil {
		err = fault.Invalid("no archive of a checkpoint: there is no %s", configName)
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
	in, err := openEntries(ctx, r, limits)
	if err != nil {
		return err
	}
	defer in.close()
	for !enough() {
		hdr, err := in.next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if dest, ok := m.of(hdr.Name); ok {
			if *dest, err = in.read(hdr, limits.Metadata); err != nil {
				return err
			}
		}
	}
	return nil
}

package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive/compression"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/layout"
)

// Write writes an archive of c to w, compressed. Podman, CRI-O and checkpointctl
// find in it what they need, Read all of c but Images' logs other than dump.log.
// c.Layer is written twice: first to learn how large the tar of its files is,
// which the archive says in front of it.
//
// Podman restores it under the ID of c.Info, and from the image with the digest
// Base.Config, which has to be in its store or in the registry that Base.Name
// says.
func Write(ctx context.Context, w io.Writer, c *capture.Capture, comp compression.Compression) error {
	z, err := compressor(w, comp)
	if err != nil {
		return err
	}
	a := &writer{tar: tar.NewWriter(z), time: c.Info.Checkpointed}
	if err := a.write(ctx, c); err != nil {
		return fmt.Errorf("write archive of container %s: %w", c.Info.ContainerID, err)
	}
	if err := errors.Join(a.tar.Close(), z.Close()); err != nil {
		return fmt.Errorf("write archive of container %s: %w", c.Info.ContainerID, err)
	}
	return nil
}

type writer struct {
	tar  *tar.Writer
	time time.Time // of all entries, so that the same capture makes the same archive
}

func (a *writer) write(ctx context.Context, c *capture.Capture) error {
	spec, added, err := addAnnotations(c.Spec, c.Info)
	if err != nil {
		return err
	}
	// The metadata comes first: whoever wants only that need not read on.
	if err := a.json(configName, newConfig(c.Info, added)); err != nil {
		return err
	}
	if err := a.file(specName, spec); err != nil {
		return err
	}
	if err := a.json(statusName, newStatus(c.Info)); err != nil {
		return err
	}
	for _, name := range []string{layout.DumpStats, layout.DumpLog} {
		if err := a.copy(ctx, name, filepath.Join(c.Images, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if err := a.layer(ctx, c.Layer, c.Images); err != nil {
		return err
	}
	if c.DevShm != "" {
		if err := a.copy(ctx, layout.DevShm, c.DevShm); err != nil {
			return err
		}
	}
	return a.images(ctx, c.Images)
}

// images writes the folder with CRIU's images.
func (a *writer) images(ctx context.Context, dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("read CRIU's images: %w", err)
	}
	if err := a.tar.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: layout.Images + "/", Mode: 0o700, ModTime: a.time}); err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() || strings.HasSuffix(e.Name(), ".log") || strings.HasPrefix(e.Name(), "stats-") {
			continue
		}
		if err := a.copy(ctx, layout.Images+"/"+e.Name(), filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

func (a *writer) header(name string, size int64) error {
	return a.tar.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o600, Size: size, ModTime: a.time})
}

func (a *writer) file(name string, data []byte) error {
	if err := a.header(name, int64(len(data))); err != nil {
		return err
	}
	_, err := a.tar.Write(data)
	return err
}

func (a *writer) json(name string, v any) error {
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(v); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return a.file(name, buf.Bytes())
}

// copy writes a file of the disk. One that grows or shrinks meanwhile is an
// error.
func (a *writer) copy(ctx context.Context, name, path string) error {
	f, err := capture.OpenPlain(path)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if err := a.header(name, info.Size()); err != nil {
		return err
	}
	if _, err := io.Copy(a.tar, capture.NewReader(ctx, f)); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

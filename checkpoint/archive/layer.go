package archive

import (
	"archive/tar"
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/rootfs"
)

// layer writes the layer as Podman and CRI-O have it: changed files here, a list
// of deleted ones there. If it is nil, nothing has changed.
func (a *writer) layer(ctx context.Context, layer capture.Layer, images string) error {
	if layer == nil {
		layer = empty{}
	}
	size, root, err := measure(ctx, layer)
	if err != nil {
		return err
	}
	if root == nil {
		root = &tar.Header{Mode: cmp.Or(rootMode(images), containerdRoot)}
	}
	first, err := rootEntry(rootName, root)
	if err != nil {
		return err
	}
	if err := a.header(filesName, int64(len(first))+size); err != nil {
		return err
	}
	if _, err := a.tar.Write(first); err != nil {
		return err
	}
	deleted, err := split(ctx, layer, a.tar)
	if err != nil {
		return err
	}
	if len(deleted) == 0 {
		return nil
	}
	return a.json(deletedName, deleted)
}

// empty is a layer without changes.
type empty struct{}

func (empty) WriteLayer(_ context.Context, w io.Writer) error { return tar.NewWriter(w).Close() }

// rootName is what the root folder is called at the beginning of a
// rootfs-diff.tar of ours. A new root of Podman's and CRI-O's has the mode 0555,
// one of containerd's 0755, and CRIU restores no process whose root has another
// mode than it had. Podman and CRI-O (containers/storage, pkg/archive) pass over a
// root that is called ".", as tars of others, and our layers, call it.
const rootName = "/"

// containerdRoot are the permissions of a root folder that no image changed.
const containerdRoot = 0o755

// rootEntry returns the beginning of a tar: one block, with a folder like root.
func rootEntry(name string, root *tar.Header) ([]byte, error) {
	var buf bytes.Buffer
	err := tar.NewWriter(&buf).WriteHeader(&tar.Header{
		Format: tar.FormatGNU, Typeflag: tar.TypeDir, Name: name,
		Mode: root.Mode, Uid: root.Uid, Gid: root.Gid, ModTime: root.ModTime.Truncate(time.Second),
	})
	if err != nil {
		return nil, fmt.Errorf("the root folder: %w", err)
	}
	return buf.Bytes(), nil
}

// skipRoot passes over the block of rootEntry.
func skipRoot(r *bufio.Reader) error {
	block, err := r.Peek(blockSize)
	if err != nil {
		return nil // too short for any tar, as its reader will say
	}
	hdr, err := tar.NewReader(bytes.NewReader(block)).Next()
	if err != nil || hdr.Name != rootName || hdr.Typeflag != tar.TypeDir {
		return nil
	}
	_, err = r.Discard(blockSize)
	return err
}

// measure returns the size of the tar that split writes, and its first entry if
// that is the root.
func measure(ctx context.Context, layer capture.Layer) (size int64, root *tar.Header, err error) {
	r, w := io.Pipe()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		_, err := split(ctx, layer, w)
		w.CloseWithError(err)
		return err
	})
	g.Go(func() error {
		defer r.Close()
		var n counter
		tee := io.TeeReader(r, &n)
		first, err := tar.NewReader(tee).Next()
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if err == nil && path.Clean(first.Name) == "." {
			root = first
		}
		_, err = io.Copy(io.Discard, tee)
		size = int64(n)
		return err
	})
	err = g.Wait()
	return size, root, err
}

// split writes the files of a layer, without whiteouts, and returns the list of
// deleted ones.
func split(ctx context.Context, layer capture.Layer, files io.Writer) (deleted []string, err error) {
	r, w := io.Pipe()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		err := layer.WriteLayer(ctx, w)
		w.CloseWithError(err)
		return err
	})
	g.Go(func() error {
		var err error
		deleted, err = rootfs.SplitDeleted(r, files)
		r.CloseWithError(err)
		if err != nil {
			return fmt.Errorf("the writable layer: %w", err)
		}
		return nil
	})
	return deleted, g.Wait()
}

// counter counts the bytes that are written to it.
type counter int64

func (c *counter) Write(p []byte) (int, error) {
	*c += counter(len(p))
	return len(p), nil
}

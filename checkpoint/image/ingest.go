package image

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/content"
	"golang.org/x/sys/unix"
)

// A gigabyte costs containerd four seconds of CPU when it comes through its
// socket, in messages of HTTP/2 frames of 16 KiB. Where the store's folder is
// ours to write in, the bytes go there, into the file of an upload that was begun
// by the API, and then the upload is resumed by the API: containerd takes what is
// there for what was uploaded so far, and hashes it, as after a restart.
//
// The folder's layout is that of containerd's local content store
// (plugins/content/local/store.go: ingest/*/{ref,data}) since 1.0. If anything
// in it is not as it was expected, all goes through the socket.

// ingest is the upload of one blob. Whoever writes to it closes it, and then asks
// for the writer that commits it.
type ingest struct {
	store content.Store
	ref   string
	w     content.Writer
	file  *os.File // nil: through w
	n     int64
	begun int64 // up to where the disk was told to write
}

// newIngest begins an upload. root is the store's folder, or empty.
func newIngest(ctx context.Context, store content.Store, ref, root string) (*ingest, error) {
	w, err := content.OpenWriter(ctx, store, content.WithRef(ref))
	if err != nil {
		return nil, fmt.Errorf("write to the content store: %w", err)
	}
	in := &ingest{store: store, ref: ref, w: w}
	if root != "" {
		in.file = openIngest(root, ref)
	}
	return in, nil
}

// openIngest opens the file of an upload, or returns nil. A store that is shared
// by namespaces adds to the name that it was given.
func openIngest(root, ref string) *os.File {
	uploads, err := filepath.Glob(filepath.Join(root, "ingest", "*", "ref"))
	if err != nil {
		return nil
	}
	for _, path := range uploads {
		if data, err := os.ReadFile(path); err != nil || !bytes.HasSuffix(data, []byte(ref)) {
			continue
		}
		file, err := os.OpenFile(filepath.Join(filepath.Dir(path), "data"), os.O_WRONLY|unix.O_NOFOLLOW, 0)
		if err != nil {
			return nil
		}
		if info, err := file.Stat(); err != nil || !info.Mode().IsRegular() || info.Size() != 0 {
			file.Close()
			return nil
		}
		return file
	}
	return nil
}

// flushEvery is how often the disk is told to write what it got, so that the sync
// at the end has little left; in bytes.
const flushEvery = 64 << 20

func (in *ingest) Write(p []byte) (n int, err error) {
	if in.file == nil {
		n, err = in.w.Write(p)
	} else if n, err = in.file.Write(p); in.n+int64(n)-in.begun >= flushEvery {
		_ = unix.SyncFileRange(int(in.file.Fd()), in.begun, in.n+int64(n)-in.begun, unix.SYNC_FILE_RANGE_WRITE)
		in.begun = in.n + int64(n)
	}
	in.n += int64(n)
	return n, err
}

// finish returns the writer that has all that was written.
func (in *ingest) finish(ctx context.Context) (content.Writer, error) {
	if in.file == nil {
		return in.w, nil
	}
	// The writer has its place in the file at the beginning, and the next one
	// at the end.
	if err := firstError(in.file.Close(), in.w.Close()); err != nil {
		return nil, fmt.Errorf("write to the content store: %w", err)
	}
	w, err := content.OpenWriter(ctx, in.store, content.WithRef(in.ref))
	if err != nil {
		return nil, fmt.Errorf("resume the upload to the content store: %w", err)
	}
	in.w = w
	st, err := w.Status()
	if err == nil && st.Offset != in.n {
		err = fmt.Errorf("it has %d bytes of %d", st.Offset, in.n)
	}
	if err != nil {
		return nil, fmt.Errorf("resume the upload to the content store: %w", err)
	}
	return w, nil
}

// close ends an upload, and if it failed removes it.
func (in *ingest) close(ctx context.Context, failed bool) {
	if in.file != nil {
		in.file.Close()
	}
	in.w.Close()
	if failed {
		// Else it would take its space until the lease ends.
		_ = in.store.Abort(context.WithoutCancel(ctx), in.ref)
	}
}

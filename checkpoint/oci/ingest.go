package oci

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/capture"
)

// A gigabyte costs containerd four seconds of CPU when it comes through its
// socket, in messages of HTTP/2 frames of 16 KiB. Where the store's folder is
// ours to write in, the bytes go there, into the file of an upload that was begun
// by the API. The file then gets a second name, that of a blob, and the blob is
// committed by the API: containerd has it already, as if another namespace had
// uploaded it, and does not read it once more. A store whose namespaces do not
// share is told to go on with the upload instead: it takes what is there for what
// was uploaded so far, and hashes it, as after a restart.
//
// The folder's layout is that of containerd's local content store
// (plugins/content/local/store.go: ingest/*/{ref,data}, blobs/sha256/*) since 1.0.
// If anything in it is not as it was expected, all goes through the socket.

// ingest is the upload of one blob.
type ingest struct {
	store  content.Store
	root   string
	ref    string
	w      content.Writer
	file   *os.File // nil: through w
	n      int64
	direct bool // file is written past the page cache
}

// newIngest begins an upload. root is the store's folder, or empty.
func newIngest(ctx context.Context, store content.Store, ref, root string) (*ingest, error) {
	w, err := content.OpenWriter(ctx, store, content.WithRef(ref))
	if err != nil {
		return nil, fmt.Errorf("write to the content store: %w", err)
	}
	in := &ingest{store: store, root: root, ref: ref, w: w}
	if root != "" {
		if in.file = openIngest(root, ref); in.file != nil {
			in.setDirect(true)
		}
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

// Write writes past the page cache where the file system can, from whole and
// aligned chunks: a checkpoint is as large as the memory that is in use, would
// drive out of the cache what the host works with, and has to be on the disk
// anyway before the blob has its name.
func (in *ingest) Write(p []byte) (n int, err error) {
	if in.file == nil {
		n, err = in.w.Write(p)
	} else {
		if in.direct && len(p)%chunkSize != 0 { // the end
			in.setDirect(false)
		}
		n, err = in.file.Write(p)
		if in.direct && errors.Is(err, unix.EINVAL) {
			in.setDirect(false)
			var rest int
			rest, err = in.file.Write(p[n:])
			n += rest
		}
	}
	in.n += int64(n)
	return n, err
}

// setDirect has the file written past the page cache, or not.
func (in *ingest) setDirect(direct bool) {
	flags, err := unix.FcntlInt(in.file.Fd(), unix.F_GETFL, 0)
	if err == nil {
		flags &^= unix.O_DIRECT
		if direct {
			flags |= unix.O_DIRECT
		}
		_, err = unix.FcntlInt(in.file.Fd(), unix.F_SETFL, flags)
	}
	in.direct = direct && err == nil
}

// commit makes a blob of all that was written, whose digest is sum, with its labels.
// A blob that is there already is no error, and in the lease.
func (in *ingest) commit(ctx context.Context, sum digest.Digest, labels map[string]string) error {
	opt := content.WithLabels(labels)
	if in.file != nil {
		placed, err := in.place(ctx, sum, opt)
		if err == nil && !placed {
			err = in.resume(ctx)
		}
		if err != nil || placed {
			return err
		}
	}
	// Without an expected digest, or a store behind gRPC would not add a blob to
	// the lease that it has already.
	if err := in.w.Commit(ctx, in.n, "", opt); err != nil && !errdefs.IsAlreadyExists(err) {
		return fmt.Errorf("commit to the content store: %w", err)
	}
	if d := in.w.Digest(); d != sum {
		return fmt.Errorf("the content store has %s of what was %s", d, sum)
	}
	return nil
}

// place commits the file as a blob, and tells whether the store had that.
func (in *ingest) place(ctx context.Context, sum digest.Digest, opt content.Opt) (bool, error) {
	info, err := in.file.Stat()
	if err == nil && info.Size() != in.n {
		err = fmt.Errorf("the upload has %d bytes of %d", info.Size(), in.n)
	}
	if err != nil {
		return false, fmt.Errorf("write to the content store: %w", err)
	}
	blob := filepath.Join(in.root, "blobs", sum.Algorithm().String(), sum.Encoded())
	// As containerd does: the bytes are on the disk before the name is.
	if err := firstError(in.file.Chmod(0o444), in.file.Sync()); err != nil {
		return false, fmt.Errorf("write to the content store: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(blob), 0o755); err != nil {
		return false, fmt.Errorf("write to the content store: %w", err)
	}
	switch err := os.Link(in.file.Name(), blob); {
	case errors.Is(err, fs.ErrExist): // from another namespace
	case err != nil:
		return false, nil
	default:
		if err := capture.Sync(filepath.Dir(blob)); err != nil {
			return false, fmt.Errorf("write to the content store: %w", err)
		}
	}
	// If containerd collects its garbage just now, it takes the name away again,
	// and has nothing of the upload that begins.
	ref := newRef()
	w, err := content.OpenWriter(ctx, in.store, content.WithRef(ref),
		content.WithDescriptor(ocispec.Descriptor{Digest: sum, Size: in.n}))
	if errdefs.IsAlreadyExists(err) {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("write to the content store: %w", err)
	}
	defer w.Close()
	if st, err := w.Status(); err != nil || st.Offset != in.n {
		w.Close()
		in.abort(ctx, ref)
		return false, nil
	}
	if err := w.Commit(ctx, in.n, sum, opt); err != nil && !errdefs.IsAlreadyExists(err) {
		in.abort(ctx, ref)
		return false, fmt.Errorf("commit to the content store: %w", err)
	}
	return true, nil
}

// abort removes an upload. containerd hears of a writer that was closed a moment
// later, and may write to the upload's folder while it removes that. What stays
// goes with the lease.
func (in *ingest) abort(ctx context.Context, ref string) {
	ctx = context.WithoutCancel(ctx)
	for range 10 {
		if err := in.store.Abort(ctx, ref); err == nil || errdefs.IsNotFound(err) {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// resume opens the writer that has all that was written to the file.
func (in *ingest) resume(ctx context.Context) error {
	// The writer has its place in the file at the beginning, and the next one
	// at the end.
	err := in.w.Close()
	if err == nil {
		in.w, err = content.OpenWriter(ctx, in.store, content.WithRef(in.ref))
	}
	if err != nil {
		return fmt.Errorf("resume the upload to the content store: %w", err)
	}
	st, err := in.w.Status()
	if err == nil && st.Offset != in.n {
		err = fmt.Errorf("it has %d bytes of %d", st.Offset, in.n)
	}
	if err != nil {
		return fmt.Errorf("resume the upload to the content store: %w", err)
	}
	return nil
}

// close ends an upload. What is left of one that failed, or was placed, would else
// be there until the lease ends.
func (in *ingest) close(ctx context.Context) {
	if in.file != nil {
		in.file.Close()
	}
	in.w.Close()
	in.abort(ctx, in.ref)
}

package contentstore

import (
	"context"
	"crypto/rand"
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

// directBlock is what the size of a write past the page cache has to be a multiple of:
// the largest block of common disks. A disk with larger ones refuses the write.
const directBlock = 4096

// Upload writes one blob. After Begin, Close has to be called. Its methods must not be
// called at the same time.
type Upload struct {
	store  content.Store
	folder Folder
	ref    string
	w      content.Writer
	file   *os.File // nil: the bytes go through w
	n      int64    // bytes written
	direct bool     // file is written past the page cache
}

// NewRef returns a random name for an upload, so that no other upload has it.
func NewRef() string { return "stasis-" + rand.Text() }

// Begin begins an upload to store, whose folder is f, if that is known. ctx has a
// namespace, and a lease, or containerd may collect the blob.
func Begin(ctx context.Context, store content.Store, f Folder) (*Upload, error) {
	ref := NewRef()
	w, err := content.OpenWriter(ctx, store, content.WithRef(ref))
	if err != nil {
		return nil, fmt.Errorf("write to the content store: %w", err)
	}
	u := &Upload{store: store, folder: f, ref: ref, w: w, file: f.openUpload(ref)}
	if u.file != nil {
		u.setDirect(true)
	}
	return u, nil
}

// InFolder tells whether the bytes go into the store's folder, and not through the socket.
func (u *Upload) InFolder() bool { return u.file != nil }

// Size is how many bytes were written.
func (u *Upload) Size() int64 { return u.n }

// Write writes past the page cache where the file system can: a checkpoint is as large as
// the memory that is in use, would drive out of the cache what the host works with, and
// has to be on the disk anyway before the blob has its name. That needs data that is
// aligned in memory, and of whole blocks up to the end.
func (u *Upload) Write(p []byte) (n int, err error) {
	if u.file == nil {
		n, err = u.w.Write(p)
	} else {
		if u.direct && len(p)%directBlock != 0 { // the end
			u.setDirect(false)
		}
		n, err = u.file.Write(p)
		if u.direct && errors.Is(err, unix.EINVAL) {
			u.setDirect(false)
			var rest int
			rest, err = u.file.Write(p[n:])
			n += rest
		}
	}
	u.n += int64(n)
	return n, err
}

// setDirect has the file written past the page cache, or not.
func (u *Upload) setDirect(direct bool) {
	flags, err := unix.FcntlInt(u.file.Fd(), unix.F_GETFL, 0)
	if err == nil {
		flags &^= unix.O_DIRECT
		if direct {
			flags |= unix.O_DIRECT
		}
		_, err = unix.FcntlInt(u.file.Fd(), unix.F_SETFL, flags)
	}
	u.direct = direct && err == nil
}

// Commit makes a blob of all that was written, whose digest is sum, with its labels.
// A blob that is there already is no error, and is added to the lease.
func (u *Upload) Commit(ctx context.Context, sum digest.Digest, labels map[string]string) error {
	opt := content.WithLabels(labels)
	if u.file != nil {
		placed, err := u.place(ctx, sum, opt)
		if err == nil && !placed {
			err = u.resume(ctx)
		}
		if err != nil || placed {
			return err
		}
	}
	// Without an expected digest, or a store behind gRPC would not add a blob to
	// the lease that it has already.
	if err := u.w.Commit(ctx, u.n, "", opt); err != nil && !errdefs.IsAlreadyExists(err) {
		return fmt.Errorf("commit to the content store: %w", err)
	}
	if d := u.w.Digest(); d != sum {
		return fmt.Errorf("the content store has %s of what was %s", d, sum)
	}
	return nil
}

// place gives the file the name of a blob and commits that. It returns false if containerd
// has to read the file for it. The name stays then: another namespace may have the blob by
// now. If none has, containerd's garbage collector removes it.
func (u *Upload) place(ctx context.Context, sum digest.Digest, opt content.Opt) (bool, error) {
	info, err := u.file.Stat()
	if err == nil && info.Size() != u.n {
		err = fmt.Errorf("the upload has %d bytes of %d", info.Size(), u.n)
	}
	// As containerd does: the bytes are on the disk before the name is.
	if err == nil {
		err = u.file.Chmod(0o444)
	}
	if err == nil {
		err = u.file.Sync()
	}
	if err != nil {
		return false, fmt.Errorf("write to the content store: %w", err)
	}
	blob := u.folder.blob(sum)
	// Whatever is wrong here: if it is more than another layout, containerd finds out.
	if err := os.MkdirAll(filepath.Dir(blob), 0o755); err != nil {
		return false, nil
	}
	switch err := os.Link(u.file.Name(), blob); {
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
	ref := NewRef()
	w, err := content.OpenWriter(ctx, u.store, content.WithRef(ref),
		content.WithDescriptor(ocispec.Descriptor{Digest: sum, Size: u.n}))
	if errdefs.IsAlreadyExists(err) {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("write to the content store: %w", err)
	}
	defer w.Close()
	if st, err := w.Status(); err != nil || st.Offset != u.n {
		w.Close()
		u.abort(ctx, ref)
		return false, nil
	}
	if err := w.Commit(ctx, u.n, sum, opt); err != nil && !errdefs.IsAlreadyExists(err) {
		u.abort(ctx, ref)
		return false, fmt.Errorf("commit to the content store: %w", err)
	}
	return true, nil
}

// abort removes an upload. containerd hears of a writer that was closed a moment
// later, and may write to the upload's folder while it removes that. What stays
// goes with the lease.
func (u *Upload) abort(ctx context.Context, ref string) {
	ctx = context.WithoutCancel(ctx)
	for range 10 {
		if err := u.store.Abort(ctx, ref); err == nil || errdefs.IsNotFound(err) {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// resume opens the writer that has all that was written to the file.
func (u *Upload) resume(ctx context.Context) error {
	// The writer has its place in the file at the beginning, and the next one
	// at the end.
	err := u.w.Close()
	if err == nil {
		u.w, err = content.OpenWriter(ctx, u.store, content.WithRef(u.ref))
	}
	if err != nil {
		return fmt.Errorf("resume the upload to the content store: %w", err)
	}
	st, err := u.w.Status()
	if err == nil && st.Offset != u.n {
		err = fmt.Errorf("it has %d bytes of %d", st.Offset, u.n)
	}
	if err != nil {
		return fmt.Errorf("resume the upload to the content store: %w", err)
	}
	return nil
}

// Close ends an upload. What is left of one that failed, or was placed, would else
// be there until the lease ends.
func (u *Upload) Close(ctx context.Context) {
	if u.file != nil {
		u.file.Close()
	}
	u.w.Close()
	u.abort(ctx, u.ref)
}

package oci

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/layout"
)

// Summary is what a list of checkpoints shows. Nothing in it was checked against
// the checkpoint itself.
type Summary struct {
	Format Format `json:"format"`
	// Info has what manifests and small blobs tell; Labels and Stats are only
	// known of the format Index when Stasis wrote it.
	Info capture.Info `json:"info"`
	// SignedBy are the IDs of the keys by which it says it is signed; none of what
	// others than Stasis have stored.
	SignedBy []string `json:"signed_by,omitempty"`
	// Checkpoint and Layer are the sizes in bytes of the blobs with CRIU's
	// images and with the writable layer. Those of the base image are shared. In
	// the format Podman the first has both.
	Checkpoint int64 `json:"checkpoint_bytes"`
	Layer      int64 `json:"layer_bytes"`
}

// ReadInfo tells about a checkpoint without reading it. An image that is no
// checkpoint has the Format None.
func ReadInfo(ctx context.Context, store content.Provider, desc ocispec.Descriptor) (Summary, error) {
	f, err := find(ctx, store, desc)
	if err != nil {
		return Summary{}, err
	}
	s := Summary{Format: f.format, SignedBy: signers(f.annotations)}
	switch f.format {
	case Runnable:
		s.Info = fromAnnotations(f.annotations)
		if l := f.doc.layer(f.annotations[AnnotationCheckpointLayer]); l != nil {
			s.Checkpoint = l.Size
		}
		if l := f.doc.layer(f.annotations[AnnotationWritableLayer]); l != nil {
			s.Layer = l.Size
		}
	case Index:
		if s.Info, _, err = indexInfo(ctx, store, f.doc); err != nil {
			return Summary{}, err
		}
		s.Checkpoint = f.doc.one(images.MediaTypeContainerd1Checkpoint).Size
		if l := f.doc.one(ocispec.MediaTypeImageLayerGzip); l != nil {
			s.Layer = l.Size
		}
	case Podman:
		s.Info = fromAnnotations(f.annotations)
		complete(&s.Info, fromForeign(f.annotations))
		s.Checkpoint = f.doc.Layers[0].Size
	}
	return s, nil
}

// layer returns the layer of a digest, or nil.
func (d document) layer(digest string) *ocispec.Descriptor {
	for i := range d.Layers {
		if d.Layers[i].Digest.String() == digest {
			return &d.Layers[i]
		}
	}
	return nil
}

// Read reads a checkpoint of any format. dir is empty or does not exist; CRIU's
// images go to dir/checkpoint. The writable layer stays in the store and is read
// by WriteLayer, so the image has to be kept until then. After an error, dir is
// as it was.
//
// An image that is no checkpoint, or is not as it should be, gives an error that
// matches errdefs.ErrInvalidArgument; one of a newer format, or one for which
// dir has no room, errdefs.ErrFailedPrecondition.
func Read(ctx context.Context, store content.Provider, desc ocispec.Descriptor, dir string) (*capture.Capture, error) {
	return ReadLimited(ctx, store, desc, dir, 0)
}

// ReadLimited is Read for a checkpoint that has at most limit bytes when it is not
// compressed, its writable layer included. If limit is 0, it is half of what is free
// where dir is, as for Read. A larger one gives an error that matches
// capture.ErrTooLarge.
func ReadLimited(ctx context.Context, store content.Provider, desc ocispec.Descriptor, dir string, limit int64) (*capture.Capture, error) {
	c, err := read(ctx, store, desc, dir, limit)
	if err != nil {
		return nil, fmt.Errorf("checkpoint image %s: %w", desc.Digest, err)
	}
	return c, nil
}

func read(ctx context.Context, store content.Provider, desc ocispec.Descriptor, dir string, limit int64) (_ *capture.Capture, err error) {
	f, err := find(ctx, store, desc)
	if err != nil {
		return nil, err
	}
	undo, err := emptyDir(dir)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			undo()
		}
	}()
	if limit, err = capture.Limit(dir, limit); err != nil {
		return nil, err
	}
	switch f.format {
	case Runnable:
		return readRunnable(ctx, store, f, dir, limit)
	case Index:
		return readIndex(ctx, store, f.doc, dir, limit)
	case Podman:
		return readPodman(ctx, store, f, dir, limit)
	}
	return nil, fault.Invalid("no checkpoint of any kind that Stasis knows")
}

// emptyDir makes the folder, and returns what restores it to what it was.
func emptyDir(dir string) (undo func(), err error) {
	err = os.Mkdir(dir, 0o700)
	if err == nil {
		return func() { os.RemoveAll(dir) }, nil
	}
	if !errors.Is(err, os.ErrExist) {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	if len(entries) > 0 {
		return nil, fault.Unusable("%s is not empty (%q)", dir, entries[0].Name())
	}
	return func() {
		entries, _ := os.ReadDir(dir)
		for _, e := range entries {
			os.RemoveAll(filepath.Join(dir, e.Name()))
		}
		os.Mkdir(dir, 0o700)
	}, nil
}

func readRunnable(ctx context.Context, store content.Provider, f found, dir string, limit int64) (*capture.Capture, error) {
	switch version, err := strconv.Atoi(f.doc.Annotations[AnnotationVersion]); {
	case err != nil || version < 1:
		return nil, fault.Invalid("annotation %s is %q", AnnotationVersion, f.doc.Annotations[AnnotationVersion])
	case version > formatVersion:
		return nil, fault.Unusable("format version %d is newer than %d, the newest this Stasis knows; use a newer Stasis", version, formatVersion)
	}
	desc := f.doc.Layers[len(f.doc.Layers)-1]
	if desc.Digest.String() != f.doc.Annotations[AnnotationCheckpointLayer] {
		return nil, fault.Invalid("the last layer is not the one that annotation %s names", AnnotationCheckpointLayer)
	}
	size, err := uncompressedSize(desc)
	if err != nil {
		return nil, err
	}
	c := &capture.Capture{Images: filepath.Join(dir, layout.Images)}
	err = unpack(ctx, store, desc, size, limit, c.Images, func(r io.Reader) error { return unpackStasis(ctx, r, c, size) })
	if err != nil {
		return nil, fmt.Errorf("layer %s: %w", desc.Digest, err)
	}
	if digest, ok := f.doc.Annotations[AnnotationWritableLayer]; ok {
		writable := f.doc.layer(digest)
		if writable == nil {
			return nil, fault.Invalid("no layer has the digest that annotation %s names", AnnotationWritableLayer)
		}
		c.Layer = storedLayer{store, *writable, limit - size}
	}
	return c, nil
}

func readIndex(ctx context.Context, store content.Provider, doc document, dir string, limit int64) (*capture.Capture, error) {
	info, spec, err := indexInfo(ctx, store, doc)
	if err != nil {
		return nil, err
	}
	c := &capture.Capture{Info: info, Spec: spec, Images: filepath.Join(dir, layout.Images)}
	desc := *doc.one(images.MediaTypeContainerd1Checkpoint)
	tar := desc
	tar.MediaType = ocispec.MediaTypeImageLayer // which is what it is
	err = unpack(ctx, store, tar, desc.Size, limit, c.Images, func(r io.Reader) error {
		return unpackFlat(ctx, r, c.Images, desc.Size)
	})
	if err != nil {
		return nil, fmt.Errorf("CRIU's images, %s: %w", desc.Digest, err)
	}
	if writable := doc.one(ocispec.MediaTypeImageLayerGzip); writable != nil {
		c.Layer = storedLayer{store, *writable, limit - desc.Size}
	}
	if doc.one(MediaTypeInfo) == nil {
		addManifest(&c.Info, c.Images)
	}
	return c, nil
}

// unpack opens a layer, makes the folder for CRIU's images, and has f read the
// tar into it.
func unpack(ctx context.Context, store content.Provider, desc ocispec.Descriptor, size, limit int64, dir string, f func(io.Reader) error) error {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	if err := checkSpace(dir, size, limit); err != nil {
		return err
	}
	b, err := openBlob(ctx, store, desc)
	if err != nil {
		return err
	}
	defer b.Close()
	if err := f(b); err != nil {
		return err
	}
	return b.finish()
}

// addManifest completes an Info with what stasis.json tells: containerd's format
// does not even have the container's ID. Whether it is right, package checkpoint
// finds out when the folder is opened.
func addManifest(info *capture.Info, dir string) {
	data, err := capture.ReadSmall(filepath.Join(dir, layout.Manifest), maxMetadata)
	var m struct {
		Created   time.Time `json:"created"`
		Container struct {
			ID        string `json:"id"`
			Namespace string `json:"namespace"`
		} `json:"container"`
		CRIU         string          `json:"criu"`
		Runtime      capture.Program `json:"runtime"`
		Kernel       string          `json:"kernel"`
		Architecture string          `json:"architecture"`
	}
	if err != nil || json.Unmarshal(data, &m) != nil {
		return
	}
	info.ContainerID, info.Namespace = m.Container.ID, m.Container.Namespace
	if info.ContainerName == "" {
		info.ContainerName = m.Container.ID
	}
	info.Checkpointed, info.CRIU, info.OCIRuntime = m.Created, m.CRIU, m.Runtime
	info.Host.Kernel, info.Host.Architecture = m.Kernel, m.Architecture
}

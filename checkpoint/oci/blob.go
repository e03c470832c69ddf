package oci

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"strconv"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/stasis-run/stasis/checkpoint/contentstore"
)

// Options are those of writing.
type Options struct {
	// Compression is that of the layers; the zero value does not compress. The
	// format Index has its own.
	Compression compression.Compression
	// Folder is the folder of the store, which makes writing layers much faster; the
	// zero value is for a store that has none, or one that is not known.
	Folder contentstore.Folder
	// Progress, if not nil, is told how many bytes of a stage ("layer",
	// "checkpoint") are done, before compression. total is 0 if nobody knows.
	// Stages may run at the same time and call it from different goroutines.
	Progress func(stage string, done, total int64)
}

// compressed returns o with another compression.
func (o Options) compressed(c compression.Compression) Options {
	o.Compression = c
	return o
}

// progress returns what counts for a stage.
func (o Options) progress(stage string, total int64) func(done int64) {
	if o.Progress == nil {
		return func(int64) {}
	}
	return func(done int64) { o.Progress(stage, done, total) }
}

// Layer is a tar in the store.
type Layer struct {
	ocispec.Descriptor
	DiffID digest.Digest // of the uncompressed tar
}

// writeLayer streams a tar into the store: write makes it.
func writeLayer(ctx context.Context, store content.Store, o Options,
	write func(context.Context, io.Writer) error, progress func(int64)) (Layer, error) {
	l, err := newLayerWriter(ctx, store, o, progress)
	if err != nil {
		return Layer{}, err
	}
	return l.finish(ctx, write(ctx, l.tar))
}

// layerWriter is a layer on its way into the store. While its tar is written,
// others compress, hash and send it.
type layerWriter struct {
	tar *pump // takes the tar

	compression compression.Compression
	z           io.WriteCloser // nil: not compressed
	sink        *pump          // takes what z gives
	upload      *contentstore.Upload
	plain, sent digest.Digester // of the tar, of what is sent
	count       counter         // of the tar
}

// newLayerWriter begins a layer; finish has to end it.
func newLayerWriter(ctx context.Context, store content.Store, o Options, progress func(int64)) (*layerWriter, error) {
	upload, err := contentstore.Begin(ctx, store, o.Folder)
	if err != nil {
		return nil, err
	}
	l := &layerWriter{compression: o.Compression, upload: upload, plain: digest.Canonical.Digester(), count: counter{told: progress}}
	tar := io.MultiWriter(l.plain.Hash(), &l.count)
	if o.Compression == compression.Uncompressed {
		l.sent = l.plain
		l.tar = newPump(upload, tar)
		return l, nil
	}
	l.sent = digest.Canonical.Digester()
	l.sink = newPump(upload, l.sent.Hash())
	if l.z, err = compressor(l.sink, o.Compression); err != nil {
		l.sink.Close()
		upload.Close(ctx)
		return nil, err
	}
	l.tar = newPump(l.z, tar)
	return l, nil
}

// finish commits the layer, unless err, which is what came of writing the tar, is
// an error: then nothing stays of it.
func (l *layerWriter) finish(ctx context.Context, err error) (Layer, error) {
	defer l.upload.Close(ctx)
	err = firstError(err, l.tar.Close())
	if l.z != nil {
		err = firstError(err, l.z.Close(), l.sink.Close())
	}
	if err = firstError(err, context.Cause(ctx)); err != nil {
		return Layer{}, err
	}
	l.count.told(l.count.n)
	done := Layer{DiffID: l.plain.Digest()}
	done.MediaType, done.Size, done.Digest = layerTypes[l.compression], l.upload.Size(), l.sent.Digest()
	done.Annotations = map[string]string{AnnotationUncompressed: strconv.FormatInt(l.count.n, 10)}
	return done, l.upload.Commit(ctx, done.Digest, map[string]string{labels.LabelUncompressed: done.DiffID.String()})
}

// writeBlob writes a small blob. The labels are set on one that is there
// already, too.
func writeBlob(ctx context.Context, store content.Store, mediaType string, data []byte, gc map[string]string) (ocispec.Descriptor, error) {
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	if err := content.WriteBlob(ctx, store, contentstore.NewRef(), bytes.NewReader(data), desc, content.WithLabels(gc)); err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("write to the content store: %w", err)
	}
	info, err := store.Info(ctx, desc.Digest)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("write to the content store: %w", err)
	}
	update := content.Info{Digest: desc.Digest, Labels: map[string]string{}}
	var fields []string
	for key, value := range gc {
		if info.Labels[key] != value {
			update.Labels[key] = value
			fields = append(fields, "labels."+key)
		}
	}
	if fields != nil {
		if _, err := store.Update(ctx, update, fields...); err != nil {
			return ocispec.Descriptor{}, fmt.Errorf("label %s: %w", desc.Digest, err)
		}
	}
	return desc, nil
}

// gcLabels make containerd keep all of descs as long as the blob that has the
// labels.
func gcLabels(descs ...ocispec.Descriptor) map[string]string {
	refs := map[string]string{}
	for i, desc := range descs {
		refs["containerd.io/gc.ref.content."+strconv.Itoa(i)] = desc.Digest.String()
	}
	return refs
}

// counter counts what is written to it.
type counter struct {
	n    int64
	told func(int64)
}

func (c *counter) Write(p []byte) (int, error) {
	// A tar comes in small and large pieces; a call for each MiB is enough.
	before := c.n
	c.n += int64(len(p))
	if before>>20 != c.n>>20 {
		c.told(c.n)
	}
	return len(p), nil
}

// firstError returns the first of errs that is one: the others follow from it.
func firstError(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

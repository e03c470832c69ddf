package image

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"strconv"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Options are those of writing.
type Options struct {
	// Compression is that of the layers; the zero value does not compress. The
	// form Index has its own.
	Compression compression.Compression
	// Root is the folder of the store, if it is containerd's local one on this
	// host, which makes writing much faster; else empty.
	Root string
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

// layer is a tar in the store.
type layer struct {
	ocispec.Descriptor
	diffID digest.Digest // of the uncompressed tar
}

// writeLayer streams a tar into the store: write makes it, and others compress,
// hash and send it meanwhile.
func writeLayer(ctx context.Context, store content.Store, o Options,
	write func(context.Context, io.Writer) error, progress func(int64)) (l layer, err error) {
	in, err := newIngest(ctx, store, newRef(), o.Root)
	if err != nil {
		return layer{}, err
	}
	defer in.close(ctx)
	count := counter{told: progress}
	plain, sent := digest.Canonical.Digester(), digest.Canonical.Digester() // of the tar, of what is sent
	tar := io.MultiWriter(plain.Hash(), &count)
	if o.Compression == compression.Uncompressed {
		sent = plain
		out := newPump(in, tar)
		err = firstError(write(ctx, out), out.Close())
	} else {
		sink := newPump(in, sent.Hash())
		z, zerr := compressor(sink, o.Compression)
		if zerr != nil {
			sink.Close()
			return layer{}, zerr
		}
		out := newPump(z, tar)
		err = firstError(write(ctx, out), out.Close(), z.Close(), sink.Close())
	}
	if err = firstError(err, context.Cause(ctx)); err != nil {
		return layer{}, err
	}
	progress(count.n)
	l.MediaType, l.Size, l.Digest, l.diffID = layerTypes[o.Compression], in.n, sent.Digest(), plain.Digest()
	if err := in.commit(ctx, l.Digest, map[string]string{labels.LabelUncompressed: l.diffID.String()}); err != nil {
		return layer{}, err
	}
	l.Annotations = map[string]string{AnnotationUncompressed: strconv.FormatInt(count.n, 10)}
	return l, nil
}

// writeBlob writes a small blob. The labels are set on one that is there
// already, too.
func writeBlob(ctx context.Context, store content.Store, mediaType string, data []byte, gc map[string]string) (ocispec.Descriptor, error) {
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	if err := content.WriteBlob(ctx, store, newRef(), bytes.NewReader(data), desc, content.WithLabels(gc)); err != nil {
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

// newRef names a write to the store. No other may continue it.
func newRef() string { return "stasis-" + rand.Text() }

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

package oci

import (
	"context"
	"encoding/json"
	"fmt"
	"io"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/fault"
)

// Annotations of containerd's index, from its client/container.go and task.go.
const (
	ctrImage       = ocispec.AnnotationRefName
	ctrTaskImage   = "image.name" // `ctr tasks checkpoint` has this one only
	ctrRuntime     = "io.containerd.checkpoint.runtime"
	ctrSnapshotter = "io.containerd.checkpoint.snapshotter"
)

// MediaTypeInfo is a blob in the index that only Stasis reads: capture.Info as
// JSON. containerd's own blobs tell little of it, and containerd passes over
// what it does not know.
const MediaTypeInfo = "application/vnd.stasis.checkpoint.info.v1+json"

// specType is the type that containerd registers for runtime specs.
const specType = "types.containerd.io/opencontainers/runtime-spec/1/Spec"

// WriteIndex writes containerd's format and returns the descriptor of the index.
// base is what the record of the container's image points at, which becomes
// part of the checkpoint. `ctr containers restore` looks that image up by
// Info.Base.Name, and fails without Info.Runtime and Info.Base.Snapshotter.
//
// What the images of CRIU are is an uncompressed tar and the writable layer a
// gzipped one, as containerd knows no others. Its blob with the options of the
// dump is left out: nothing reads it, and stasis.json has them.
func WriteIndex(ctx context.Context, store content.Store, base ocispec.Descriptor, c *capture.Capture, o Options) (ocispec.Descriptor, error) {
	desc, err := writeIndex(ctx, store, base, c, o)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("make containerd's checkpoint of container %s: %w", c.Info.ContainerName, err)
	}
	return desc, nil
}

func writeIndex(ctx context.Context, store content.Store, base ocispec.Descriptor, c *capture.Capture, o Options) (ocispec.Descriptor, error) {
	platform := &ocispec.Platform{OS: "linux", Architecture: architecture(c.Info)}
	// With it, what it refers to: containerd's client looks for no more.
	if err := retain(ctx, store, base); err != nil {
		return ocispec.Descriptor{}, err
	}
	files, total, err := listImages(c.Images)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	var writable, checkpoint Layer
	group, gctx := errgroup.WithContext(ctx)
	if c.Layer != nil {
		group.Go(func() (err error) {
			writable, err = writeLayer(gctx, store, o.compressed(compression.Gzip), c.Layer.WriteLayer, o.progress("layer", layerSize(c.Info)))
			return err
		})
	}
	group.Go(func() (err error) {
		checkpoint, err = writeLayer(gctx, store, o.compressed(compression.Uncompressed), func(ctx context.Context, w io.Writer) error {
			t := newTree(w, c.Info.Checkpointed)
			t.images(ctx, "", c.Images, files)
			return t.close()
		}, o.progress("checkpoint", total))
		return err
	})
	if err := group.Wait(); err != nil {
		return ocispec.Descriptor{}, err
	}
	spec, err := proto.MarshalOptions{Deterministic: true}.Marshal(&anypb.Any{TypeUrl: specType, Value: c.Spec})
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	specDesc, err := writeBlob(ctx, store, images.MediaTypeContainerd1CheckpointConfig, spec, nil)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	info, err := capture.EncodeInfo(c.Info)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	infoDesc, err := writeBlob(ctx, store, MediaTypeInfo, info, nil)
	if err != nil {
		return ocispec.Descriptor{}, err
	}

	// In containerd's order.
	index := ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageIndex,
		Manifests: []ocispec.Descriptor{{MediaType: base.MediaType, Digest: base.Digest, Size: base.Size}},
		Annotations: map[string]string{
			ctrImage:       c.Info.Base.Name,
			ctrRuntime:     c.Info.Runtime,
			ctrSnapshotter: c.Info.Base.Snapshotter,
		},
	}
	signedBy(index.Annotations, c.Images)
	add := func(desc ocispec.Descriptor, mediaType string) {
		index.Manifests = append(index.Manifests, ocispec.Descriptor{
			MediaType: mediaType, Digest: desc.Digest, Size: desc.Size, Platform: platform,
		})
	}
	if c.Layer != nil {
		add(writable.Descriptor, ocispec.MediaTypeImageLayerGzip)
		last := &index.Manifests[len(index.Manifests)-1]
		last.Annotations = map[string]string{labels.LabelUncompressed: writable.DiffID.String()}
	}
	add(checkpoint.Descriptor, images.MediaTypeContainerd1Checkpoint)
	add(specDesc, images.MediaTypeContainerd1CheckpointConfig)
	add(infoDesc, MediaTypeInfo)
	data, err := json.Marshal(index)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return writeBlob(ctx, store, ocispec.MediaTypeImageIndex, data, gcLabels(index.Manifests...))
}

// indexInfo reads what the small blobs of an index tell: the spec, and all that
// is known of an Info.
func indexInfo(ctx context.Context, store content.Provider, doc document) (capture.Info, json.RawMessage, error) {
	for _, mediaType := range []string{images.MediaTypeContainerd1Checkpoint, images.MediaTypeContainerd1CheckpointConfig,
		MediaTypeInfo, ocispec.MediaTypeImageLayerGzip} {
		n := 0
		for _, desc := range doc.Manifests {
			if desc.MediaType == mediaType {
				n++
			}
		}
		if n > 1 {
			return capture.Info{}, nil, fault.Invalid("the index has %d blobs of type %s; a checkpoint has one", n, mediaType)
		}
	}
	config := doc.one(images.MediaTypeContainerd1CheckpointConfig)
	if config == nil {
		return capture.Info{}, nil, fault.Invalid("the index has no container's spec (%s)", images.MediaTypeContainerd1CheckpointConfig)
	}
	data, err := readBlob(ctx, store, *config, maxMetadata)
	if err != nil {
		return capture.Info{}, nil, err
	}
	spec, err := decodeSpec(data)
	if err != nil {
		return capture.Info{}, nil, fmt.Errorf("the container's spec, %s: %w", config.Digest, err)
	}
	if desc := doc.one(MediaTypeInfo); desc != nil {
		data, err := readBlob(ctx, store, *desc, maxMetadata)
		if err != nil {
			return capture.Info{}, nil, err
		}
		info, err := capture.DecodeInfo(data)
		if err != nil {
			return capture.Info{}, nil, fmt.Errorf("%s, %s: %w", MediaTypeInfo, desc.Digest, err)
		}
		return info, spec, nil
	}
	info := capture.Info{Version: capture.InfoVersion, Engine: capture.Program{Name: "containerd"}}
	info.Runtime = doc.Annotations[ctrRuntime]
	info.Base.Snapshotter = doc.Annotations[ctrSnapshotter]
	if info.Base.Name = doc.Annotations[ctrImage]; info.Base.Name == "" {
		info.Base.Name = doc.Annotations[ctrTaskImage]
	}
	for _, desc := range doc.Manifests {
		if images.IsIndexType(desc.MediaType) || images.IsManifestType(desc.MediaType) {
			info.Base.Digest = desc.Digest.String()
			break
		}
	}
	if p := doc.one(images.MediaTypeContainerd1Checkpoint).Platform; p != nil {
		info.Host.Architecture = p.Architecture
	}
	addSpec(&info, spec)
	return info, spec, nil
}

// decodeSpec reads containerd's blob with the container's spec.
func decodeSpec(data []byte) (json.RawMessage, error) {
	var spec anypb.Any
	if err := proto.Unmarshal(data, &spec); err != nil {
		return nil, fault.Invalid("no valid protobuf: %v", err)
	}
	if spec.TypeUrl != specType {
		return nil, fault.Invalid("of type %q; %s is expected", spec.TypeUrl, specType)
	}
	if err := checkSpec(spec.Value); err != nil {
		return nil, err
	}
	return spec.Value, nil
}

// addSpec completes an Info with what CRI notes in the spec of a container.
func addSpec(info *capture.Info, spec json.RawMessage) {
	var s struct {
		Annotations map[string]string `json:"annotations"`
	}
	if json.Unmarshal(spec, &s) != nil {
		return
	}
	const cri = "io.kubernetes.cri."
	info.ContainerName = s.Annotations[cri+"container-name"]
	pod := capture.Pod{
		Name:      s.Annotations[cri+"sandbox-name"],
		Namespace: s.Annotations[cri+"sandbox-namespace"],
		UID:       s.Annotations[cri+"sandbox-uid"],
		ID:        s.Annotations[cri+"sandbox-id"],
	}
	if pod != (capture.Pod{}) {
		info.Pod = &pod
	}
}

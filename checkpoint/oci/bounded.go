package oci

import (
	"context"

	"github.com/containerd/containerd/v2/core/images"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/stasis-run/stasis/checkpoint/fault"
)

// maxPulled is for manifests and indexes of a registry, in bytes. Registries take no
// larger ones. containerd's client decodes them, to some forty times the memory.
const maxPulled = 4 << 20

// Bounded returns a handler for a fetch by containerd's client, which bounds the
// manifests and indexes that it reads into memory. Their number the client bounds
// itself (images.Walk): an index can list the same one many times, and that one the
// next.
func Bounded() images.HandlerFunc {
	return func(_ context.Context, desc ocispec.Descriptor) ([]ocispec.Descriptor, error) {
		if (images.IsIndexType(desc.MediaType) || images.IsManifestType(desc.MediaType)) && desc.Size > maxPulled {
			return nil, fault.Invalid("%s (%s) has %d bytes; at most %d are read", desc.Digest, desc.MediaType, desc.Size, maxPulled)
		}
		return nil, nil
	}
}

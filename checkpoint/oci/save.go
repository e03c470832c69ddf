package oci

import (
	"context"
	"fmt"
	"maps"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/stasis-run/stasis/checkpoint/fault"
)

// Save names a checkpoint that was written: from then on it is in the image
// store and stays without a lease. A checkpoint that has the name already is
// replaced; another image is not, and the error matches
// errdefs.ErrAlreadyExists. labels are added to those of this package.
func Save(ctx context.Context, store content.Provider, records images.Store, name string, desc ocispec.Descriptor, labels map[string]string) (images.Image, error) {
	img, err := save(ctx, store, records, name, desc, labels)
	if err != nil {
		return images.Image{}, fmt.Errorf("save checkpoint image %s: %w", name, err)
	}
	return img, nil
}

// SaveNew is Save for a name that no user has typed, but a file or a checkpoint
// brings: no image that has it is replaced, whatever it is. If another has it, the
// beginning of the digest is added. made tells that there is a new record; else the
// same checkpoint has had the name already.
func SaveNew(ctx context.Context, store content.Provider, records images.Store, name string, desc ocispec.Descriptor, labels map[string]string) (img images.Image, made bool, err error) {
	img, err = newRecord(ctx, store, name, desc, labels)
	if err != nil {
		return images.Image{}, false, fmt.Errorf("save checkpoint image %s: %w", name, err)
	}
	for _, n := range []int{0, 12, len(desc.Digest.Encoded())} {
		if img.Name, err = withDigest(name, desc.Digest.Encoded()[:n]); err != nil {
			break
		}
		// Not Get first: another command may be about to take the name.
		created, cerr := records.Create(ctx, img)
		if cerr == nil {
			return created, true, nil
		}
		if err = cerr; !errdefs.IsAlreadyExists(err) {
			break
		}
		if old, gerr := records.Get(ctx, img.Name); gerr == nil && old.Target.Digest == desc.Digest {
			return old, false, nil
		}
	}
	return images.Image{}, false, fmt.Errorf("save checkpoint image %s: %w", name, err)
}

// labelMade is on the record of an image that this host's `stasis checkpoint` has made:
// its digest. Labels do not travel, and only root writes them, so what has it is what
// was made, its files included.
const labelMade = "stasis.run/made-here"

// MadeHere are the labels of an image that was made here.
func MadeHere(desc ocispec.Descriptor) map[string]string {
	return map[string]string{labelMade: desc.Digest.String()}
}

// WasMadeHere tells whether an image is one that was made here, and no other that has got
// its name since.
func WasMadeHere(img images.Image) bool { return img.Labels[labelMade] == img.Target.Digest.String() }

// maxTag is the length of a tag that registries take.
const maxTag = 128

// withDigest adds digits of a digest to the tag of a name; none change nothing.
func withDigest(name, digits string) (string, error) {
	if digits == "" {
		return name, nil
	}
	at := strings.LastIndexByte(name, ':')
	if strings.ContainsRune(name, '@') || at < strings.LastIndexByte(name, '/') {
		return "", fault.New(errdefs.ErrAlreadyExists, "there is another image of this name; give it another one")
	}
	repository, tag := name[:at+1], name[at+1:]
	return repository + tag[:min(len(tag), maxTag-1-len(digits))] + "-" + digits, nil
}

// newRecord is the record of a checkpoint.
func newRecord(ctx context.Context, store content.Provider, name string, desc ocispec.Descriptor, labels map[string]string) (images.Image, error) {
	format, err := Detect(ctx, store, desc)
	if err != nil {
		return images.Image{}, err
	}
	if format == None {
		return images.Image{}, fault.Invalid("%s is no checkpoint", desc.Digest)
	}
	img := images.Image{Name: name, Target: desc, Labels: map[string]string{AnnotationCheckpoint: string(format)}}
	if format == Index {
		img.Labels["containerd.io/checkpoint"] = "true" // as containerd's client does
	}
	maps.Copy(img.Labels, labels)
	return img, nil
}

func save(ctx context.Context, store content.Provider, records images.Store, name string, desc ocispec.Descriptor, labels map[string]string) (images.Image, error) {
	img, err := newRecord(ctx, store, name, desc, labels)
	if err != nil {
		return images.Image{}, err
	}
	created, err := records.Create(ctx, img)
	if !errdefs.IsAlreadyExists(err) {
		return created, err
	}
	old, err := records.Get(ctx, name)
	if err != nil {
		return images.Image{}, err
	}
	was, err := Detect(ctx, store, old.Target)
	if err != nil && !errdefs.IsNotFound(err) {
		return images.Image{}, err
	}
	if was == None && old.Labels[AnnotationCheckpoint] == "" {
		return images.Image{}, fault.New(errdefs.ErrAlreadyExists, "there is an image of this name that is no checkpoint; choose another name")
	}
	return records.Update(ctx, img, "target", "labels")
}

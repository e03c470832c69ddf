package node

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// findBase finds the image that the container was made from. The container's record has a
// name, which can be another image's by now; what its snapshot was made from, and what its
// writable layer is relative to, does not change.
func (d *dumper) findBase(ctx context.Context) error {
	var named client.Image
	if d.info.Image != "" {
		image, err := d.client.GetImage(ctx, d.info.Image)
		if err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("look at its image %s: %w", d.info.Image, err)
		}
		if err == nil {
			named = image
		}
	}
	if d.info.Image == "" || d.info.SnapshotKey == "" { // no snapshot to go by
		d.setBase(named)
		return nil
	}
	chain, err := d.chain(ctx)
	if err != nil {
		return fmt.Errorf("look at its snapshot %s: %w", d.info.SnapshotKey, err)
	}
	madeFrom := func(record images.Image) (bool, error) {
		has, err := chainOf(ctx, d.client, record)
		return err == nil && has != "" && has == chain, err
	}
	var unread error // why it is not known what the named one is
	if named != nil {
		var is bool
		if is, unread = madeFrom(named.Metadata()); is {
			d.setBase(named)
			return nil
		}
	}
	record, err := imageWhere(ctx, d.client, d.info.Image, func(record images.Image) bool {
		is, _ := madeFrom(record)
		return is
	})
	switch {
	case err == nil:
		d.setBase(client.NewImage(d.client, record))
		if ofCRI(record) { // no registry knows its name
			d.baseName = byDigest(d.info.Image, record)
		}
	case !errdefs.IsNotFound(err):
		return err
	case unread != nil:
		return fmt.Errorf("look at its image %s: %w", d.info.Image, unread)
	case named != nil:
		d.otherBase = true
	}
	return nil
}

func (d *dumper) setBase(image client.Image) {
	if image != nil {
		d.image, d.base, d.baseName = image, image.Target(), image.Name()
	}
}

// chain is the chain ID (image-spec, config.md) of what the container's snapshot was made
// from. With a user namespace, containerd may have put a snapshot between, in which the
// files have the namespace's owners. The parent of any other would be the image without
// its last layer.
func (d *dumper) chain(ctx context.Context) (string, error) {
	snapshots := d.client.SnapshotService(d.info.Snapshotter)
	info, err := snapshots.Stat(ctx, d.info.SnapshotKey)
	if err != nil {
		return "", err
	}
	spec, err := d.container.Spec(ctx)
	if err != nil {
		return "", err
	}
	if spec.Linux == nil || len(spec.Linux.UIDMappings) == 0 || info.Parent == "" {
		return info.Parent, nil
	}
	between, err := snapshots.Stat(ctx, info.Parent)
	if err != nil {
		return "", err
	}
	if d.remapped = slices.Contains(remappedNames(between.Parent, spec.Linux), info.Parent); d.remapped {
		return between.Parent, nil
	}
	return info.Parent, nil
}

// remappedNames are the names that containerd gives a snapshot of a chain whose files have
// a user namespace's owners: since 2.1 and before (its client, snapshotter_opts_unix.go).
func remappedNames(chain string, l *specs.Linux) []string {
	sorted := func(m []specs.LinuxIDMapping) []specs.LinuxIDMapping {
		m = slices.Clone(m)
		slices.SortStableFunc(m, func(a, b specs.LinuxIDMapping) int { return cmp.Compare(a.ContainerID, b.ContainerID) })
		return m
	}
	var key struct {
		Parent string
		IDMap  struct{ UidMap, GidMap []specs.LinuxIDMapping }
	}
	key.Parent, key.IDMap.UidMap, key.IDMap.GidMap = chain, sorted(l.UIDMappings), sorted(l.GIDMappings)
	var names []string
	if data, err := json.Marshal(key); err == nil {
		names = append(names, digest.FromBytes(data).String())
	}
	if len(l.UIDMappings) > 0 && len(l.GIDMappings) > 0 {
		names = append(names, fmt.Sprintf("%s-%d-%d", chain, l.UIDMappings[0].HostID, l.GIDMappings[0].HostID))
	}
	return names
}

// chainOf is the chain ID of an image's layers.
func chainOf(ctx context.Context, c *client.Client, record images.Image) (string, error) {
	diffs, err := record.RootFS(ctx, c.ContentStore(), platforms.Default())
	if err != nil {
		return "", err
	}
	return identity.ChainID(diffs).String(), nil
}

// imageWhere returns an image in containerd's store for which is holds, preferably one of
// the repository of a name. It matches errdefs.ErrNotFound if there is none.
func imageWhere(ctx context.Context, c *client.Client, name string, is func(images.Image) bool) (images.Image, error) {
	records, err := c.ImageService().List(ctx)
	if err != nil {
		return images.Image{}, fmt.Errorf("list images: %w", err)
	}
	repository := repositoryOf(name)
	rank := func(record images.Image) int {
		switch {
		case repositoryOf(record.Name) == repository:
			return 0
		case !ofCRI(record):
			return 1
		}
		return 2
	}
	slices.SortStableFunc(records, func(a, b images.Image) int {
		return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(a.Name, b.Name))
	})
	for _, record := range records {
		if err := context.Cause(ctx); err != nil {
			return images.Image{}, err
		}
		if is(record) {
			return record, nil
		}
	}
	return images.Image{}, fmt.Errorf("no image in containerd's store is that: %w", errdefs.ErrNotFound)
}

func repositoryOf(name string) string {
	named, err := reference.ParseDockerRef(name)
	if err != nil {
		return ""
	}
	return named.Name()
}

// byDigest names an image by its digest, in the repository of another name.
func byDigest(name string, record images.Image) string {
	repository := repositoryOf(name)
	if repository == "" {
		return record.Name
	}
	return repository + "@" + record.Target.Digest.String()
}
